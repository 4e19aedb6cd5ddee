"""Make an HTML page with text in which each token has the color of its expert."""

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from moe.analysis.figures.style import PALETTE
from moe.analysis.report.html import render_page
from moe.specialization.observation import Observation

COLORS = (
    *PALETTE[:6],
    "#F0E442",
    PALETTE[-1],
)  # Okabe and Ito; yellow instead of black, which is invisible on a dark page
LINES = ("none", "2px solid", "2px dashed", "3px dotted")  # below a token; each kind of line repeats the eight colors
BLOCKS_PER_DOMAIN = 2


class Token(NamedTuple):
    """A token on the page; `classes` names its heaviest expert in every layer, `experts` all of them with weights."""

    text: str
    classes: str
    experts: str


class ColoredText(NamedTuple):
    """The tokens of one block, under the name of its domain."""

    domain: str
    tokens: list[Token]


class ExpertStyle(NamedTuple):
    """Color of the tokens of an expert, and the line below them."""

    number: int
    color: str
    line: str


def token_page(seen: Observation, tokenizer: PreTrainedTokenizerFast, *, domains: tuple[str, ...], title: str) -> str:
    """Return an HTML page with the first blocks of each domain.

    A token has the color of its heaviest expert in the layer that the reader selects. Its tooltip lists all its experts
    and their gate weights in every layer.
    """
    layers, _, experts = seen.chosen.shape
    heaviest = np.where(seen.chosen.any(-1), np.where(seen.chosen, seen.weight, -np.inf).argmax(-1), -1)
    blocks = [row for d in range(len(domains)) for row in np.flatnonzero(seen.domain == d)[:BLOCKS_PER_DOMAIN]]
    texts = []
    for row in blocks:
        tokens = []
        for place, token in enumerate(seen.ids[row], start=row * seen.ids.shape[1]):
            classes = " ".join(f"l{n}e{e}" for n, e in enumerate(heaviest[:, place]))
            tokens.append(Token(str(tokenizer.decode([int(token)])), classes, _experts_of(seen, place)))
        texts.append(ColoredText(domains[seen.domain[row]], tokens))
    styles = [ExpertStyle(e, COLORS[e % len(COLORS)], LINES[e // len(COLORS) % len(LINES)]) for e in range(experts)]
    values = {"title": title, "layers": layers, "experts": styles, "texts": texts}
    return render_page("tokens.html.j2", package="moe.specialization", **values)


def _experts_of(seen: Observation, place: int) -> str:
    """Return a line for each layer with the experts of a token, the heaviest first, and their gate weights."""
    lines = []
    for layer, (chosen, weight) in enumerate(zip(seen.chosen[:, place], seen.weight[:, place], strict=True)):
        order = [e for e in np.argsort(-weight, kind="stable") if chosen[e]]
        lines.append(f"layer {layer}: " + (", ".join(f"{e} ({weight[e]:.2f})" for e in order) or "no expert"))
    return "\n".join(lines)
