"""How the values of tuned keys were chosen for each arm: the chosen values, and the curve of each arm."""

from collections.abc import Iterator

import pandas as pd

from moe.analysis.figures import effects
from moe.analysis.figures.drawing import drawing
from moe.analysis.report.blocks import Heading, Paragraph, ReportBlock, TableBlock, literal
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.tuned import Arm, arms_of, tuned_equally
from moe.checks import plain
from moe.config.cell import CHOOSES
from moe.results.table import ABSENT

EXPLAINED = """\
Each setting was trained at the same values of the tuned keys, with seeds that are used for nothing else. The value with
the lowest mean {metric} was chosen; of equal ones the smaller. Other seeds judge the settings at their chosen values,
on test text. So no test or verdict includes the runs of this section."""
AT_THE_END = "at the end of the list: a better one may lie beyond"


def tuning(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield whether the arms were tuned equally, what was chosen for each, and its curve over each tuned key."""
    if inputs.trials.empty:
        return
    arms = arms_of(inputs.trials)
    yield Heading("Tuned values")
    yield Paragraph(EXPLAINED.format(metric=CHOOSES))
    yield Paragraph(f"**Equal budgets:** {literal(tuned_equally(inputs.trials))}.")
    yield TableBlock(pd.DataFrame([_row(arm, inputs) for arm in arms]))
    for key in dict.fromkeys(key for arm in arms for key in arm.best):
        drawn = [arm for arm in arms if key in arm.best]
        caption = f"{CHOOSES} of each setting at the values of {key}."
        yield drawing(f"tuning_{key.replace('.', '_')}", caption, effects.tuning_curves(drawn, key, CHOOSES))


def _row(arm: Arm, inputs: ReportInputs) -> dict[str, str]:
    """Return what was chosen for an arm, as text, with what its runs for judging have if that differs."""
    row = {"setting": arm.name, "chosen": ", ".join(f"{key}={value}" for key, value in arm.best.items()) or "–"}
    chosen = arm.means[(arm.means[[*arm.best]] == pd.Series(arm.best, dtype=object)).all(axis=1)]
    row["mean"] = plain(f"{chosen['mean'].iloc[0]:.4f}") if arm.best else "–"
    listed = {key: arm.means[key][arm.means[key] != ABSENT] for key in arm.best}
    ends = [key for key, value in arm.best.items() if value in (listed[key].min(), listed[key].max())]
    row["note"] = f"{', '.join(ends)}: {AT_THE_END}" if ends else ""
    if len(inputs.trained_at):
        trained = inputs.trained_at[inputs.condition[inputs.condition == arm.name].index].unique()
        row["judged at"] = "; ".join(trained)
    return row
