"""Figures of single experts: what each prefers, and the loss without it. A row is a run, a column is a layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from moe.analysis.figures.style import MARKER_SHAPES, PALETTE, RC

MAX_RUNS, MAX_LAYERS = 4, 6  # rows and columns of panels in a figure that is as wide as a report
KEYWORDS_SHOWN = 5
CHANCE = TwoSlopeNorm(1, vmin=0, vmax=3)  # of multiples of chance: white at 1, darkest from 3 on
COSINE = Normalize(-1, 1)  # white at 0


class MeasuredRun(NamedTuple):
    """A run with its condition (all factors but the seed), its seed, and what was measured (`moe.runs.measured`)."""

    condition: str
    seed: int
    found: dict[str, Any]


@matplotlib.rc_context(RC)
def expert_domains(runs: list[MeasuredRun]) -> Figure:
    """Draw P(expert | domain) as a multiple of an even share; 1 is no preference."""
    names = runs[0].found["domains"]
    tables = _even_shares("given_domain")
    return _heatmaps(runs, tables, rows=("domain", names), title="share of a domain's assignments,\ntimes chance")


@matplotlib.rc_context(RC)
def expert_positions(runs: list[MeasuredRun]) -> Figure:
    """Draw P(expert | decile of the position in the sequence) as a multiple of an even share."""
    names = [str(decile + 1) for decile in range(len(runs[0].found["given_position"][0]))]
    title = "share of a position's assignments,\ntimes chance"
    return _heatmaps(runs, _even_shares("given_position"), rows=("decile of the position", names), title=title)


@matplotlib.rc_context(RC)
def expert_coactivation(runs: list[MeasuredRun]) -> Figure:
    """Draw how often an expert's tokens chose another expert too, as a multiple of chance.

    The runs must have more than one expert per token.
    """

    def to_chance(found: dict[str, Any]) -> list[np.ndarray]:
        chances = zip(found["coactivation"], found["coactivation_chance"], strict=True)
        return [to_array(table) / (chance or np.nan) for table, chance in chances]

    title = "tokens shared with another expert,\ntimes chance"
    return _heatmaps(runs, to_chance, rows=("expert", None), title=title)


@matplotlib.rc_context(RC)
def expert_transitions(runs: list[MeasuredRun]) -> Figure:
    """Draw how often tokens of an expert take each expert of the next layer, as a multiple of chance.

    The runs must have more than one layer.
    """
    names = [f"from layer {layer} to {layer + 1}" for layer in range(len(runs[0].found["next_layer"]))]
    rows, title = ("expert", None), "tokens that go from expert to expert,\ntimes chance"
    return _heatmaps(
        runs,
        lambda found: [to_array(entry["transitions"]) for entry in found["next_layer"]],
        rows=rows,
        title=title,
        columns="expert of the next layer",
        panels=names,
    )


@matplotlib.rc_context(RC)
def expert_similarity(runs: list[MeasuredRun], what: str) -> Figure:
    """Draw the cosines of each two experts of a layer. what: "outputs" on the same tokens, or "weights"."""
    words = {"outputs": "outputs on the same tokens", "weights": "first matrices, as stored"}[what]
    return _heatmaps(
        runs,
        lambda found: [to_array(table) for table in found["similarity"][what]],
        rows=("expert", None),
        title=f"cosine of two experts'\n{words}",
        norm=COSINE,
    )


@matplotlib.rc_context(RC)
def expert_knockouts(runs: list[MeasuredRun]) -> Figure:
    """Draw the rise of the loss without each expert, with intervals over documents.

    Either its tokens go to other experts, or its output becomes zero. A dash marks the rise when equally many random
    assignments are removed instead.
    """
    figure, panels, layers = _grid(runs, height=2.0)
    for row, run in zip(panels, runs, strict=False):
        for axes, layer in zip(row, layers, strict=True):
            for index, (method, found) in enumerate(run.found["knockout"].items()):
                mean, low, high = (to_array(found["delta"][name][layer]) for name in ("mean", "low", "high"))
                x = np.arange(len(mean)) + 0.4 * index - 0.2
                axes.bar(x, mean, 0.38, color=PALETTE[index], label=f"{method}, 95 % bootstrap over documents")
                axes.errorbar(x, mean, [mean - low, high - mean], fmt="none", ecolor="#404040", elinewidth=0.9)
                null = to_array(found["null"]["mean"][layer])
                label = "as many random assignments instead" if index == 0 else None
                axes.plot(x, null, "_", color="black", markersize=7, markeredgewidth=1.6, label=label)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set_xticks(range(len(mean)))
            axes.grid(visible=False, axis="x")
    for axes in panels[-1]:
        axes.set_xlabel("expert")
    figure.supylabel("rise of the loss without it\n(nats per token)", fontsize="medium")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    return figure


@matplotlib.rc_context(RC)
def expert_embeddings(run: MeasuredRun) -> Figure | str:
    """Draw experts as points in two dimensions, by PCA and t-SNE of their outputs on the same tokens.

    Each layer has a color, and each point the number of its expert. Returns the reason as text if there are too few
    experts.
    """
    found = run.found["embedding"]
    if found is None:
        return "fewer than four experts in all"
    figure = Figure(figsize=(10.4, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    explained = [100 * share for share in found["explained"]]
    names = (f"component 1 ({explained[0]:.0f} % of variance)", f"component 2 ({explained[1]:.0f} %)")
    for axes, name, labels in ((left, "pca", names), (right, "tsne", ("t-SNE 1", "t-SNE 2"))):
        for layer, points in enumerate(map(to_array, found[name])):
            point_style = {"color": PALETTE[layer % len(PALETTE)], "marker": MARKER_SHAPES[layer % len(MARKER_SHAPES)]}
            axes.scatter(*points.T, s=140, alpha=0.35, label=f"layer {layer}", linewidth=0, **point_style)
            for expert, point in enumerate(points):
                axes.annotate(str(expert), point, ha="center", va="center", fontsize=7)
        axes.set(xlabel=labels[0], ylabel=labels[1])
    left.set_title("PCA", fontsize="medium")
    right.set_title(f"t-SNE, perplexity {found['perplexity']:.0f}: neighbors, not distances", fontsize="medium")
    handles, labels = left.get_legend_handles_labels()
    title = f"{_name(run)}: normalized outputs of each expert on the same tokens of its layer"
    style = {"ncols": 6, "fontsize": "small", "title_fontsize": "small"}
    figure.legend(handles, labels, loc="outside lower center", title=title, **style)
    return figure


@matplotlib.rc_context(RC)
def expert_keywords(run: MeasuredRun) -> Figure:
    """Draw the first keywords of every expert by TF-IDF, with the share of the keyword's occurrences that it took."""
    layers = _evenly_spaced(len(run.found["keywords"]), 4)
    experts = max(map(len, run.found["keywords"]))
    figure = Figure(figsize=(max(7.0, 2.75 * len(layers)), 1.0 + 0.8 * experts), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        axes.set_title(f"layer {layer}", fontsize="medium")
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(experts, 0))
        for expert, entry in enumerate(run.found["keywords"][layer]):
            lines = [f"{word['token']!r} {word['share']:.0%}" for word in entry["keywords"][:KEYWORDS_SHOWN]]
            axes.text(0, expert + 0.05, str(expert), va="top", fontsize=9, fontweight="bold")
            text = "\n".join(lines) or "took no token 3 times"
            axes.text(0.12, expert + 0.05, text, va="top", fontsize=7.5, family="monospace", parse_math=False)
            axes.axhline(expert, color="#d0d0d0", linewidth=0.6)
    caption = f"{_name(run)}: expert, its tokens with the largest TF-IDF, and the share of their occurrences it took"
    figure.supxlabel(caption, fontsize="small")
    return figure


