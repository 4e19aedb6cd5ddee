"""Tests of the charts of a page: they show the values that the figure of matplotlib shows."""

import json
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from moe.analysis.figures.charts import charts
from moe.analysis.figures.curves import draw_runs
from moe.analysis.figures.marks import with_hover
from moe.analysis.figures.style import line_style, shared_legend


def chart(figure: Figure) -> dict[str, Any]:
    """Return the charts of a figure. They are JSON."""
    found = charts(figure)
    assert found is not None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_lines_points_and_intervals_keep_their_values_and_join_their_entry_of_the_legend() -> None:
    """A thin line without a label belongs to the entry of its color; a line with another dash to another entry."""
    figure = Figure()
    axes = figure.subplots()
    [thin] = axes.plot([1, 2, 3], [4.0, np.nan, 6.0], color="#0072B2", linewidth=0.5)
    with_hover(thin, ["seed 1"] * 3)
    axes.plot([1, 2, 3], [5, 5, 5], color="#0072B2", label="a")
    axes.plot([1, 2, 3], [7, 7, 7], color="#0072B2", linestyle="--", label="b")
    axes.errorbar([2], [8.0], yerr=[[1.0], [2.0]], fmt="s", color="#D55E00", label="c")
    axes.errorbar([3], [9.0], yerr=[[np.nan], [np.nan]], fmt="s", color="#009E73", label="d")  # one seed
    axes.axhline(3, color="black")
    axes.set(xlabel="step", ylabel="loss", xlim=(0, 4), ylim=(2, 12))
    shared_legend(figure, "what the marks mean")
    found = chart(figure)
    [panel] = found["panels"]
    interval, alone, first, second, third = panel["data"]
    assert (alone["y"], alone["interval_y"]) == ([9.0], [[None, None]])
    assert (first["name"], first["y"], first["text"]) == ("a", [4.0, None, 6.0], ["seed 1"] * 3)
    assert (second["name"], second["mode"], third["name"]) == ("a", "lines", "b")
    assert (interval["name"], interval["y"], interval["interval_y"]) == ("c", [8.0], [[7.0, 10.0]])
    assert (interval["error_y"]["array"], interval["error_y"]["arrayminus"]) == ([2.0], [1.0])
    assert panel["shapes"][0]["y0"] == panel["shapes"][0]["y1"] == 3
    assert panel["shapes"][0]["line"]["color"] == "ink", "black becomes white on a dark page"
    assert (panel["x"]["title"], panel["x"]["range"], panel["y"]["range"]) == ("step", [0, 4], [2, 12])
    assert [entry["name"] for entry in found["legend"]] == ["a", "b", "c", "d"]
    assert [entry.get("dash") for entry in found["legend"]] == ["solid", "dash", None, None]
    assert found["notes"] == ["what the marks mean"]


def test_runs_are_one_line_with_gaps_in_the_order_of_their_steps_and_each_point_names_its_seed() -> None:
    columns = {"folder": list("baabab"), "seed": [7, 1, 1, 7, 1, 7], "step": [1, 2, 1, 2, 3, 3]}
    events = pd.DataFrame(columns | {"loss": [5.0, 2.0, None, 6.0, 3.0, None]})
    figure = Figure()
    axes = figure.subplots()
    draw_runs(axes, events, "loss", {"color": "#0072B2"})
    axes.plot([1, 2, 3], [4.0, 4.0, 4.0], color="#0072B2", label="mean")
    [panel] = chart(figure)["panels"]
    runs = panel["data"][0]
    assert runs["x"] == [1, 2, None, 2, 3, None]
    assert runs["y"] == [5, 6, None, 2, 3, None]
    assert runs["text"] == ["seed 7", "seed 7", "", "seed 1", "seed 1", ""]
    draw_runs(axes, events[:0], "loss", {})  # no run has a value


def test_bars_heatmaps_and_bands_keep_their_values() -> None:
    figure = Figure()
    bars, heat, band = figure.subplots(1, 3)
    bars.bar([0, 1], [3.0, -1.0], 0.5)
    values = np.ma.masked_invalid([[0.0, 0.5, 1.0], [np.nan, 0.25, 0.75]])
    heat.imshow(values, vmin=0, vmax=1, aspect="auto")
    heat.set_yticks([0, 1], ["x", "y"])
    band.fill_between([0, 1, 2], [0, 1, 0], [1, 2, 1])
    band.fill_between([0, 1, 2], [np.nan] * 3, [np.nan] * 3)  # no seed differs: nothing is drawn
    panels = chart(figure)["panels"]
    [drawn] = panels[0]["data"]
    assert (drawn["x"], drawn["y"], drawn["width"]) == ([0, 1], [3, -1], [0.5, 0.5])
    [drawn] = panels[1]["data"]
    assert drawn["z"] == [[0, 0.5, 1], [None, 0.25, 0.75]]
    assert (drawn["x0"], drawn["dx"], drawn["y0"], drawn["dy"]) == (0, 1, 0, 1)
    assert panels[1]["y"]["ticktext"] == ["x", "y"]
    assert panels[1]["y"]["range"] == [1.5, -0.5], "the first row is at the top"
    [drawn] = panels[2]["data"]
    assert {(x, y) for x, y in zip(drawn["x"], drawn["y"], strict=True) if x is not None} >= {(1, 1), (1, 2), (2, 0)}


