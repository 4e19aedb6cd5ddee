"""What was planned before the runs, and what follows from earlier looks at their results."""

from collections.abc import Iterator
from itertools import takewhile

from moe.analysis.looks import FURTHER, Study
from moe.analysis.power import SIGNIFICANCE
from moe.analysis.report.blocks import literal

CHANGED = """\
**Other claims were planned before.** On {time}, {experiment} had other claims ({claims}), planned for {runs} of these
runs. Runs with the same settings give the same results, so the present claims may have been chosen by results."""
BEYOND = """\
**This is look {number} at these runs, after {reached}.** On {time}, a report about other seeds ({seeds}) was written.
In this look, the tests of a report together have {share:.3g} % instead of 5 %. Together with the looks before, chance
decides something in at most {total:.3g} % of studies. To keep 5 %, plan the number of seeds before the first run
(`planned_seeds=8`)."""
REACHED = "the planned number of seeds ({planned}) was reached"
FIRST_REPORT = "{planned} seeds, those of the first report, which count as planned because no number was planned"
NOT_PLANNED = "No number of seeds was planned, so that of the first report ({planned}) counts as planned."
WITHIN = """\
This is look {number} at these runs, of {planned} planned seeds. In this look, the tests of a report together have
{share:.3g} % instead of 5 %, and all looks together keep the 5 %."""
NOTHING_NEW = """\
**This is look {number} at these runs, and it has no new seed.** Earlier reports had all its seeds, beside others.
Nothing of the 5 % is left for it, so its tests decide nothing. Reports about more seeds, up to the {planned} planned
ones, do."""
USED_UP = """\
{which} are used up: with more, all tests together have {share:.3g} % instead of 5 %. That number allows for it."""
NOT_WRITTEN = """\
**This look was not written down**, because the folder of the runs cannot be written to. A later report will not know of
it, so its tests will have too large a share of the 5 %."""


def planned_facts(study: Study) -> list[tuple[str, str]]:
    """Return what was planned before the first step, as a fact of the set-up; nothing if no plan was written down."""
    if not study.plans:
        return []
    plan, first = study.plans[-1], study.plans[0]
    until = f"decided after {study.planned} seeds" if study.planned else "no number of seeds for a decision"
    seeds = ", ".join(map(str, dict.fromkeys(seed for each in study.plans for seed in each.seeds)))
    text = f"{_claims(len(plan.claims))}, seeds {seeds}, {until}"
    earlier = len(study.plans) - 1
    written = f"written down {first.time}, before the first step, digest {first.digest}"
    more = f"; newest plan {plan.time}, digest {plan.digest}; {earlier} earlier " if earlier else ""
    more += {0: "", 1: "plan"}.get(earlier, "plans")
    return [("Planned", literal(f"{text}; {written}{more}"))]


def warnings_of_looks(study: Study, n: int) -> Iterator[str]:
    """Yield what a reader has to know of earlier looks and of changed claims. n: the seeds with finished runs."""
    for earlier, runs in study.changed[:3]:
        yield CHANGED.format(
            time=earlier.time, experiment=literal(earlier.experiment), claims=len(earlier.claims), runs=runs
        )
    if n < 2:
        return  # no test is possible
    if study.unwritten:
        yield NOT_WRITTEN
    looks, place = study.seen(n)
    planned, before = study.planned or looks[0], looks[:place]
    if not before and n >= planned:
        return
    share = 100 * SIGNIFICANCE * study.share(n)
    facts = {"number": place + 1, "planned": planned, "share": share}
    if beyond := sum(each >= planned for each in before):
        *_, last = takewhile(lambda look: set(look.seeds) != set(study.seeds), study.earlier)
        total = 100 * SIGNIFICANCE * sum(FURTHER**each for each in range(beyond + 1))
        reached = (REACHED if study.planned else FIRST_REPORT).format(planned=planned)
        seeds = ", ".join(map(str, last.seeds))
        yield BEYOND.format(**facts, reached=reached, seeds=seeds, time=last.time, total=total)
    elif looks[place] in before:
        yield NOTHING_NEW.format(**facts)
    else:
        yield WITHIN.format(**facts)


def price_of_more(study: Study, n: int) -> str:
    """Return what a report about more seeds costs, as a share of the 5 %; an empty text if planned seeds are missing.

    n: the seeds with finished runs.
    """
    looks, _ = study.seen(n)
    planned = study.planned or looks[0]
    if n < 2 or looks[-1] < planned:
        return ""
    which = f"The planned seeds ({planned})" if study.planned else f"{NOT_PLANNED.format(planned=planned)} These seeds"
    return USED_UP.format(which=which, share=100 * SIGNIFICANCE * study.next_share(n))


def _claims(number: int) -> str:
    return {0: "no claims", 1: "1 claim"}.get(number, f"{number} claims")