def _even_shares(name: str) -> Callable[[dict[str, Any]], list[np.ndarray]]:
    """Return the function that gives the tables `found[name]` as multiples of an even share."""
    return lambda found: [(table := to_array(each)) * table.shape[-1] for each in found[name]]


def _heatmaps(
    runs: list[MeasuredRun],
    tables: Callable[[dict[str, Any]], list[np.ndarray]],
    *,
    rows: tuple[str, list[str] | None],
    title: str,
    columns: str = "expert",
    panels: list[str] | None = None,
    norm: Normalize = CHANCE,
) -> Figure:
    """Draw the `tables` of each run, one for each panel; missing cells are gray.

    rows: the label of the rows, and their names; None: their numbers, and some panels can have fewer than others.
    panels: their titles; None: the layers. norm: of the colors.
    """
    label, names = rows
    most = max(len(table) for table in tables(runs[0].found))
    figure, axes_of, shown = _grid(runs, height=0.5 + 0.19 * most, titles=panels)
    colors = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#b0b0b0")
    for row, run in zip(axes_of, runs, strict=False):
        found = tables(run.found)
        for axes, number in zip(row, shown, strict=True):
            image = axes.imshow(np.ma.masked_invalid(found[number]), cmap=colors, norm=norm, aspect="auto")
            if axes is row[0]:  # the other panels of the row share this axis
                axes.set_yticks(range(most), names or [str(number) for number in range(most)])
            axes.set_xticks(range(found[number].shape[-1]) if found[number].shape[-1] <= 16 else [])
            axes.tick_params(labelsize=7)
            axes.grid(visible=False)
        row[0].set_ylim(most - 0.5, -0.5)  # a panel with fewer rows has nothing below them
    figure.supxlabel(columns, fontsize="medium")
    figure.supylabel(label, fontsize="medium")
    shrink = min(1, 2 / len(axes_of) + 0.3)
    bar = figure.colorbar(image, ax=axes_of, extend="max" if norm is CHANCE else "neither", label=title, shrink=shrink)
    ticks = [0, 0.5, 1, 2, 3] if norm is CHANCE else [-1, -0.5, 0, 0.5, 1]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    return figure


def _grid(
    runs: list[MeasuredRun], *, height: float, titles: list[str] | None = None
) -> tuple[Figure, np.ndarray, list[int]]:
    """Return panels with titles for the first runs, and which of the `titles` are shown; None: those of the layers.

    A title says how many runs are left out.
    """
    titles = titles or [f"layer {layer}" for layer in range(len(runs[0].found["load"]))]
    numbers = _evenly_spaced(len(titles), MAX_LAYERS)
    shown = runs[:MAX_RUNS]
    figure = Figure(figsize=(10.4, 1.2 + height * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(numbers), squeeze=False, sharey="row")
    for row, run in zip(panels, shown, strict=True):
        for axes, number in zip(row, numbers, strict=True):
            axes.set_title(titles[number], fontsize="small")
        row[0].set_title(f"{_name(run)}\n{titles[numbers[0]]}", fontsize="small", loc="left")
        row[0].set_title("", fontsize="small")
    if len(runs) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(runs)} conditions", fontsize="medium")
    return figure, panels, numbers


def _evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced numbers out of 0 ... count-1, including the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _name(run: MeasuredRun) -> str:
    return f"{run.condition}, seed {run.seed}"


def to_array(values: Any) -> np.ndarray:
    """Return an array of numbers in which nulls of JSON are NaN."""
    return np.array(values, dtype=float)
