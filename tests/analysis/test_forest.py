"""Rows of estimates: intervals that do not end, estimates that do not exist, and lines to compare with."""

import math

import pytest

from moe.analysis.figures.charts import charts
from moe.analysis.figures.forest import Row, forest, leaves_out, short_names


def test_an_interval_without_end_reaches_the_edge_and_an_infinite_estimate_has_no_mark() -> None:
    rows = [
        Row("bounded", 2.0, 1.5, 3.0, decided=True),
        Row("open above", 1.2, 0.5, math.inf, decided=False, text="from 0.50 to ∞"),
        Row("never", math.inf, math.nan, math.nan, decided=False),
    ]
    figure = forest(rows, "times", "marks", zero=1.0)
    found = charts(figure)
    assert found is not None
    [panel] = found["panels"]
    shown = {trace["x"][0]: trace for trace in panel["data"] if "interval_x" in trace}
    assert set(shown) == {2.0, 1.2}, "there is no mark at infinity"
    assert shown[2.0]["interval_x"] == [[1.5, 3.0]]
    assert shown[1.2]["interval_x"] == [[0.5, pytest.approx(3.0 * 1.3)]]
    assert shown[1.2]["text"] == ["from 0.50 to ∞"]
    assert panel["y"]["ticktext"] == ["bounded", "open above", "never"]
    assert panel["x"]["type"] == "log"


def test_lines_have_an_entry_in_the_legend_and_an_interval_decides_if_it_leaves_out_0() -> None:
    rows = [
        Row("a", 0.5, 0.1, 0.9, decided=leaves_out(0.1, 0.9)),
        Row("b", 0.5, -1.0, 2.0, decided=leaves_out(-1.0, 2.0)),
    ]
    [axes] = (figure := forest(rows, "difference", "marks", lines={"limit": 0.7})).axes
    assert [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"][1] == "white"
    assert [legend.get_texts()[0].get_text() for legend in figure.legends] == ["limit"]
    assert not leaves_out(math.nan, math.nan)
    assert leaves_out(-0.9, -0.2)


def test_names_of_rows_that_differ_look_different() -> None:
    start, end = "a=1, " * 30, ", z=1" * 30
    short = short_names(["topk", f"{start}b", f"{start}c", "topk", f"{start}b=1{end}", f"{start}b=2{end}"])
    assert short[0] == short[3] == "topk"
    assert len({*short}) == 5
    assert [len(name) for name in short[1:3]] == [89, 89], "the ends tell them apart"
    assert [" ".join(name.split()) for name in short[4:]] == [f"{start}b=1{end}", f"{start}b=2{end}"]
