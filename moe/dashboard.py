"""A W&B workspace for an experiment, as code: `python -m moe.dashboard noise_lb_seed`, see docs/dashboards.md.

Seeds of one condition are drawn as their mean, with the range from least to greatest. What compares settings are the
final values of finished runs. Needs the extra `dashboard`.
"""

import argparse
import sys
from dataclasses import asdict
from typing import Any, NamedTuple

import pandas as pd

from moe.checks import ConfigError
from moe.config.schema import Cell, flatten
from moe.launch import command_line
from moe.metrics.catalog import Metric, lookup, select
from moe.results.conditions import HEADLINE, varied_factors
from moe.results.table import level
from moe.routing.loss_table import LOSSES
from moe.runs.wandb_mirror import CONDITION, FINAL, STEP, first_line


def _names(metrics: list[Metric]) -> list[str]:
    return [metric.name for metric in metrics]


LIMIT = _names(select(group="capacity limit"))
SHARPNESS = _names(select(group="sharpness"))
PER_LAYER = _names(select(shown="dashboard layers"))
COMPARED = [*HEADLINE, *_names(select(group="speed", written="end"))]


class Panel(NamedTuple):
    """A metric over optimizer steps, a line a condition; or, with `by`, final: a bar for each level of a config key."""

    metric: str
    by: str | None = None


def sections(cells: list[Cell]) -> dict[str, list[Panel]]:
    """The panels of an experiment by section, in their order. ConfigError if nothing in it is routed."""
    configs = [cell.config for cell in cells]
    layers = max(config.model.layers - config.model.first_k_dense_replace for config in configs)
    if layers == 0:
        raise ConfigError("no run of it has a Mixture-of-Experts layer, so there is no routing to show")
    weighted = [f"train/{name}" for name, loss in LOSSES.items() if any(getattr(c, loss.weight) for c in configs)]
    limit = LIMIT if any(config.capacity is not None for config in configs) else []
    gradients, settings = _names(select(group="gradients")), _names(select(group="settings"))
    lines = {
        "Loss": [*_names(select(group="quality")), "train/loss", *weighted, *gradients],
        "Routing per layer": [f"{name}/layer{layer:02d}" for layer in range(layers) for name in PER_LAYER],
        "Balance": [*_names(select(group="balance")), *limit],
        "Schedules and sharpness": [*settings, *SHARPNESS],
        "Time": _names(select(group="speed", written="step")),
    }
    bars = [Panel(f"{FINAL}/{metric}", key) for key in (CONDITION, *factors(cells)) for metric in COMPARED]
    return {name: list(map(Panel, metrics)) for name, metrics in lines.items()} | {"Factor tables": bars}


def factors(cells: list[Cell]) -> list[str]:
    """The keys of a run's W&B config that vary in an experiment, without the seed and what only follows another one."""
    rows = [flatten(asdict(cell.config)) | cell.choices | {"experiment": cell.experiment} for cell in cells]
    varied = varied_factors(pd.DataFrame([{key: level(value) for key, value in row.items()} for row in rows]))
    return [f"choices.{key}" if key in cells[0].choices else key for key in varied if key != "seed"]


def workspace(cells: list[Cell], *, entity: str, project: str) -> Any:
    """The runs of an experiment by condition, and its sections: a `wandb_workspaces` Workspace, every field checked."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install -e '.[dashboard]'") from None

    most = 2 * len(cells)  # runs in a panel: W&B draws ten unless told, and a run that was resumed is several to it

    def draw(panel: Panel) -> Any:
        settings: dict[str, Any] = {
            "title": _title(panel),
            "groupby": wr.Config(panel.by or CONDITION),
            "groupby_aggfunc": "mean",
            "groupby_rangefunc": "minmax",  # of the standard deviation W&B does not say which one it is
            "max_runs_to_show": most,
        }
        if panel.by is None:
            return wr.LinePlot(x=STEP, y=[panel.metric], **settings)
        return wr.BarPlot(metrics=[panel.metric], max_bars_to_show=most, **settings)

    columns = [f"config:{expr.groupby_str_to_key(f'config.{key}').name}" for key in factors(cells)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=cells[0].experiment,
        sections=[
            ws.Section(name=name, panels=list(map(draw, panels)), is_open=name in ("Loss", "Factor tables"))
            for name, panels in sections(cells).items()
        ],
        settings=ws.WorkspaceSettings(max_runs=most),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group") == cells[0].experiment),
            groupby=[ws.Config(CONDITION)],
            pinned_columns=columns + [f"summary:{FINAL}/{metric}" for metric in COMPARED],
        ),
    )


def _title(panel: Panel) -> str:
    if panel.by is not None:
        return f"{panel.metric} by {panel.by.removeprefix('choices.')}: mean, least and greatest run"
    metric = lookup(panel.metric)
    return f"{panel.metric} ({metric.better} is better)" if metric and metric.better else panel.metric


def main(command: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe.dashboard", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("experiment", help="a name of conf/experiment")
    add("overrides", nargs="*", metavar="key=value", help="what train.py was given beside it")
    add("--entity", help="with --project: save the workspace there, instead of printing it as JSON")
    add("--project")
    arguments = parser.parse_intermixed_args(command)
    try:
        if (arguments.entity is None) != (arguments.project is None):
            raise ConfigError("--entity and --project go together: who owns the workspace, and the project it shows")
        cells = command_line.read_cells(["-m", f"experiment={arguments.experiment}", *arguments.overrides])
        assert cells  # arguments that Hydra would answer by itself are argparse's here
        made = workspace(cells, entity=arguments.entity or "", project=arguments.project or "")
        if arguments.project is None:
            print(made._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1))
        else:
            print(_save(made))
    except ConfigError as error:
        print(f"moe.dashboard: {error}", file=sys.stderr)
        return 2
    return 0


def _save(made: Any) -> str:
    """The address of the saved workspace."""
    try:
        return str(made.save().url)
    except Exception as error:  # W&B has kinds of errors that share nothing else, and some are private
        raise ConfigError(f"W&B does not save it: {first_line(error)}") from None


if __name__ == "__main__":
    sys.exit(main())
