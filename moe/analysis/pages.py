"""Ship the tables of finished studies with the docs, and write what they show into the page of each study.

    python -m moe.analysis.pages ship multirun/noise_lb_seed docs/studies/noise_lb_seed
    python -m moe.analysis.pages write docs/studies
    python -m moe.analysis.pages report docs/studies/noise_lb_seed docs/example-report/report.html

`ship` writes the tables of runs and of evaluations into a folder. `write` puts the answer, the verdicts, the
comparisons at equal cost and the table of conditions of each such folder NAME between the two marks in NAME.md beside
it. It also writes the verdict of each claim that `docs/findings.md`, the page above, names in a mark such as `<!--
noise_lb_seed: Noise 0.5 raises perplexity -->`, of each speed-up, as in `<!-- spectra_ablation: At equal cost, variant
dense vs top2 -->`, and of the spread, as in `<!-- seed_components: Sources of the spread -->`. If the folder has the
plan.json of `moe plan`, the page says when it was made, its fingerprint, and what it planned. `report` writes the
report.html of such a folder, without the files beside it. Tests compare.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from moe.analysis.claims import evidence_sentence, planned_claims
from moe.analysis.figures.drawing import Drawing
from moe.analysis.recorded import finished_seeds
from moe.analysis.report.blocks import Attachment, Cards, Details, Heading, Paragraph, ReportBlock, TableBlock, literal
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.markdown import block_as_markdown
from moe.analysis.report.report import write_report
from moe.analysis.report.sections.answer import answer
from moe.analysis.report.sections.comparisons import condition_table
from moe.analysis.report.sections.cost_in_short import CostInShort, cost_in_short, in_short
from moe.analysis.report.sections.headline import later_tokens
from moe.analysis.report.sections.league import how_much_routing_matters, league
from moe.analysis.report.sections.scaling import scaling_laws
from moe.analysis.report.sections.seed_components import seed_components, spread_sentence
from moe.analysis.report.sections.tuning import tuning
from moe.analysis.report.sections.verdicts import claim_verdicts
from moe.analysis.sentences import effects_in_words, enumerated, numbers_in_words
from moe.checks import ConfigError, first_line, plain
from moe.files import read_text, shown, write_text
from moe.options import OneLineParser
from moe.results.shipped import EVALS, read_shipped, ship
from moe.results.table import load_runs
from moe.runs.planned import digest_of_plan, is_plan, short

BEGIN = "<!-- What follows is written by `python -m moe.analysis.pages write docs/studies`. -->"
END = "<!-- Here it ends. -->"
LOSS = "val/loss"
BESIDE = re.compile(r' <span class="file">Beside this page: [^<]*</span>')  # the name of the file of a figure
CURVE = (
    f"{LOSS} over training: the mean of all settings, and the means of the best and of the worst setting at that step."
)
PLAN = "plan.json"
SPREAD = "Sources of the spread"  # what a mark names
MADE = """\
The plan was made on {time}, {order} the first run started (on {started}). The fingerprint of the plan is
{fingerprint}. The smallest difference that mattered is {effect}. {wanted} Trained were the seeds {trained}."""
WANTED = "It names the seeds {seeds} and {runs} runs: {settings} settings with each seed{tuning}."
NOT_WANTED = "No claim has a number of seeds, so it names none that decide."
PLANNED = """\
`moe plan` said {order} how many seeds each claim needs to be supported in {power:.0f} % of cases, if the true
difference is inside of what the claim allows, at the given distance to the nearest bound. """
SOURCES = "These numbers come from {names}, so they are uncertain: the range is in parentheses."
PILOT = [{"name": "a small pilot"}]  # the sources of a plan from before other runs told a spread
NO_PILOT = """\
There was no pilot. So a distance is in standard deviations of the differences between runs of one seed (sd)."""
PAGE = re.compile(r"`docs/([\w-]+\.md)`")  # in the text of a report, which knows no page beside it
AT_EQUAL_COST = "At equal cost, {compared}"
FINDINGS = "findings.md"  # beside the folder of the studies
VERDICT = re.compile(r"(?m)^(?P<line><!-- (?P<study>[\w.-]+): (?P<claim>.+) -->)[ ]*\n(?:> .*\n)?")


def main(command: list[str] | None = None) -> int:
    """Carry out a command, by default the one in `sys.argv`, and return the exit status."""
    parser = OneLineParser(
        prog="python -m moe.analysis.pages", description="Ship the tables of studies, and write their pages."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("ship", help="write the tables of the runs in a folder")
    one.add_argument("runs", type=Path, help="the folder of the sweep")
    one.add_argument("folder", type=Path, help="the folder to write to, such as docs/studies/NAME")
    every = commands.add_parser("write", help="write what the shipped tables show into the pages")
    every.add_argument("folder", type=Path, help="the folder that holds NAME.md and NAME/ for each study")
    report = commands.add_parser("report", help="write the report on shipped tables as one page")
    report.add_argument("folder", type=Path, help="the folder of the tables, such as docs/studies/NAME")
    report.add_argument("page", type=Path, help="the page to write, such as report.html")
    arguments = parser.parse_args(command)
    try:
        if arguments.command == "ship":
            written = ship(load_runs([arguments.runs]), arguments.folder)
        elif arguments.command == "report":
            written = [report_of(arguments.folder, arguments.page)]
        else:
            texts = texts_of(arguments.folder)  # all, before the first is written
            for page, text in texts.items():
                write_text(page, text)
            written = list(texts)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(shown(path))
    return 0


def report_of(folder: Path, page: Path) -> Path:
    """Write the report on the tables in a folder as one page, and return the page.

    Raises ValueError, naming the file, for tables that are damaged or missing.
    """
    runs, past = read_shipped(folder)
    with TemporaryDirectory() as out:
        text = read_text(write_report(runs, out, past=past).with_name("report.html"))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, BESIDE.sub("", text))  # the page stands alone
    return page


def pages(folder: Path) -> list[Path]:
    """Return the page of every study below `folder` whose tables were shipped."""
    return [folder / f"{table.parent.name}.md" for table in sorted(folder.glob(f"*/{EVALS}"))]


def texts_of(folder: Path) -> dict[Path, str]:
    """Return the text of the page of every study in `folder`, and of the page of findings beside it if there is one.

    Raises ValueError for a page without the two marks, for a mark whose study has no tables or no such claim, and for
    a damaged table.
    """
    texts, quotes = dict[Path, str](), dict[str, list[tuple[str, str]]]()
    for page in pages(folder):
        study = page.with_suffix("")
        inputs = _inputs_of(study)
        costs = [cost_in_short(part) for part in inputs]
        texts[page] = _between_marks(page, shown_by(study, inputs, costs))
        quotes[study.name] = list(_quotes(inputs, costs))
    findings = folder.parent / FINDINGS
    if findings.exists():
        texts[findings] = _with_verdicts(read_text(findings), quotes)
    return texts


def _inputs_of(folder: Path) -> list[ReportInputs]:
    """Return what a report needs about each experiment whose runs are in the tables of a folder.

    The runs that only chose values of tuned keys are part of the experiment that they chose for.
    """
    runs, past = read_shipped(folder)
    everything, *experiments = collect_inputs(runs, past=past)
    judged = [part for part in experiments if part.runs["search"].isna().any()]
    return judged or experiments or [everything]


def _between_marks(page: Path, shown: str) -> str:
    text = read_text(page)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{shown}\n\n{END}{after}"


def shown_by(folder: Path, experiments: list[ReportInputs], costs: list[CostInShort | None]) -> str:
    """Return as Markdown what the tables in a folder show: the answer, the verdicts, equal cost, and the means.

    costs: what each experiment says at equal cost.
    """
    texts = []
    several, plan = len(experiments) > 1, folder / PLAN
    for part, cost in zip(experiments, costs, strict=True):
        if several:
            texts.append(block_as_markdown(Heading(literal(str(part.runs["experiment"].iloc[0])))))
        sections = [
            *(each(part) for each in VERDICTS),
            in_short(cost) if cost else (),
            seed_components(part) if part.crosses_seeds else condition_table(part),
            *(each(part) for each in TABLES),
        ]
        blocks = _plain(itertools.chain.from_iterable(sections))
        if len(part.claims):  # the list of claims says what their cards say
            blocks = (block for block in blocks if not isinstance(block, Cards))
        texts += [block_as_markdown(_lower(block) if several else block) for block in blocks]
    if plan.exists():
        try:
            content = json.loads(read_text(plan))
            texts += map(block_as_markdown, planned(content, _runs_of_plan(content, experiments)))
        except ConfigError as error:
            raise ValueError(f"{plan}: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{plan}: is no plan of `moe plan` ({first_line(error)})") from error
    return PAGE.sub(r"[\1](../\1)", "\n\n".join(texts))


def _runs_of_plan(plan: Any, experiments: list[ReportInputs]) -> pd.DataFrame:
    """Return the runs of the experiment whose claims a plan has; of several, those of the most finished seeds.

    Raises ConfigError for what is no plan, and for a plan of other claims, without a fingerprint, or with another one.
    """
    if not is_plan(plan):
        raise ConfigError("is no plan of `moe plan`")
    if "digest" not in plan:
        raise ConfigError("this plan is older than fingerprints of plans and must be made again with `moe plan`")
    if plan["digest"] != digest_of_plan(plan):
        raise ConfigError(f"its fingerprint is {digest_of_plan(plan)} and not {plan['digest']}: it was changed")
    claims = {(claim["text"], claim["metric"], claim["kind"]) for claim in plan["claims"]}
    recorded = [_recorded_claims(part) for part in experiments]
    same = [part.runs for part, found in zip(experiments, recorded, strict=True) if found == claims]
    if not same:
        text, metric, kind = min(claims.symmetric_difference(set[tuple[str, str, str]]().union(*recorded)) or claims)
        raise ConfigError(
            f"its claims must be those of the runs; “{plain(text)}” ({kind}, {metric}) is in one of the two alone"
        )
    return max(same, key=lambda runs: len(finished_seeds(runs)))


def _recorded_claims(part: ReportInputs) -> set[tuple[str, str, str]]:
    """Return the words, the metric and the kind of each claim that the runs of an experiment recorded."""
    return {(claim.text, claim.metric, claim.kind) for claim, _ in planned_claims(part.runs)}


def planned(plan: dict[str, Any], runs: pd.DataFrame) -> Iterator[ReportBlock]:
    """Yield what a plan of `moe plan` says, beside the seeds of the runs that were trained."""
    seeds = finished_seeds(runs)
    made, started = (datetime.fromisoformat(each) for each in (plan["time"], min(runs["started"].dropna())))
    yield Heading("What was planned")
    yield Paragraph(_made(plan, made, started, seeds))
    told = any(claim["spread"] is not None for claim in plan["claims"])
    sources = SOURCES.format(names=enumerated([source["name"] for source in plan.get("sources", PILOT)]))
    order = "before the runs" if made < started else "afterward"
    yield Paragraph(PLANNED.format(order=order, power=100 * plan["power"]) + (sources if told else NO_PILOT))
    most = plan["most_seeds"]

    def number(seeds: int | None) -> str:
        return f"over {most}" if seeds is None or seeds > most else str(seeds)

    def needed(claim: dict[str, Any]) -> str:
        if claim["reachable"] is None:
            return "unknown"
        expected, low, high = (number(claim[key]) for key in ("seeds", "seeds_low", "seeds_high"))
        return expected if low == high else f"{expected} ({low} to {high})"

    def distance(claim: dict[str, Any]) -> str:
        if claim["effect"] is None:
            return "–"
        return f"{claim['effect']:.3g}{' sd' if claim['spread'] is None else ''}"

    rows = [
        {
            "claim": plain(claim["text"]),
            "metric": claim["metric"],
            "distance to the bound": distance(claim),
            "seeds planned": needed(claim),
            "seeds trained": str(len(seeds)),
        }
        for claim in plan["claims"]
    ]
    yield TableBlock(pd.DataFrame(rows))


def _made(plan: dict[str, Any], made: datetime, started: datetime, trained: list[int]) -> str:
    """Return when a plan was made, its fingerprint, and its seeds and runs, beside the seeds that were trained.

    started: when the first run did.
    """
    tuning = f", and {tune} that tune" if (tune := plan.get("runs_that_tune")) else ""
    wanted = {"seeds": numbers_in_words(plan["seeds"]), "runs": plan["runs"], "settings": plan["settings"]}
    return MADE.format(
        time=_moment(made),
        order="before" if made < started else "after",
        started=_moment(started),
        fingerprint=short(plan["digest"]),
        wanted=WANTED.format(**wanted, tuning=tuning) if plan["seeds"] and not plan.get("note") else NOT_WANTED,
        effect=effects_in_words(plan["effect"], plan["effects"]),
        trained=numbers_in_words(trained),
    )


def _moment(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d at %H:%M} UTC"


def _quotes(experiments: list[ReportInputs], costs: list[CostInShort | None]) -> Iterator[tuple[str, str]]:
    """Yield what a mark may name, and the line below it: each claim of a study, each speed-up, sources of spread."""
    for part, cost in zip(experiments, costs, strict=True):
        if part.crosses_seeds:
            yield SPREAD, f"> {literal(spread_sentence(part.runs, part.tested[0]))}\n"
        for _, row in part.claims.iterrows():
            doubt = later_tokens(row["metric"], row["compared"], part)
            evidence = "; ".join(filter(None, (evidence_sentence(row), doubt)))
            yield row["claim"], _quote(row["claim"], row["verdict"], evidence)
        for compared, (verdict, text) in (cost.quotes if cost else {}).items():
            name = AT_EQUAL_COST.format(compared=compared)
            yield name, _quote(name, verdict, text)


def _quote(name: str, verdict: str, text: str) -> str:
    return f"> “{literal(name)}”: **{verdict}**; {literal(text)}\n"


def _with_verdicts(text: str, quotes: dict[str, list[tuple[str, str]]]) -> str:
    """Return a page with the verdict of each claim or speed-up that its marks name. quotes: of each study."""

    def verdict(mark: re.Match[str]) -> str:
        study, claim = mark["study"], mark["claim"]
        if study not in quotes:
            raise ValueError(f"{FINDINGS}: no study {study} has tables; a comment without a study has no colon")
        found = [quote for name, quote in quotes[study] if name == claim]
        if len(found) != 1:
            raise ValueError(f"{FINDINGS}: {study} has {'several claims' if found else 'no claim'} {claim!r}")
        return f"{mark['line']}\n{found[0]}"

    return VERDICT.sub(verdict, text)


def learning_curve(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the mean loss of all finished runs at five moments of training, and that of the best and worst setting."""
    finished = inputs.runs.loc[inputs.runs["status"] == "finished", "folder"]
    evals = inputs.with_condition(inputs.past.evals[inputs.past.evals["folder"].isin(finished)])
    if evals.empty or LOSS not in evals:
        return
    table = evals.pivot(index=["condition", "seed"], columns="step", values=LOSS).dropna(axis="columns")
    moments = [min(table, key=lambda step: abs(step - quarter * table.columns[-1] / 4)) for quarter in range(5)]
    means = table[list(dict.fromkeys(moments))].groupby("condition").mean()
    columns = {"mean": means.mean(), "best setting": means.min(), "worst setting": means.max()}
    told = pd.DataFrame({name: column.map("{:.3f}".format) for name, column in columns.items()})
    yield Heading("How the loss fell")
    yield Paragraph(CURVE)
    yield TableBlock(told.rename_axis("step").reset_index())


VERDICTS = (answer, claim_verdicts, league, how_much_routing_matters, scaling_laws)
TABLES = (tuning, learning_curve)


def _lower(block: ReportBlock) -> ReportBlock:
    return block._replace(level=block.level + 1) if isinstance(block, Heading) else block


def _plain(blocks: Iterator[ReportBlock]) -> Iterator[ReportBlock]:
    """Yield blocks without files, figures, and the marks of what is closed."""
    for block in blocks:
        if isinstance(block, Details):
            yield from _plain(iter(block.blocks))
        elif not isinstance(block, Attachment | Drawing):
            yield block


if __name__ == "__main__":
    sys.exit(main())
