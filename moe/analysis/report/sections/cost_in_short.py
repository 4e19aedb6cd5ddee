"""Equal cost in short, for the page of a study: at most one table at equal training FLOPs and one of speed-ups.

The report has the same numbers with figures and other costs (`moe.analysis.report.sections.cost`). Levels are compared
with those that the study's claims name most often after `than`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from moe.analysis.equal_cost import FLOPS, LOSS, is_budget, is_scale, paired_sides, training_curves, unknown_flops
from moe.analysis.report.blocks import BulletList, Heading, Paragraph, ReportBlock, TableBlock, literal
from moe.analysis.report.inputs import ReportInputs, reference_levels
from moe.analysis.report.sections.cost import (
    NO_CURVE,
    NO_TABLE,
    NOWHERE,
    SPEED_COLUMNS,
    VERDICTS,
    equal_flops,
    found_speed_ups,
    speed_up_row,
    why_none,
)
from moe.analysis.sentences import enumerated, levels_compared
from moe.analysis.speed_up import COSTS_MORE, NOT_APART, NOT_SHOWN, SAVES
from moe.analysis.statistics import NAMES
from moe.results.comparable import LATER_TOKENS, NOT_COMPARABLE

VERBS = {
    SAVES: "by which the level saves compute",
    COSTS_MORE: "by which it costs more",
    NOT_APART: "without a clear difference",
    NOT_SHOWN: "that runs of the reference do not confirm",
    NOT_COMPARABLE: "with losses that are not comparable",
}
SAME_FLOPS = """\
Apart from comparisons of training lengths, the two settings of each comparison have the same training FLOPs within 1 %,
so differences after the last step are at equal training FLOPs already."""
NO_SPEED_UP = """\
There is no effective speed-up: {reason}."""
SCALES_ALONE = "only sizes and budgets vary, and it compares settings of equal size"
FLOPS_BULLET = """\
{all} of settings that differ in FLOPs by more than 1 %: at equal training FLOPs, the level has a lower loss than its
reference in {lower}, and a higher one in {higher}, wherever the loss lies between two evaluations{apart}{rest}."""
NOT_COUNTED = "; {number} {are} not comparable, because {why}"
SPEED_BULLET = """\
**{factor}**, {number} with {reference}: {counts}."""
FLOPS_TABLE = """\
**Loss at equal training FLOPs.** `level` and `reference` are the two settings that are compared, `within` the levels of
other factors. `equal FLOPs` is the difference in validation loss (nats per token; negative: the level is better) with
its 95 % interval, at the training FLOPs of the setting that needs fewer for all steps. The other one is read before its
end, at the percentage given, when its learning rate is still high, so it looks worse there than a run of that length
would. Where its loss lies between two evaluations, it is interpolated; "between points 0.02 apart" says how much they
differ."""
SPEED_TABLE = """\
**Effective speed-up.** `times the compute` is how many times as much training compute (FLOPs) the reference needs for
the loss that the level has after `training FLOPs`: 0.8 means that a fifth of the level's compute is wasted. The
intervals say what other seeds could change: if the curve is right, all intervals of this table contain the true values
in 95 % of cases. `loss` is that validation loss. {verdicts} `doubts` tells where the curve is used beyond the
reference's runs. {curve} None of this was claimed before the runs."""
OF_RUNS = "The compute is read from a curve through the losses of the reference's runs."
OF_TRAINING = """\
The compute is read from a curve through the loss of the reference during its training, which has the mean loss of each
evaluation. A loss in the middle of training is another one than that of a run that ends there: mostly higher, and lower
in very short runs. So a number that is read there is off by more than its interval says."""


class CostInShort(NamedTuple):
    """What a study says at equal cost: comparisons at equal training FLOPs, and speed-ups, with a row for each.

    reason: why there is no speed-up, if there is none.
    left_out: which runs are left out because their training FLOPs are not known, as a sentence; empty if none is.
    comparable: whether the training FLOPs of both sides of a comparison are known.
    of_training: whether a speed-up is read from a curve through evaluations during training.
    """

    flops: pd.DataFrame
    speed_ups: pd.DataFrame
    reason: str
    left_out: str
    comparable: bool
    of_training: bool

    @property
    def quotes(self) -> dict[str, tuple[str, str]]:
        """The verdict and the numbers of each speed-up, by what it compares, such as "router a vs b".

        If a comparison has several budgets, the name ends with one, such as ", 9.29e+11 FLOPs".
        """
        at_flops = self.flops.set_index(NAMES)["cell"].to_dict()
        several = self.speed_ups.duplicated(NAMES, keep=False)
        return {
            levels_compared(row) + (f", {row['training FLOPs']} FLOPs" if of_several else ""): (
                row["verdict"],
                _in_words(row, at_flops.get(tuple(row[NAMES]))),
            )
            for (_, row), of_several in zip(self.speed_ups.iterrows(), several, strict=True)
        }


