"""Turn a figure of matplotlib into charts for a web page, whose marks show their values.

A figure is drawn once, with matplotlib. `charts` reads its marks: lines, points, intervals, bands, bars, heatmaps,
texts and tables. So a figure that somebody adds becomes charts too. The page draws them with plotly.js, each panel of
the figure as a chart of its own, so that panels can stand below each other on a narrow screen.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from moe.analysis.figures.marks import (
    NoChartError,
    Trace,
    annotation,
    as_numbers,
    color_of_missing,
    placed,
    stops,
    straight_line,
    style_of,
    traces,
)

HEIGHT = 78  # pixels of a chart for an inch of its figure


def charts(figure: Figure) -> dict[str, Any] | None:
    """Return panels, legend, scales of colors and notes of a figure as JSON values for the script of the page.

    Returns None if a panel has a mark that charts do not have. The page then shows the picture itself.
    """
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]
    styles = _legend(shown)
    try:
        panels = [_panel(axes, figure, styles) for axes in shown]
    except NoChartError:
        return None
    boxes = [legend for legend in (*figure.legends, *(axes.get_legend() for axes in shown)) if legend]
    notes = [_one_line(figure.get_suptitle()), *(_one_line(legend.get_title().get_text()) for legend in boxes)]
    below = _one_line(figure.get_supxlabel())
    if all(panel.get("x", {}).get("title") != below for panel in panels):  # otherwise each panel shows it at its axis
        notes.append(below)
    entries = [{"name": name, **style} for name, style in styles.items()] if boxes else []
    bars = [image.colorbar for axes in shown for image in axes.images if image.colorbar]
    scales = [_scale(bar) for bar in bars]
    return {"panels": panels, "legend": entries, "scales": scales, "notes": list(filter(None, notes))}


def _scale(bar: Colorbar) -> dict[str, Any]:
    """Return what the colors of images mean: colors at even distances, values with their places, and a name."""
    norm, axis = bar.norm, bar.ax.yaxis if bar.orientation == "vertical" else bar.ax.xaxis
    low, high = sorted(axis.get_view_interval())
    values = [value for value in axis.get_majorticklocs() if low <= value <= high]
    texts = axis.get_major_formatter().format_ticks(values)
    if bar.extend in ("max", "both") and values and values[-1] == high:
        texts[-1] += " or more"
    name = _one_line(axis.get_label_text())
    missing = color_of_missing(bar.cmap)
    return {"colors": stops(bar.cmap), "places": as_numbers(norm(values)), "texts": texts, "name": name} | missing


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _legend(panels: list[Axes]) -> dict[str, Trace]:
    """Return color, dash and symbol of each label."""
    styles: dict[str, Trace] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            styles.setdefault(label, style_of(handle))
    return styles


def _panel(axes: Axes, figure: Figure, styles: dict[str, Trace]) -> dict[str, Any]:
    """Return a panel as traces and axes of a chart, or as a table or a text, if that is all it shows."""
    title = " ".join(filter(None, (axes.get_title("left"), axes.get_title())))
    if axes.tables:
        rows: dict[int, list[str]] = {}
        for (row, _), cell in sorted(axes.tables[0].get_celld().items()):
            rows.setdefault(row, []).append(cell.get_text().get_text())
        return {"title": title, "table": list(rows.values())}
    if not axes.axison:
        if len(axes.texts) != 1 or axes.has_data():
            raise NoChartError
        return {"title": title, "text": axes.texts[0].get_text()}
    place = axes.get_subplotspec()
    rows_of_panels = place.get_topmost_subplotspec().get_gridspec().nrows if place else 1
    straight = {line: shape for line in axes.lines if (shape := straight_line(axes, line))}
    data = [_named(trace, group, styles) for trace, group in traces(axes, apart=set(straight))]
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if axis.get_scale() == "symlog":  # which the page does not have: draw at the places, show the values
            for trace in data:
                trace[f"shown_{name}"], trace[name] = trace[name], as_numbers(placed(axis, trace[name]))
    return {
        "title": title,
        "data": data,
        "x": _axis(axes, axes.xaxis, figure.get_supxlabel()),
        "y": _axis(axes, axes.yaxis, figure.get_supylabel()),
        "shapes": list(straight.values()),
        "annotations": [annotation(axes, text) for text in axes.texts if text.get_text()],
        "height": round(max(280, (figure.get_figheight() - 0.8) / rows_of_panels * HEIGHT)),
    }


def _axis(axes: Axes, axis: Axis, label_of_figure: str) -> dict[str, Any]:
    """Return label, scale, range and ticks of an axis."""
    name, scale = str(axis.axis_name), axis.get_scale()  # type: ignore[attr-defined]
    if scale not in ("linear", "log", "symlog"):
        raise NoChartError
    together = getattr(axes, f"get_shared_{name}_axes")().get_siblings(axes)
    labels = [getattr(each, f"get_{name}label")() for each in (axes, *together)]
    bounds = getattr(axes, f"get_{name}lim")()
    found: dict[str, Any] = {
        "title": _one_line(next(filter(None, labels), label_of_figure)),
        "type": "log" if scale == "log" else "linear",
        "range": as_numbers(np.log10(bounds) if scale == "log" else placed(axis, bounds)),
    }
    places = [place for place in axis.get_majorticklocs() if min(bounds) <= place <= max(bounds)]
    if places and (scale == "symlog" or isinstance(axis.get_major_locator(), FixedLocator)):
        texts = axis.get_major_formatter().format_ticks(places)
        found |= {"tickvals": as_numbers(places if scale == "log" else placed(axis, places)), "ticktext": texts}
    return found


def _named(trace: Trace, label: str, styles: dict[str, Trace]) -> Trace:
    """Give a trace the name of its entry in the legend: its own label, or that of the entry with its color and dash."""
    if label.startswith("_"):
        color, dash = trace.pop("color", None), trace.get("line", {}).get("dash")
        same = [name for name, style in styles.items() if style["color"] == color]
        label = next((name for name in same if styles[name].get("dash") == dash), same[0] if same else "")
    trace.pop("color", None)
    return trace | {"name": label}
