"""Sphinx builds these pages as a site, without a network: `python -m sphinx -W docs build/docs`."""

import base64
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import mmdr
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

project = "moe-routing"
copyright = "the authors of moe-routing"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
root_doc = "index"
exclude_patterns = ["example-report"]
myst_heading_anchors = 4
LOOK = '%%{init: {"theme": "neutral", "themeVariables": {"fontFamily": "arial, sans-serif"}}}%%\n'  # of diagrams
html_theme = "furo"
html_title = "moe-routing"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_use_index = False


def setup(app: Sphinx) -> None:
    """Add what Sphinx does not do by itself."""
    app.connect("source-read", list_of_pages)
    app.connect("source-read", notebook_as_markdown)
    app.connect("doctree-read", draw_diagrams)
    app.connect("doctree-read", link_to_files, priority=400)  # before Sphinx collects downloads
    app.connect("build-finished", copy_report)


def list_of_pages(app: Sphinx, page: str, content: list[str]) -> None:
    """Fill the menu with the links of index.md, section by section."""
    if page == root_doc:
        for section in content[0].split("\n## ")[1:]:
            pages = "\n".join(re.findall(r"\]\(([\w/-]+)\.(?:md|ipynb)\)", section))
            content[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {section.splitlines()[0]}\n\n{pages}\n```\n"


def notebook_as_markdown(app: Sphinx, page: str, content: list[str]) -> None:
    """Replace a notebook by its texts, its code and the outputs that are saved in it."""
    if Path(app.env.doc2path(page)).suffix == ".ipynb":
        parts = []
        for cell in json.loads(content[0])["cells"]:
            text = "".join(cell["source"])
            parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
            parts += [_shown(output) for output in cell.get("outputs", ())]
        content[0] = "\n\n".join(parts)


def _shown(output: dict[str, Any]) -> str:
    data = {kind: "".join(text) for kind, text in output.get("data", {"text/plain": output.get("text", "")}).items()}
    if "image/png" in data:
        picture = data["image/png"].replace("\n", "")
        return f'```{{raw}} html\n<img alt="output of the cell above" src="data:image/png;base64,{picture}">\n```'
    if "text/html" in data:
        return f'```{{raw}} html\n<div class="output">{data["text/html"]}</div>\n```'
    return f"```text\n{data['text/plain']}\n```"


def draw_diagrams(app: Sphinx, page: nodes.document) -> None:
    """Replace the text of each Mermaid diagram by its picture, which a browser shows without a script."""
    for node in list(page.findall(nodes.literal_block)):
        if node.get("language") == "mermaid":
            text = node.astext()
            picture = mmdr.render(LOOK + text).svg()
            width = re.search(r'viewBox="\S+ \S+ (\S+)', picture)[1]
            data = base64.b64encode(picture.encode()).decode()
            alt = html.escape(" ".join(text.split()))
            image = f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}" style="--width: {float(width):.0f}px">'
            node.replace_self(nodes.raw("", f'<div class="diagram" tabindex="0">{image}</div>', format="html"))


def link_to_files(app: Sphinx, page: nodes.document) -> None:
    """Let a link to a file that is no page lead to the same place as in docs/, so that the report finds its figures."""
    for node in list(page.findall(addnodes.download_reference)):
        node.replace_self(nodes.reference("", "", *node.children, refuri=node["reftarget"]))


def copy_report(app: Sphinx, error: Exception | None) -> None:
    """Copy the report that the pages link to."""
    if error is None:
        shutil.copytree(Path(app.srcdir) / "example-report", Path(app.outdir) / "example-report", dirs_exist_ok=True)
