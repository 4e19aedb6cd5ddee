"""Text colored by expert: one HTML page without scripts, network or other files."""

from html import escape

import numpy as np
from transformers import PreTrainedTokenizerFast

from moe.analysis.figures.style import PALETTE
from moe.specialization.observation import Observation

COLORS = (*PALETTE[:6], "#F0E442", PALETTE[-1])  # Okabe and Ito; yellow for black, which no dark page shows
LINES = ("none", "2px solid", "2px dashed", "3px dotted")  # below the token: eight more experts each
BLOCKS_A_DOMAIN = 2

STYLE = """\
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --dim: #666; }
@media (prefers-color-scheme: dark) { :root { --page: #161616; --ink: #ececec; --dim: #a0a0a0; } }
body { background: var(--page); color: var(--ink); font: 15px/1.75 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.5rem 0 0.25rem; }
p.note { color: var(--dim); }
div.text { font-family: ui-monospace, monospace; font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }
div.text span, ul span { border-radius: 3px; padding: 1px 0; }
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; }
ul span { padding: 1px 0.5em; }
label { margin-right: 1rem; }
"""


def page(seen: Observation, tokenizer: PreTrainedTokenizerFast, *, domains: tuple[str, ...], title: str) -> str:
    """The first two blocks of each domain; a token has the color of its heaviest expert in the layer selected.

    Its hover title names all its experts and gate weights in every layer.
    """
    layers, _, experts = seen.chosen.shape
    heaviest = np.where(seen.chosen.any(-1), np.where(seen.chosen, seen.weight, -np.inf).argmax(-1), -1)
    radios = [
        f'<input type="radio" name="layer" id="l{n}"{" checked" * (n == 0)}><label for="l{n}">layer {n}</label>'
        for n in range(layers)
    ]
    legend = "".join(f'<li><span class="e{e}">expert {e}</span></li>' for e in range(experts))
    rows = [row for d in range(len(domains)) for row in np.flatnonzero(seen.domain == d)[:BLOCKS_A_DOMAIN]]
    texts = []
    for row in rows:
        texts.append(f"<h2>{escape(domains[seen.domain[row]])}</h2>")
        first = row * seen.ids.shape[1]
        spans = []
        for place, token in enumerate(seen.ids[row], start=first):
            names = " ".join(f"l{n}e{e}" for n, e in enumerate(heaviest[:, place]))
            text = escape(str(tokenizer.decode([int(token)])))
            spans.append(f'<span class="{names}" title="{escape(_title(seen, place))}">{text}</span>')
        texts.append(f'<div class="text">{"".join(spans)}</div>')
    note = "Color: the expert with the largest gate weight, in the layer selected. Hover over a token for all of them."
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>{escape(title)}: tokens by expert</title>\n<style>\n{STYLE}{_rules(layers, experts)}</style></head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="note">{note}</p>\n{"".join(radios)}\n'
        f'<input type="checkbox" id="numbers"><label for="numbers">numbers</label>\n'
        f"<main>\n<ul>{legend}</ul>\n{''.join(texts)}\n</main>\n</body>\n</html>\n"
    )


def _title(seen: Observation, place: int) -> str:
    lines = []
    for layer, (chosen, weight) in enumerate(zip(seen.chosen[:, place], seen.weight[:, place], strict=True)):
        order = [e for e in np.argsort(-weight, kind="stable") if chosen[e]]
        lines.append(f"layer {layer}: " + (", ".join(f"{e} ({weight[e]:.2f})" for e in order) or "no expert"))
    return "\n".join(lines)


def _rules(layers: int, experts: int) -> str:
    """Style sheets are the layer selector: a token has a class for each layer, which counts while that is selected."""
    rules = []
    for e in range(experts):
        color, line = COLORS[e % len(COLORS)], LINES[e // len(COLORS) % len(LINES)]
        names = [f"#l{n}:checked ~ main .l{n}e{e}" for n in range(layers)]
        look = f"background: color-mix(in srgb, {color} 42%, var(--page)); border-bottom: {line} {color}"
        rules.append(f"{', '.join([*names, f'.e{e}'])} {{ {look} }}\n")
        numbered = [f"#l{n}:checked ~ #numbers:checked ~ main .l{n}e{e}::after" for n in range(layers)]
        rules.append(f'{", ".join(numbered)} {{ content: "{e}"; font-size: 0.65em; vertical-align: sub }}\n')
    return "".join(rules)
