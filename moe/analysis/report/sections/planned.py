"""What was planned before the runs, and what follows from earlier looks at their results."""

from collections.abc import Iterator

from moe.analysis.looks import FURTHER, Study
from moe.analysis.power import SIGNIFICANCE
from moe.analysis.report.blocks import literal

CHANGED = """\
**The claims were changed.** On {time}, {claims} were planned for {runs} of these runs. Runs with the same settings give
the same results, so the present claims may have been chosen by results."""
BEYOND = """\
**This is look {number} at these runs, beyond the planned number of seeds ({planned}).** A report about {seeds} seeds
was written on {time}. A test now has {share:.3g} % in place of 5 % for all its family; together with the looks before,
chance decides something in at most {total:.3g} % of studies. To keep 5 %, plan the number of seeds before the first run
(`planned_seeds=8`)."""
WITHIN = """\
This is look {number} at these runs, of {planned} planned seeds. A test has {share:.3g} % in place of 5 % for all its
family, and all looks together keep the 5 %."""


def planned_facts(study: Study) -> list[tuple[str, str]]:
    """Return what was planned before the first step, as a fact of the set-up; nothing if no plan was written down."""
    if not study.plans:
        return []
    plan = study.plans[-1]
    until = f"decided after {study.planned} seeds" if study.planned else "no number of seeds for a decision"
    seeds = ", ".join(map(str, plan.seeds))
    text = f"{_claims(len(plan.claims))}, seeds {seeds}, {until}"
    more = f"; {len(study.plans) - 1} earlier plans" if len(study.plans) > 1 else ""
    written = f"written down {plan.time}, before the first step, digest {plan.digest}"
    return [("Planned", literal(f"{text}; {written}{more}"))]


def warnings_of_looks(study: Study, n: int) -> Iterator[str]:
    """Yield what a reader has to know of earlier looks and of changed claims. n: the seeds with finished runs."""
    for earlier, runs in study.changed[:3]:
        yield CHANGED.format(time=earlier.time, claims=f"other claims ({len(earlier.claims)})", runs=runs)
    before = study.looks_before(n)
    planned = study.planned or min((len(look.seeds) for look in before), default=n)
    if not before and n >= planned:
        return
    share, number = study.share(n), len({len(look.seeds) for look in before}) + 1
    percent = 100 * SIGNIFICANCE * share
    if n > planned and before and len(before[-1].seeds) >= planned:
        beyond = len({len(look.seeds) for look in before if len(look.seeds) >= planned})
        total = 100 * SIGNIFICANCE * sum(FURTHER**each for each in range(beyond + 1))
        last = before[-1]
        facts = {"seeds": len(last.seeds), "time": last.time, "share": percent, "total": total}
        yield BEYOND.format(number=number, planned=planned, **facts)
    else:
        yield WITHIN.format(number=number, planned=planned, share=percent)


def _claims(number: int) -> str:
    return {0: "no claims", 1: "1 claim"}.get(number, f"{number} claims")
