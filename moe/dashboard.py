"""Build a W&B workspace for an experiment: `python -m moe.dashboard noise_lb_seed`, see docs/dashboards.md.

The seeds of one condition are drawn as their mean, with the range from the smallest to the largest value. Bars compare
the levels of a factor by the final values of finished runs. Needs the extra `dashboard`.
"""

import json
import re
import sys
from typing import Any, NamedTuple

import pandas as pd
import torch

from moe.checks import ConfigError, first_line
from moe.config import run_routers
from moe.config.cell import Cell
from moe.config.classes import build
from moe.config.keys import flatten
from moe.config.schema import Config
from moe.launch import command_line
from moe.metrics.catalog import lookup, select
from moe.metrics.metric import Metric
from moe.metrics.summary import summarize
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.options import OneLineParser
from moe.program import ended, program
from moe.results.conditions import HEADLINE, varied_factors
from moe.results.table import level
from moe.routing.decision import LABELS, Context, Knobs
from moe.routing.loss_table import LOSSES
from moe.routing.stats import RoutingStats
from moe.runs.wandb_mirror import CONDITION, FINAL, STEP
from moe.training.evaluate import router_gram


def _names(metrics: list[Metric]) -> list[str]:
    return [metric.name for metric in metrics]


USUAL = "python -m moe.dashboard"
UNDER_A_LIMIT = ("routing/drop_rate", "routing/capacity_usage")  # of training steps, because evaluations are dropless
LIMIT = [*_names(select(group="capacity limit")), *(f"train/{name}" for name in UNDER_A_LIMIT)]
ASSIGNED = [name for name in _names(select(group="capacity")) if name.removeprefix("train/") not in UNDER_A_LIMIT]
SPECIALIZED = _names(select(group="specialization") + select(group="agreement", written="evaluation"))
KEPT = _names(select(group="agreement", written="end"))
SHARPNESS = _names(select(group="sharpness"))
PER_LAYER = _names(select(shown="dashboard layers"))
COMPARED = [*HEADLINE, *_names(select(group="speed", written="end"))]


class Panel(NamedTuple):
    """A panel with one metric over optimizer steps, one line for each condition.

    With `by` the panel shows final values instead, one bar for each level of that configuration key.
    """

    metric: str
    by: str | None = None


def sections(cells: list[Cell]) -> dict[str, list[Panel]]:
    """Return the panels of an experiment by section, in order.

    Raises ConfigError if no run has a Mixture-of-Experts layer.
    """
    configs = [cell.config for cell in cells]
    layers = max(config.model.layers - config.model.first_k_dense_replace for config in configs)
    if layers == 0:
        raise ConfigError("no run of this experiment has a Mixture-of-Experts layer, so there is no routing to show")
    weighted = [f"train/{name}" for name, loss in LOSSES.items() if any(getattr(c, loss.weight) for c in configs)]
    limit = LIMIT if any(config.capacity is not None for config in configs) else []
    gradients, settings = _names(select(group="gradients")), _names(select(group="settings"))
    lines = {
        "Loss": [*_names(select(group="quality", written="evaluation")), "train/loss", *weighted, *gradients],
        "Routing per layer": [f"{name}/layer{layer:02d}" for layer in range(layers) for name in PER_LAYER],
        "Balance": _names(select(group="balance")),
        "Capacity and experts per token": [*limit, *ASSIGNED],
        "Specialization and agreement": SPECIALIZED,
        "Drift from the checkpoint": _names(select(group="drift")) if any(c.has_base for c in configs) else [],
        "Schedules and sharpness": [*settings, *SHARPNESS],
        "Time": _names(select(group="speed", written="step")),
    }
    panels = {name: list(map(Panel, metrics)) for name, metrics in lines.items()}
    panels["Specialization and agreement"] += [Panel(f"{FINAL}/{metric}", CONDITION) for metric in KEPT]
    panels["Factor tables"] = [
        Panel(f"{FINAL}/{metric}", key) for key in (CONDITION, *factors(cells)) for metric in COMPARED
    ]
    null = null_metrics(configs) | _absent(configs)
    kept = {name: [panel for panel in each if _base(panel.metric) not in null] for name, each in panels.items()}
    return {name: each for name, each in kept.items() if each}


def _absent(configs: list[Config]) -> set[str]:
    """Return the metrics that no run has because it trains on all domains, or freezes routers or experts."""
    split = any(config.data.train_domains is not None for config in configs)
    absent = set() if split else {f"{text}/loss_{part}_domain" for text in ("val", "test") for part in ("in", "out_of")}
    if not any(config.data.test_percent for config in configs):
        absent |= {metric.name for metric in select(group="test")}
    frozen = [part for part in ("router", "experts") if not any(c.trains.may_train(part) for c in configs)]
    return absent | {f"{kind}/{part}" for part in frozen for kind in ("grad_norm", "update")}


def null_metrics(configs: list[Config]) -> set[str]:
    """Return the metrics of routing and routers that no run has, such as the Jaccard index with one expert per token.

    To find out, the router of each run routes a few random tokens.
    """
    alike = {repr((config.router, config.model, config.capacity)): config for config in configs if not config.is_dense}
    return set.intersection(*(_null_metrics(c, *each) for c in alike.values() for each in run_routers.specs(c)))


