"""Read the marks of a matplotlib figure as traces of plotly.js: lines, points, intervals, bands, bars and heatmaps."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import Colormap, to_hex, to_rgba
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Text

Trace = dict[str, Any]  # as plotly.js takes it
AnyArtist = TypeVar("AnyArtist", bound=Artist)

PIXELS = 4 / 3  # in a point of matplotlib
SYMBOLS = {"o": "circle", ".": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "_": "line-ew-open"}
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
STOPS = 21  # colors of a scale that are named; those between them are mixed
STEPS = {"default": "linear", "steps": "vh", "steps-pre": "vh", "steps-post": "hv", "steps-mid": "hvh"}
BANDS = ("PolyCollection", "FillBetweenPolyCollection")  # other classes derived from these are arrows and barbs
NAMED_COLORS = {"#000000": "ink", "#ffffff": "paper"}  # a dark page exchanges them

_TEXTS: WeakKeyDictionary[Artist, list[str]] = WeakKeyDictionary()
_GROUPS: WeakKeyDictionary[Artist, str] = WeakKeyDictionary()


class NoChartError(Exception):
    """Raised for a mark that charts do not have."""


def with_hover(artist: AnyArtist, texts: Iterable[Any]) -> AnyArtist:
    """Give each point of an artist a text, such as the name of its run, which the page shows beside the values."""
    _TEXTS[artist] = [str(text) for text in texts]
    return artist


def in_group(artist: AnyArtist, label: str) -> AnyArtist:
    """Say to which entry of the legend an artist belongs that has no label of its own."""
    _GROUPS[artist] = label
    return artist


def stops(colors: Colormap) -> list[str]:
    """Return the colors of a scale at even distances, from its lowest to its highest value."""
    return [to_hex(colors(stop)) for stop in np.linspace(0, 1, STOPS)]


def color_of_missing(colors: Colormap) -> dict[str, str]:
    """Return the color of cells without a value, if they have one."""
    red, green, blue, alpha = colors.get_bad()
    return {"missing": to_hex((red, green, blue))} if alpha else {}


def style_of(handle: Any) -> Trace:
    """Return color, dash and symbol of an entry of the legend. Raises NoChartError for one that charts do not have."""
    match handle:
        case ErrorbarContainer():
            return style_of(handle.lines[0] or handle.lines[2][0])
        case BarContainer():
            return {"color": _color(handle.patches[0].get_facecolor()), "symbol": "square"}
        case Line2D():
            dash = DASHES.get(str(handle.get_linestyle()))
            style = {"color": _color(handle.get_color())} | ({"dash": dash} if dash else {})
            return style | ({"symbol": _symbol(handle)} if _has_marker(handle) else {})
        case PathCollection():
            return {"color": _color(handle.get_facecolor()[0]), "symbol": "circle"}
        case LineCollection():
            return {"color": _color(handle.get_color()[0]), "dash": "solid"}
    raise NoChartError


def placed(axis: Axis, values: Any) -> Any:
    """Return where values lie on an axis with a scale that is not logarithmic."""
    return axis.get_transform().transform(np.asarray(values, dtype=float))


def traces(axes: Axes, apart: set[Artist]) -> Iterator[tuple[Trace, str]]:
    """Yield each mark that is not `apart` as a trace, with its label, which is empty if the mark has none."""
    parts, owners = set(apart), _owners(axes)
    for container in axes.containers:
        label = str(container.get_label())
        match container:
            case ErrorbarContainer():
                line, caps, bars = container.lines
                parts |= {*caps, *bars, *([line] if line else [])}
                yield _errorbar(line, list(bars), container), _group(line, owners, label) if line else label
            case BarContainer():
                parts |= set(container.patches)
                yield _bars(container), label
            case _:
                raise NoChartError
    for artist in (*axes.lines, *axes.collections, *axes.images, *axes.patches):
        if artist in parts:
            continue
        label = _group(artist, owners, str(artist.get_label()))
        match artist:
            case Line2D():
                yield _line(artist), label
            case PathCollection():
                yield _points(artist), label
            case PolyCollection() if type(artist).__name__ in BANDS:
                if artist.get_paths():  # a band has none where the values of all seeds are equal
                    yield _band(artist), label
            case AxesImage():
                yield _heatmap(artist), label
            case _:
                raise NoChartError


def _group(artist: Artist, owners: dict[Artist, str], label: str) -> str:
    """Return the entry of the legend to which an artist belongs: the one that it was given, or that of its owner."""
    return _GROUPS.get(artist) or owners.get(artist, label)


def _owners(axes: Axes) -> dict[Artist, str]:
    """Return the label of each line that has none of its own: that of the next line of its color that has one.

    Runs are drawn before the mean of their condition. A color alone may stand for several conditions.
    """
    labels = {each.lines[0]: str(each.get_label()) for each in axes.containers if isinstance(each, ErrorbarContainer)}
    owners: dict[Artist, str] = {}
    waiting: dict[str, list[Artist]] = {}
    for line in axes.lines:
        label, color = labels.get(line, str(line.get_label())), _color(line.get_color())
        if label.startswith("_"):
            waiting.setdefault(color, []).append(line)
        else:
            owners |= dict.fromkeys(waiting.pop(color, []), label)
    return owners


def _line(line: Line2D) -> Trace:
    color, dash, marked = _color(line.get_color()), DASHES.get(str(line.get_linestyle())), _has_marker(line)
    drawn = dash is not None
    x, y = line.get_data(orig=False)
    trace: Trace = {
        "type": "scatter",
        "x": as_numbers(x),
        "y": as_numbers(y),
        "mode": "+".join(["lines"] * drawn + ["markers"] * marked) or "lines",
        "opacity": line.get_alpha() or 1,
        "color": color,
    }
    if drawn:
        shape = STEPS[line.get_drawstyle()]
        trace["line"] = {
            "color": color,
            "width": line.get_linewidth() * PIXELS,
            "dash": dash,
            "shape": shape,
        }
    if marked:
        trace["marker"] = _marker(line)
    return trace | _texts_of(line)


def _errorbar(line: Line2D | None, bars: list[LineCollection], container: ErrorbarContainer) -> Trace:
    """Return means with the two ends of their intervals."""
    kinds = ["x"] * container.has_xerr + ["y"] * container.has_yerr
    # `get_segments` would leave out ends that are NaN.
    ends = {kind: np.array([path.vertices for path in bar.get_paths()]) for kind, bar in zip(kinds, bars, strict=True)}
    color = _color(bars[0].get_color()[0])
    if line is None:  # intervals of marks that are drawn apart, such as bars
        [(kind, middle)] = [(kind, ends[kind].mean(axis=1)) for kind in kinds[:1]]
        trace: Trace = {"type": "scatter", "mode": "markers", "marker": {"opacity": 0, "color": color}, "color": color}
        x, y = middle.T
        trace |= {"x": as_numbers(x), "y": as_numbers(y), "hoverinfo": "skip"}
    else:
        trace = _line(line)
        x, y = line.get_data(orig=False)
    for kind, segments in ends.items():
        along, column = (x, 0) if kind == "x" else (y, 1)
        known = np.asarray(along, dtype=float)
        low, high = segments[:, 0, column], segments[:, 1, column]
        trace[f"error_{kind}"] = {
            "array": as_numbers(high - known),
            "arrayminus": as_numbers(known - low),
            "color": color,
            "thickness": 1.5,
            "width": 4,
        }
        trace[f"interval_{kind}"] = [as_numbers(pair) for pair in zip(low, high, strict=True)]
    return trace


def _points(points: PathCollection) -> Trace:
    x, y = np.ma.filled(np.ma.asarray(points.get_offsets(), dtype=float), np.nan).T
    face = points.get_facecolor()
    size = float(np.sqrt(np.mean(points.get_sizes())))
    marker = {"color": [_color(each) for each in face] if len(face) > 1 else _color(face[0]), "size": size * PIXELS}
    return {
        "type": "scatter",
        "x": as_numbers(x),
        "y": as_numbers(y),
        "mode": "markers",
        "marker": marker,
        "opacity": points.get_alpha() or 1,
        "color": _color(face[0]),
    } | _texts_of(points)


def _band(band: PolyCollection) -> Trace:
    """Return the area between two curves."""
    corners = np.concatenate([np.r_[path.vertices, [[math.nan] * 2]] for path in band.get_paths()])
    color = np.asarray(band.get_facecolor(), dtype=float)[0]
    red, green, blue, alpha = color
    return {
        "type": "scatter",
        "x": as_numbers(corners[:, 0]),
        "y": as_numbers(corners[:, 1]),
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": f"rgba({255 * red:.0f},{255 * green:.0f},{255 * blue:.0f},{alpha:.2g})",
        "hoverinfo": "skip",
        "color": _color(color),
    }


def _bars(container: BarContainer) -> Trace:
    patches = container.patches
    color = _color(patches[0].get_facecolor())
    flat = container.orientation == "horizontal"
    centers = [p.get_y() + p.get_height() / 2 if flat else p.get_x() + p.get_width() / 2 for p in patches]
    lengths = [p.get_width() if flat else p.get_height() for p in patches]
    return {
        "type": "bar",
        "orientation": "h" if flat else "v",
        "x": as_numbers(lengths if flat else centers),
        "y": as_numbers(centers if flat else lengths),
        "base": as_numbers([p.get_x() if flat else p.get_y() for p in patches]),
        "width": as_numbers([p.get_height() if flat else p.get_width() for p in patches]),
        "marker": {"color": color},
        "color": color,
    }


def _heatmap(image: AxesImage) -> Trace:
    """Return an image of values as a heatmap. Its colors are those of the values after the norm of the image.

    Values outside of the norm have the color of its nearest end. The page shows "none" for a missing value.
    """
    values = np.ma.filled(np.ma.asarray(image.get_array()).astype(float), np.nan)
    if values.ndim != 2:
        raise NoChartError
    left, right, bottom, top = image.get_extent()
    rows, columns = values.shape
    places: np.ndarray = np.clip(np.ma.filled(np.ma.asarray(image.norm(values)), np.nan), 0, 1)
    colors = image.get_cmap()
    return {
        "type": "heatmap",
        "x0": left + (right - left) / columns / 2,
        "dx": (right - left) / columns,
        "y0": top - (top - bottom) / rows / 2,
        "dy": (bottom - top) / rows,
        "z": [as_numbers(row) for row in places],
        "text": [["none" if math.isnan(value) else f"{value:.4g}" for value in row] for row in values],
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[place / (STOPS - 1), color] for place, color in enumerate(stops(colors))],
        "showscale": False,
    } | color_of_missing(colors)


def straight_line(axes: Axes, line: Line2D) -> Trace | None:
    """Return a line across the whole panel, from `axhline` or `axvline`, as a shape; None for other lines."""
    along_data = line.get_transform().contains_branch_seperately(axes.transData)
    if all(along_data):
        return None
    if not any(along_data):
        raise NoChartError
    x, y = (np.asarray(values, dtype=float) for values in line.get_data(orig=False))
    dash = DASHES.get(str(line.get_linestyle()), "solid")
    shape: Trace = {"type": "line", "x0": float(x[0]), "x1": float(x[-1]), "y0": float(y[0]), "y1": float(y[-1])}
    shape |= {"xref": "x" if along_data[0] else "x domain", "yref": "y" if along_data[1] else "y domain"}
    return shape | {"line": {"color": _color(line.get_color()), "width": line.get_linewidth() * PIXELS, "dash": dash}}


def annotation(axes: Axes, text: Text) -> Trace:
    """Return a text at its place in a panel."""
    x, y = text.get_position()
    inside = all(text.get_transform().contains_branch_seperately(axes.transData))
    xref, yref = ("x", "y") if inside else ("x domain", "y domain")
    return {
        "text": text.get_text(),
        "x": x,
        "y": y,
        "xref": xref,
        "yref": yref,
        "showarrow": False,
        "font": {"size": round(float(text.get_fontsize()) * PIXELS), "color": _color(text.get_color())},
    }


def _has_marker(line: Line2D) -> bool:
    return line.get_marker() not in ("", " ", "None", "none", None)


def _symbol(line: Line2D) -> str:
    return SYMBOLS.get(str(line.get_marker()), "circle")


def _marker(line: Line2D) -> Trace:
    """Return symbol, size and colors of a line's points. matplotlib draws "." at half of its size."""
    size = line.get_markersize() * PIXELS * (0.5 if line.get_marker() == "." else 1)
    edge = {"color": _color(line.get_markeredgecolor()), "width": 1.5}
    return {"symbol": _symbol(line), "size": size, "color": _color(line.get_markerfacecolor()), "line": edge}


def _texts_of(artist: Artist) -> Trace:
    return {"text": _TEXTS[artist]} if artist in _TEXTS else {}


def _color(color: Any) -> str:
    name = to_hex(to_rgba(color)[:3])
    return NAMED_COLORS.get(name, name)


def as_numbers(values: Any) -> list[float | None]:
    """Return numbers with six significant digits, and None for those that JSON does not have."""
    numbers = np.asarray(values, dtype=float)
    return [_short(value) if math.isfinite(value) else None for value in numbers.tolist()]


def _short(value: float) -> float:
    """Return a number with six significant digits; whole numbers, such as steps, keep all of theirs."""
    return value if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")