def test_values_beyond_the_scale_of_colors_have_its_last_color_and_missing_ones_their_own() -> None:
    """matplotlib's norm of two slopes gives infinity above its range, which JSON does not have."""
    figure = Figure()
    panels = figure.subplots(1, 2)
    colors = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#b0b0b0")
    for axes in panels:
        values = np.ma.masked_invalid([[0.0, 1.0, 3.0, 8.0, np.nan]])
        image = axes.imshow(values, cmap=colors, norm=TwoSlopeNorm(1, vmin=0, vmax=3))
    figure.colorbar(image, ax=panels, extend="max", label="share,\ntimes chance", ticks=[0, 1, 3])
    figure.supxlabel("expert")
    found = chart(figure)
    [drawn] = found["panels"][0]["data"]
    assert (drawn["z"], drawn["text"]) == ([[0, 0.5, 1, 1, None]], [["0", "1", "3", "8", "none"]])
    assert drawn["missing"] == "#b0b0b0"
    [scale] = found["scales"]
    assert (scale["places"], scale["texts"]) == ([0, 0.5, 1], ["0", "1", "3 or more"])
    assert (scale["name"], scale["missing"]) == ("share, times chance", "#b0b0b0")
    assert scale["colors"] == [color for _, color in drawn["colorscale"]]
    assert found["panels"][0]["x"]["title"] == "expert"
    assert found["notes"] == [], "no text stands twice"


def test_scales_and_ticks_are_those_of_the_figure() -> None:
    """A symmetrical logarithmic axis, which plotly.js does not have, keeps its places and shows the true values."""
    figure = Figure()
    log, symlog, names = figure.subplots(1, 3)
    log.plot([1, 10, 100], [1, 2, 3])
    log.set_xscale("log")
    log.set_xlim(1, 100)
    log.set_xticks([5, 50], ["five", "fifty"])
    symlog.plot([0.0, 0.01, 1.0], [1, 2, 3])
    symlog.set_xscale("symlog", linthresh=0.01)
    names.plot([0, 1], [1, 2])
    names.set_xticks([0, 1], ["topk", "hash"])
    first, second, third = chart(figure)["panels"]
    assert (first["x"]["type"], first["x"]["range"], first["data"][0]["x"]) == ("log", [0, 2], [1, 10, 100])
    assert (first["x"]["tickvals"], first["x"]["ticktext"]) == ([5, 50], ["five", "fifty"])
    assert second["data"][0]["shown_x"] == [0.0, 0.01, 1.0]
    assert second["data"][0]["x"] != second["data"][0]["shown_x"]
    assert (third["x"]["tickvals"], third["x"]["ticktext"]) == ([0, 1], ["topk", "hash"])


def test_tables_and_texts_are_no_pictures() -> None:
    figure = Figure()
    table, text = figure.subplots(1, 2)
    table.axis("off")
    table.table([["a", "1"]], colLabels=["name", "value"])
    text.axis("off")
    text.text(0, 1, "in words")
    panels = chart(figure)["panels"]
    assert panels[0]["table"] == [["name", "value"], ["a", "1"]]
    assert panels[1]["text"] == "in words"


@pytest.mark.parametrize("draw", ["pie", "quiver", "contour"])
def test_a_figure_with_a_mark_that_charts_do_not_have_stays_a_picture(draw: str) -> None:
    figure = Figure()
    arguments = {"pie": [[1, 2]], "quiver": [[1], [1], [1], [1]], "contour": [[[1, 2], [3, 4]]]}[draw]
    getattr(figure.subplots(), draw)(*arguments)
    assert charts(figure) is None


def test_more_conditions_than_colors_keep_their_own_names() -> None:
    """The ninth condition has the color of the first. A run belongs to the mean that is drawn after it."""
    figure = Figure()
    axes = figure.subplots()
    for number in range(10):
        style = line_style(number)
        axes.plot([0, 1], [number, number], color=style["color"], linewidth=0.5)
        look = {"color": style["color"], "linestyle": style["linestyle"]}
        axes.plot([0, 1], [number, number], label=f"condition {number}", **look)
    shared_legend(figure, "")
    traces = chart(figure)["panels"][0]["data"]
    assert [trace["name"] for trace in traces] == [f"condition {number}" for number in range(10) for _ in range(2)]


def test_a_whole_number_keeps_all_its_digits() -> None:
    figure = Figure()
    figure.subplots().plot([1234567, 1234568], [0.123456789, 1.0])
    [trace] = chart(figure)["panels"][0]["data"]
    assert (trace["x"], trace["y"][0]) == ([1234567, 1234568], 0.123457)