def _null_metrics(config: Config, spec: dict[str, Any], experts: int) -> set[str]:
    dim = config.model.dim
    ids = torch.arange(128).view(2, 64)
    told = torch.zeros(2, len(LABELS), dtype=torch.long)
    context = Context(ids, Knobs.of(), config.capacity, told=told, compared=torch.arange(2))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        router = build(spec, "router", dim, experts, trusted=True)
        layer = MoELayer(router, Experts(experts, dim, hidden=1, kind="silu"))
        for part in (layer.experts.up, layer.experts.down):
            torch.nn.init.normal_(part)
        router.initialize(0.02)
        x = torch.randn(*ids.shape, dim)
        for link in router.chain:
            link.after_step(layer(x, context).stats)  # some routers have no directions before their first step
        values = summarize(RoutingStats.stack([layer.eval()(x, context).stats]), per_layer=False)
        values["routing/router_gram"] = router_gram(router.chain[0])
    for name in KEPT:  # it compares the experts of a token with others too, so it exists for the same routers
        values[name] = values[name.replace("consistency", "sequential_overlap")]
    for name in SPECIALIZED:  # those that need domains exist for routers that assign tokens
        values.setdefault(name, values["routing/sequential_overlap"])
    if not any(True for _ in router.parameters()):
        values |= dict.fromkeys(("grad_norm/router", "update/router"))
    return {name for name, value in values.items() if value is None}


def _base(name: str) -> str:
    """Return the name of a metric of the catalog without the prefixes and suffixes of its copies."""
    return re.sub(r"^(final/|train/(?=routing/))|/layer\d+$", "", name)


def factors(cells: list[Cell]) -> list[str]:
    """Return the keys of the runs' W&B config that vary in an experiment.

    The seed is left out, and so are keys whose value follows from another key that varies.
    """
    rows = [flatten(cell.config) | cell.choices | {"experiment": cell.experiment} for cell in cells]
    table = pd.DataFrame([{key: level(value) for key, value in row.items()} for row in rows])
    grid = cells[0].grid
    varied = varied_factors(table if grid is None else table.assign(varied=json.dumps(grid.factors)))
    return [f"choices.{key}" if key in cells[0].choices else key for key in varied if key != "seed"]


def workspace(cells: list[Cell], *, entity: str, project: str) -> Any:
    """Return a `wandb_workspaces` Workspace: the runs of an experiment grouped by condition, and its sections.

    The schema of wandb-workspaces checks every field. Raises ConfigError if that package is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install -e '.[dashboard]'") from None

    # Runs in a panel. W&B draws ten by default, and counts a resumed run several times.
    largest_number = 2 * len(cells)

    def draw(panel: Panel) -> Any:
        settings: dict[str, Any] = {
            "title": _title(panel),
            "groupby": wr.Config(panel.by or CONDITION),
            "groupby_aggfunc": "mean",
            "groupby_rangefunc": "minmax",  # W&B does not say which ddof its standard deviation has
            "max_runs_to_show": largest_number,
        }
        if panel.by is None:
            return wr.LinePlot(x=STEP, y=[panel.metric], **settings)
        return wr.BarPlot(metrics=[panel.metric], max_bars_to_show=largest_number, **settings)

    grid = cells[0].grid.name if cells[0].grid else cells[0].experiment
    columns = [f"config:{expr.groupby_str_to_key(f'config.{key}').name}" for key in factors(cells)]
    absent = _absent([cell.config for cell in cells])
    return ws.Workspace(
        entity=entity,
        project=project,
        name=re.sub(r"[^\w\s:,.-]", " ", grid),  # W&B takes = for an emoji
        sections=[
            ws.Section(name=name, panels=list(map(draw, panels)), is_open=name in ("Loss", "Factor tables"))
            for name, panels in sections(cells).items()
        ],
        settings=ws.WorkspaceSettings(max_runs=largest_number),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group") == grid),
            groupby=[ws.Config(CONDITION)],
            pinned_columns=columns + [f"summary:{FINAL}/{metric}" for metric in COMPARED if metric not in absent],
        ),
    )


def _title(panel: Panel) -> str:
    if panel.by is not None:
        return f"{panel.metric} by {panel.by.removeprefix('choices.')}: mean, smallest and largest run"
    metric = lookup(panel.metric)
    return f"{panel.metric} ({metric.better} is better)" if metric and metric.better else panel.metric


def main(command: list[str] | None = None) -> int:
    parser = OneLineParser(prog=program(USUAL), description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("experiment", help="name of an experiment, a file in conf/experiment")
    add("overrides", nargs="*", metavar="key=value", help="other settings given to train.py, such as noise=0.1")
    add("--entity", help="user or team of W&B that gets the workspace; without it, the workspace is printed as JSON")
    add("--project", help="its project, with the runs; needs --entity")
    arguments = parser.parse_args(command)
    try:
        if (arguments.entity is None) != (arguments.project is None):
            raise ConfigError(
                "--entity and --project go together: the owner of the workspace, and the project that it shows"
            )
        cells = command_line.read_cells(["-m", f"experiment={arguments.experiment}", *arguments.overrides])
        assert cells  # argparse has answered the arguments that Hydra would answer by itself, such as --help
        built = workspace(cells, entity=arguments.entity or "", project=arguments.project or "")
        if arguments.project is None:
            print(built._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1))
        else:
            print(_save(built))
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _save(built: Any) -> str:
    """Save the workspace to W&B and return its address."""
    try:
        return str(built.save().url)
    except Exception as error:  # the errors of W&B have no other common class, and some are private
        raise ConfigError(f"W&B did not save the workspace: {first_line(error)}") from None


if __name__ == "__main__":
    sys.exit(ended(main, USUAL))
