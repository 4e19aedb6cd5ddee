"""The document as one HTML file that needs nothing else: style inline, figures as data, no script, no network."""

import base64
import html
import re
from pathlib import Path

from moe.analysis.report.blocks import (
    MOST_ROWS,
    Attachment,
    Block,
    Bullets,
    Details,
    Heading,
    Picture,
    Table,
    Tally,
    Text,
    cut,
)
from moe.analysis.report.markdown import as_html


def page(title: str, sections: list[str], elements: list[str]) -> str:
    """The whole file: `elements` in order, under the title and a table of contents of the `sections`' headings."""
    contents = "".join(f'<li><a href="#{_anchor(text)}">{html.escape(text)}</a></li>' for text in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
<h1>{html.escape(title)}</h1>
{chr(10).join(elements)}
</main>
</body>
</html>
"""


def element(block: Block, out: Path) -> str:
    """The block as HTML; the bytes of its figure are read from the folder `out`."""
    match block:
        case Heading(text, level):
            anchor = _anchor(text)
            return f'<h{level} id="{anchor}"><a href="#{anchor}">{_inline(text)}</a></h{level}>'
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
        case Table(frame):
            box = f'<div class="scroll" tabindex="0">{as_html(frame.head(MOST_ROWS))}</div>'
            return box + (f"<p>{cut(frame)}</p>" if cut(frame) else "")
        case Tally(parts):
            seen = [(html.escape(name), n, tone) for name, n, tone in parts if n]
            bar = "".join(f'<span class="{tone}" style="flex-grow:{n}"></span>' for _, n, tone in seen)
            legend = "".join(f'<li class="{tone}"><b>{n:,}</b> {name}</li>' for name, n, tone in seen)
            return f'<div class="bar" aria-hidden="true">{bar}</div><ul class="tally">{legend}</ul>'
        case Picture(name, _, caption):
            data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
            image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
            return f"<figure>{image}<figcaption>{_inline(caption)} {_link(f'{name}.png')}</figcaption></figure>"
        case Attachment(name, _, caption):
            return f'<p class="file">{_link(name)} {_inline(caption)}</p>'
        case Details(summary, leaves):
            inner = "".join(element(leaf, out) for leaf in leaves)
            return f"<details><summary>{_inline(summary)}</summary>{inner}</details>"


def _link(name: str) -> str:
    return f'<a href="{html.escape(name)}">{html.escape(name)}</a>'


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(" ".join(text.splitlines())))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _anchor(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #59636e; --line: #d9dee3; --paper: #ffffff; --tint: #f5f7f9;
  --shade: #00000022; --accent: #0a66a3; --good: #12805c; --bad: #c2410c; --idle: #8b95a1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7eb; --quiet: #9ba5b0; --line: #30373f; --paper: #14171b;
  --tint: #1c2126; --shade: #000000aa; --accent: #6cb6ff;
  --good: #3fb68b; --bad: #f0883e; --idle: #6b7682; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 0 1.25rem 5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
main { min-width: 0; }
h1 { font-size: 2rem; line-height: 1.2; margin: 2.5rem 0 1.25rem; letter-spacing: -.02em; text-wrap: balance; }
h2 { font-size: 1.35rem; margin: 3.25rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--line);
  letter-spacing: -.01em; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h2 a, h3 a { color: inherit; text-decoration: none; }
h2 a:hover::after, h3 a:hover::after { content: " #"; color: var(--quiet); }
a { color: var(--accent); text-underline-offset: .15em; }
p, li { max-width: 48rem; }
li { margin: .3rem 0; }
code { font: .88em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--tint);
  padding: .1em .3em; border-radius: 4px; }
nav { font-size: .9rem; padding-top: 1rem; }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
nav a { color: var(--quiet); text-decoration: none; }
nav a:hover { color: var(--accent); text-decoration: underline; }
.scroll { overflow: auto; max-height: 34rem; margin: 1rem 0; border: 1px solid var(--line); border-radius: 8px;
  scrollbar-width: thin; background: linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100% local,
  linear-gradient(to top, var(--paper) 40%, transparent) 0 100% / 100% 2.5rem local,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / .75rem 100%,
  linear-gradient(to top, var(--shade), transparent) 0 100% / 100% .75rem; background-repeat: no-repeat; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: left; vertical-align: top; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--tint); font-weight: 600; box-shadow: 0 1px var(--line); }
td { border-top: 1px solid var(--line); }
td.long { white-space: normal; min-width: 24rem; overflow-wrap: anywhere; }
tbody tr:first-child td { border-top: 0; }
tbody tr:hover { background: var(--tint); }
.number { text-align: right; }
.bar { display: flex; gap: 2px; height: .6rem; border-radius: 99px; overflow: hidden; margin: 1.25rem 0 .6rem; }
.bar span { min-width: 4px; background: var(--idle); }
.bar .good { background: var(--good); }
.bar .bad { background: var(--bad); }
.tally { list-style: none; padding: 0; margin: 0 0 1.25rem; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; }
.tally li { color: var(--quiet); margin: 0; }
.tally b { font-size: 1.25rem; color: var(--idle); }
.tally .good b { color: var(--good); }
.tally .bad b { color: var(--bad); }
figure { margin: 1.75rem 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: 8px; background: #fff; }
figcaption { color: var(--quiet); font-size: .875rem; margin-top: .5rem; max-width: 48rem; }
.file { font-size: .9rem; color: var(--quiet); margin: .25rem 0; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
@media (prefers-color-scheme: dark) { img { filter: invert(.915) hue-rotate(180deg); } }
@media (min-width: 82rem) {
  body { display: grid; grid-template-columns: 13rem minmax(0, 62rem); gap: 3rem; max-width: 80rem; }
  nav { position: sticky; top: 0; align-self: start; padding-top: 3.2rem; max-height: 100vh; overflow: auto; }
  nav ul { display: block; }
  nav li { margin: .45rem 0; line-height: 1.35; }
}
@media (max-width: 40rem) { body { padding: 0 1rem 3rem; } h1 { font-size: 1.6rem; margin-top: 1.5rem; } }
@media print { nav { display: none; } .scroll { max-height: none; overflow: visible; } }
"""
