"""Make an HTML page with text in which each token has the color of its expert.

The page works without its script too: it then shows the colors of the first layer.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from markupsafe import Markup
from transformers import PreTrainedTokenizerFast

from moe.analysis.figures.style import PALETTE
from moe.analysis.report.html import render_page
from moe.data.blocks import Batch
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Knobs
from moe.specialization.observation import Observation, observe

# Okabe and Ito's, with yellow. Their black is the color of the text, so that it is visible on a dark page too.
COLORS = (*PALETTE[:6], "#F0E442", "var(--ink)")
LINES = ("solid", "dashed", "dotted", "double")  # below a token; each comes with and without a line above the token
LOOKS = len(COLORS) * 2 * len(LINES)  # experts that look different; others need their numbers
BLOCKS_PER_DOMAIN = 2
MOST_ASSIGNMENTS = 200_000  # of tokens to experts on one page of a study, so that it stays below about 2 MB
BROKEN = "\ufffd"  # what a decoder returns for a part of a character
MOST_PARTS = 8  # tokens that one character can consist of


class Passage(NamedTuple):
    """A text of S tokens under its heading, and by layer the experts of each token with their gate weights."""

    heading: str
    ids: Int[np.ndarray, " S"]
    chosen: list[Bool[np.ndarray, "S E"]]
    weight: list[Float[np.ndarray, "S E"]]


class Token(NamedTuple):
    """A token on the page; `classes` are its CSS classes: what it is, and its heaviest expert in the first layer."""

    text: str
    classes: str


class ExpertStyle(NamedTuple):
    """Color of the tokens of an expert, the kind of line below them, and whether there is a line above them."""

    number: int
    color: str
    line: str
    above: bool


def token_page(seen: Observation, tokenizer: PreTrainedTokenizerFast, *, domains: tuple[str, ...], title: str) -> str:
    """Return an HTML page with the first blocks of each domain. If there are many, each block is cut at its end."""
    of_domain = [np.flatnonzero(seen.domain == d)[:BLOCKS_PER_DOMAIN].tolist() for d in range(len(domains))]
    length = seen.ids.shape[1]
    per_token = max(1.0, sum(chosen.sum() for chosen in seen.chosen) / seen.ids.size)
    shown = min(length, max(1, int(MOST_ASSIGNMENTS / per_token / sum(map(len, of_domain)))))
    cut = f"; the first {shown} are shown" if shown < length else ""
    passages = [
        _passage(seen, row, domain if len(found) == 1 else f"{domain}, block {n}", shown)
        for domain, found in zip(domains, of_domain, strict=True)
        for n, row in enumerate(found, start=1)
    ]
    origin = f"The text is validation data: for each domain, up to {BLOCKS_PER_DOMAIN} blocks of {length} tokens{cut}."
    return _page(passages, tokenizer, title=title, origin=origin)


def text_page(model: MoEForCausalLM, tokenizer: PreTrainedTokenizerFast, blocks: list[Batch], *, title: str) -> str:
    """Return an HTML page with the `text_blocks` of a text, which the model reads one after the other.

    Raises ValueError for a model whose experts do not work on single tokens.
    """
    knobs = Knobs.of(temperature=model.config.router_temperature, device=model.device)
    headings = ["your text"] if len(blocks) == 1 else [f"your text, part {n + 1}" for n in range(len(blocks))]
    seen = [observe(model, block, knobs) for block in blocks]
    passages = [_passage(part, 0, heading) for part, heading in zip(seen, headings, strict=True)]
    apart = (
        f"The model reads {blocks[0].ids.numel()} tokens at once: each part of the text without the parts before it."
    )
    return _page(passages, tokenizer, title=title, origin=apart if len(blocks) > 1 else "")


def _passage(seen: Observation, row: int, heading: str, shown: int | None = None) -> Passage:
    """Return the first tokens of a block."""
    length = seen.ids.shape[1]
    at = slice(row * length, row * length + (shown or length))
    chosen, weight = ([of_layer[at] for of_layer in each] for each in (seen.chosen, seen.weight))
    return Passage(heading, seen.ids[row][:shown], chosen, weight)


def _page(passages: Sequence[Passage], tokenizer: PreTrainedTokenizerFast, *, title: str, origin: str) -> str:
    """Return a page with texts. `origin` is a sentence that says what they are."""
    numbers = [chosen.shape[-1] for chosen in passages[0].chosen]
    layers, experts = len(numbers), max(numbers)
    parts = [_assignments(passage) for passage in passages]
    routing = [[token for part in parts for token in part[layer]] for layer in range(layers)]
    texts, decode = [], cache(partial(_decode, tokenizer))
    for passage, part in zip(passages, parts, strict=True):
        pieces = _pieces(passage.ids.tolist(), decode)
        tokens = [Token(text, _classes(text, of_token)) for text, of_token in zip(pieces, part[0], strict=True)]
        texts.append((passage.heading, tokens))
    values: dict[str, Any] = {
        "title": title,
        "numbers": numbers,
        "experts": [expert_style(expert) for expert in range(experts)],
        "alike": LOOKS if experts > LOOKS else None,
        "tokens": sum(len(passage.ids) for passage in passages),
        "without": sum(not token for token in routing[0]),
        "texts": texts,
        "origin": origin,
        "signs": {sign for _, tokens in texts for token in tokens if (sign := _sign(token.text))},
        "routing": Markup(json.dumps(routing, separators=(",", ":"))),  # numbers and null alone
    }
    script = files(__package__).joinpath("templates/tokens.js").read_text(encoding="utf-8")
    return render_page("tokens.html.j2", package="moe.specialization", scripts=[script], **values)


def expert_style(expert: int) -> ExpertStyle:
    """Return how the tokens of an expert look. Neighbors, and all of up to eight experts, differ in color and line.

    So eight experts can be told apart without color, and `LOOKS` with it.
    """
    color, round_ = expert % len(COLORS), expert // len(COLORS)
    above, line = divmod((color + round_) % (2 * len(LINES)), len(LINES))
    return ExpertStyle(expert, COLORS[color], LINES[line], bool(above))


def _assignments(passage: Passage) -> list[list[list[int | None]]]:
    """Return, by layer and token: expert, weight in thousandths, expert, weight, ... The heaviest is first.

    A weight that is not finite is None.
    """
    layers = []
    for chosen, weight in zip(passage.chosen, passage.weight, strict=True):
        order = np.argsort(-weight, axis=-1, kind="stable")
        rows = zip(order.tolist(), chosen.tolist(), weight.tolist(), strict=True)
        layers.append([[n for e in experts if taken[e] for n in (e, _thousandths(w[e]))] for experts, taken, w in rows])
    return layers


def _thousandths(weight: float) -> int | None:
    return round(1000 * weight) if math.isfinite(weight) else None


def _sign(text: str) -> str:
    """Return what is special about a token: "part" if it continues the character before it, "newline", "broken"."""
    if not text:
        return "part"
    return "newline" if text.isspace() and "\n" in text else "broken" if BROKEN in text else ""


def _classes(text: str, assignments: list[int | None]) -> str:
    """Return what is special about a token, and its heaviest expert."""
    return " ".join(filter(None, [_sign(text), f"e{assignments[0]}" if assignments else ""]))


def _pieces(ids: list[int], decode: Callable[..., str]) -> list[str]:
    """Return the text of each token. If several tokens are one character, the first has it and the others are empty."""
    pieces: list[str] = []
    while len(pieces) < len(ids):
        rest = ids[len(pieces) : len(pieces) + MOST_PARTS]
        whole = (n for n in range(1, len(rest) + 1) if BROKEN not in decode(*rest[:n]))
        parts = next(whole, 1)
        pieces += [decode(*rest[:parts]), *[""] * (parts - 1)]
    return pieces


def _decode(tokenizer: PreTrainedTokenizerFast, *ids: int) -> str:
    """Return the text of some tokens, of a single one as it is after another token: with the space that begins it."""
    text = str(tokenizer.decode(list(ids)))
    if len(ids) > 1 or BROKEN in text:
        return text
    twice = str(tokenizer.decode([*ids, *ids]))
    return twice.removeprefix(text) if twice.startswith(text) else text