def _in_words(row: pd.Series, at_flops: str | None) -> str:
    times = row["times the compute"]
    text = NOWHERE if times == NOWHERE else f"the reference needs {times} times the compute"
    text += f"; difference in validation loss at equal training FLOPs {at_flops}" if at_flops else ""
    return f"{text}; {row['doubts']}" if row["doubts"] else text


def cost_in_short(inputs: ReportInputs) -> CostInShort | None:
    """Return what the runs of a study say at equal cost; None if they compare nothing, or learned little."""
    if inputs.contrasts.empty or LOSS not in inputs.runs or inputs.learned_little:
        return None
    curves = training_curves(inputs.runs, inputs.past.evals)
    compared = list(found_speed_ups(inputs, curves))
    rows = [each.names | speed_up_row(found) for each in compared for found in each.found]
    reasons = "; ".join(dict.fromkeys(each.reason for each in compared if each.reason))
    left_out = unknown_flops(inputs.runs)
    scales = all(is_scale(factor) or is_budget(inputs.runs, factor) for factor in inputs.factors)
    return CostInShort(
        equal_flops(inputs, curves),
        pd.DataFrame(rows, columns=SPEED_COLUMNS, dtype=object),
        SCALES_ALONE if scales else reasons or NO_CURVE,
        left_out,
        not left_out or any(paired_sides(inputs.runs, inputs.factors, reference_levels(inputs), FLOPS)),
        any(each.of_training for comparison in compared for each in comparison.found),
    )


def in_short(found: CostInShort) -> Iterator[ReportBlock]:
    """Yield the section of a page: what the tables say in a few sentences, and the tables."""
    yield Heading("At equal cost")
    left_out = [found.left_out] if found.left_out else []
    told = [*_about_speed_ups(found), *_about_flops(found.flops)] if found.comparable else []
    yield BulletList([*told, *left_out])
    if len(found.speed_ups):
        yield Paragraph(SPEED_TABLE.format(verdicts=VERDICTS, curve=OF_TRAINING if found.of_training else OF_RUNS))
        yield TableBlock(found.speed_ups)
    if (found.flops["n"] > 0).any():
        yield Paragraph(FLOPS_TABLE)
        yield TableBlock(found.flops[NAMES].assign(**{"equal FLOPs": found.flops["cell"]}))


def _about_speed_ups(found: CostInShort) -> Iterator[str]:
    if found.speed_ups.empty:
        yield NO_SPEED_UP.format(reason=found.reason)
    for (factor, reference), rows in found.speed_ups.groupby(["factor", "reference"], sort=False):
        number = rows["verdict"].value_counts()
        counts = enumerated([f"{number[each]} {VERBS[each]}" for each in VERBS if each in number])
        compared = "1 comparison" if len(rows) == 1 else f"{len(rows)} comparisons"
        names = {"factor": literal(str(factor)), "reference": literal(str(reference))}
        yield SPEED_BULLET.format(number=compared, counts=counts, **names)


def _about_flops(table: pd.DataFrame) -> Iterator[str]:
    """Yield in how many comparisons the difference is clear, even if interpolation is off by as much as it can be."""
    known = table[table["n"] > 0]
    if known.empty:
        reasons = why_none(table)
        yield NO_TABLE.format(cost=FLOPS, reasons=reasons) if reasons else SAME_FLOPS
        return
    sure = known[known["note"] == ""]
    lower, higher = ((sure["high"] + sure["gap"]) < 0).sum(), ((sure["low"] - sure["gap"]) > 0).sum()
    number = len(known) - len(sure)
    apart = NOT_COUNTED.format(number=number, are="is" if number == 1 else "are", why=LATER_TOKENS) if number else ""
    compared = f"{len(known)} comparison{'s' * (len(known) != 1)}"
    rest = "; the rest stays open" if number + lower + higher < len(known) else ""
    yield FLOPS_BULLET.format(all=compared, lower=lower, higher=higher, apart=apart, rest=rest)
