"""Figures of single experts: what each prefers, and the loss without it. A row is a run, a column is a layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from moe.analysis.figures.style import MARKER_SHAPES, PALETTE, RC

MAX_RUNS, MAX_LAYERS = 4, 6  # rows and columns of panels in a figure that is as wide as a report
KEYWORDS_SHOWN = 5


class MeasuredRun(NamedTuple):
    """A run with its condition (all factors but the seed), its seed, and what was measured (`moe.runs.measured`)."""

    condition: str
    seed: int
    found: dict[str, Any]


@matplotlib.rc_context(RC)
def expert_domains(runs: list[MeasuredRun]) -> Figure:
    """Draw P(expert | domain) as a multiple of an even share; 1 is no preference."""
    names = runs[0].found["domains"]
    return _heatmaps(
        runs, "given_domain", _relative_to_even_share, rows=("domain", names), title="share of a domain's assignments"
    )


@matplotlib.rc_context(RC)
def expert_positions(runs: list[MeasuredRun]) -> Figure:
    """Draw P(expert | decile of the position in the sequence) as a multiple of an even share."""
    names = [str(decile + 1) for decile in range(len(runs[0].found["given_position"][0]))]
    title = "share of a position's assignments"
    return _heatmaps(
        runs, "given_position", _relative_to_even_share, rows=("decile of the position", names), title=title
    )


@matplotlib.rc_context(RC)
def expert_coactivation(runs: list[MeasuredRun]) -> Figure:
    """Draw how often an expert's tokens chose another expert too, as a multiple of chance.

    The runs must have more than one expert per token.
    """
    names = [str(expert) for expert in range(len(runs[0].found["load"][0]))]

    def to_chance(found: dict[str, Any], layer: int) -> np.ndarray:
        return to_array(found["coactivation"][layer]) / found["coactivation_chance"][layer]

    return _heatmaps(runs, "coactivation", to_chance, rows=("expert", names), title="tokens shared with another expert")


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
        for layer, points in enumerate(np.array(found[name])):
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
    experts = len(run.found["keywords"][0])
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


def _relative_to_even_share(found: dict[str, Any], layer: int, name: str) -> np.ndarray:
    table = to_array(found[name][layer])
    return table * table.shape[-1]


def _heatmaps(
    runs: list[MeasuredRun],
    name: str,
    ratio: Callable[..., np.ndarray],
    *,
    rows: tuple[str, list[str]],
    title: str,
) -> Figure:
    """Draw `found[name][layer]` as multiples of chance: white at 1, darkest from 3 on; missing cells are gray."""
    label, names = rows
    figure, panels, layers = _grid(runs, height=0.5 + 0.19 * len(names))
    norm = TwoSlopeNorm(1, vmin=0, vmax=3)
    colors = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#b0b0b0")
    extra = () if name == "coactivation" else (name,)
    for row, run in zip(panels, runs, strict=False):
        for axes, layer in zip(row, layers, strict=True):
            table = ratio(run.found, layer, *extra)
            image = axes.imshow(np.ma.masked_invalid(table), cmap=colors, norm=norm, aspect="auto")
            if axes is row[0]:  # the other panels of the row share this axis
                axes.set_yticks(range(len(names)), names)
            axes.set_xticks(range(table.shape[-1]) if table.shape[-1] <= 16 else [])
            axes.tick_params(labelsize=7)
            axes.grid(visible=False)
    figure.supxlabel("expert", fontsize="medium")
    figure.supylabel(label, fontsize="medium")
    shrink = min(1, 2 / len(panels) + 0.3)
    bar = figure.colorbar(image, ax=panels, extend="max", label=f"{title},\ntimes chance", shrink=shrink)
    bar.set_ticks([0, 0.5, 1, 2, 3], labels=["0", "0.5", "1", "2", "3"])
    return figure


def _grid(runs: list[MeasuredRun], *, height: float) -> tuple[Figure, np.ndarray, list[int]]:
    """Return panels with titles for the first runs and for some layers; a title says how many runs are left out."""
    layers = _evenly_spaced(len(runs[0].found["load"]), MAX_LAYERS)
    shown = runs[:MAX_RUNS]
    figure = Figure(figsize=(10.4, 1.2 + height * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(layers), squeeze=False, sharey="row")
    for row, run in zip(panels, shown, strict=True):
        for axes, layer in zip(row, layers, strict=True):
            axes.set_title(f"layer {layer}", fontsize="small")
        row[0].set_title(f"{_name(run)}\nlayer {layers[0]}", fontsize="small", loc="left")
        row[0].set_title("", fontsize="small")
    if len(runs) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(runs)} conditions", fontsize="medium")
    return figure, panels, layers


def _evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced numbers out of 0 ... count-1, including the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _name(run: MeasuredRun) -> str:
    return f"{run.condition}, seed {run.seed}"


def to_array(values: Any) -> np.ndarray:
    """Return an array of numbers in which nulls of JSON are NaN."""
    return np.array(values, dtype=float)
