"""The first screen of a report: the question, the verdicts, the best setting and its cost, the set-up, and warnings."""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from statsmodels.stats.weightstats import DescrStatsW

from moe.analysis.report.blocks import (
    BulletList,
    Card,
    Cards,
    Details,
    Facts,
    Heading,
    Interval,
    Paragraph,
    ReportBlock,
    TableBlock,
)
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.sections.search import levels_from_a_search, search_result
from moe.analysis.sentences import (
    DETERMINISTIC,
    EQUIVALENT,
    SIGNIFICANT,
    UNDECIDED,
    UNTESTED,
    directions,
    levels_compared,
    standing,
    unit_of,
)
from moe.analysis.statistics import CONFIDENCE, has_no_spread, name_cell, seeds_needed
from moe.checks import plain
from moe.metrics.catalog import lookup
from moe.results.comparable import several_tokenizers
from moe.results.conditions import by_seed, conditions, levels, without_causality
from moe.results.table import ABSENT
from moe.runs.record import RecordError, SweepRecord

MOST_CARDS = 6  # that are visible at once
CERTAINTY = [SIGNIFICANT, EQUIVALENT, DETERMINISTIC, UNDECIDED, UNTESTED]
TONES = {"supported": "good", "equivalent": "good", "contradicted": "bad", "better": "good", "worse": "bad"}
PICTURES_EXPLAINED = """\
Dot: the estimated difference. Line: its 95 % interval. Dashed: no difference. Pictures of one metric have one scale."""
CLAIMED = " Box: the differences that the claim allows."
ONE_SEED = "With one seed nothing tells a difference from chance: train at least three seeds, such as `seed=42,43,44`."


def answer(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield what a reader wants to know first."""
    if inputs.search:
        yield from search_result(inputs)
        yield Facts(_setup(inputs))
        return
    yield Paragraph(f"**Question:** {_question(inputs)}")
    cards = _claim_cards(inputs) or _contrast_cards(inputs)
    if cards:
        counts = Counter(card.verdict for card in cards)
        kind = "planned claims" if len(inputs.claims) else "comparisons of the first metric that nobody planned"
        told = ", ".join(f"**{count} {verdict}**" for verdict, count in counts.items())
        open_ = "" if any(card.tone != "idle" for card in cards) else " These seeds decide none of them."
        yield Paragraph(f"{len(cards)} {kind}: {told}.{open_}")
        yield Cards(cards[:MOST_CARDS])
        yield Paragraph(PICTURES_EXPLAINED + (CLAIMED if len(inputs.claims) else ""))
        if cards[MOST_CARDS:]:
            yield Details(f"{len(cards) - MOST_CARDS} more", [Cards(cards[MOST_CARDS:])])
    yield from map(Paragraph, _best_setting(inputs))
    yield Facts(_setup(inputs))
    if warnings := list(_warnings(inputs)):
        yield BulletList(warnings)
    yield from levels_from_a_search(inputs)


def index_of_verdicts(experiments: dict[str, ReportInputs]) -> Iterator[ReportBlock]:
    """Yield a table with a row for each experiment: its question, how its claims stand, and its best setting."""
    rows = []
    for name, inputs in experiments.items():
        counts = Counter(card.verdict for card in _claim_cards(inputs) or _contrast_cards(inputs))
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        finished = f"{(inputs.runs['status'] == 'finished').sum()} of {len(inputs.runs)}"
        best = next(iter(_best(inputs)), None)
        rows.append(
            {
                "experiment": name,
                "question": "search for good settings" if inputs.search else _question(inputs),
                "verdicts": verdicts or "none",
                "best setting": best[0] if best else "–",
                "runs finished": finished,
            }
        )
    yield Heading("Verdicts of all experiments")
    yield TableBlock(pd.DataFrame(rows))


def _question(inputs: ReportInputs) -> str:
    """Return the question that the experiment asks, or one that its factors suggest."""
    asked = inputs.loaded["question"].dropna().unique() if "question" in inputs.loaded else ()
    if written := [str(text) for text in asked if str(text).strip()]:
        return " ".join(dict.fromkeys(written))
    if not inputs.factors:
        return "How much do runs differ by chance alone, if nothing but the seed varies?"
    return f"What does a change of {' and '.join(inputs.factors)} do to {_named(inputs.tested) or 'the model'}?"


def _named(metrics: Iterable[str]) -> str:
    return " and ".join(unit_of(metric) for metric in metrics)


def _claim_cards(inputs: ReportInputs) -> list[Card]:
    """Return a card for each planned claim, the decided ones first."""
    claims = inputs.claims
    if claims.empty:
        return []
    axes = {metric: _span(rows) for metric, rows in claims.groupby("metric")}
    cards = [_claim_card(row, axes[row["metric"]]) for _, row in claims.iterrows()]
    return sorted(cards, key=lambda card: card.tone == "idle")


def _claim_card(claim: pd.Series, axis: tuple[float, float]) -> Card:
    verdict = claim["verdict"] if claim["n"] > 1 else "not tested"
    unit = unit_of(claim["metric"])
    if claim["n"] == 0:
        return Card(claim["claim"], verdict, "idle", str(claim["reason"]))
    share = f" ({claim['difference'] / claim['reference mean']:+.1%})" if claim["reference mean"] else ""
    if claim["kind"] == "interaction":
        share = ""
    effect = f"{claim['compared']}: **{_difference(claim)} {unit}**{share}{_certainty(claim)}, n={claim['n']}"
    claimed = (claim["claimed_low"], claim["claimed_high"])
    if all(map(math.isfinite, claimed)):
        effect += f"; claimed: {claimed[0]:.3g} to {claimed[1]:.3g}"
    outcome = "contradict" if claim["estimates"] == "against" else "support"
    advice = _needed(claim["seeds needed"], claim["n"], outcome) if verdict == "undecided" else ""
    return Card(
        claim["claim"], verdict, TONES.get(verdict, "idle"), plain(effect), advice, _interval(claim, axis, claimed)
    )


def _contrast_cards(inputs: ReportInputs) -> list[Card]:
    """Return a card for each comparison of the first tested metric, the most certain ones first."""
    metric = next(iter(inputs.tested), None)
    if inputs.contrasts.empty or metric is None:
        return []
    rows = inputs.contrasts[(inputs.contrasts["metric"] == metric) & (inputs.contrasts["n"] > 0)]
    axis, cards = _span(rows), []
    for _, c in rows.iterrows():
        known = standing(c)
        up, down = directions(metric)
        verdict = (up if c["difference"] > 0 else down) if known == SIGNIFICANT else known
        effect = f"**{_difference(c)} {unit_of(metric)}**{_certainty(c)}, n={c['n']}"
        advice = ""
        if known == UNDECIDED:
            needed = seeds_needed(c["d_z"], tests=max(c["tests"], 1))
            advice = _needed(math.nan if needed is None else needed, c["n"], "decide")
        card = Card(
            levels_compared(c), verdict, TONES.get(verdict, "idle"), plain(effect), advice, _interval(c, axis, None)
        )
        cards.append((CERTAINTY.index(known), c["p"], card))
    return [card for *_, card in sorted(cards, key=lambda each: each[:2])]


def _difference(row: pd.Series) -> str:
    return f"{row['difference']:+.3g}"


def _certainty(row: pd.Series) -> str:
    """Return the interval and the corrected p of a difference, as far as it has them."""
    if row["deterministic"]:
        return ", the same in every seed"
    if pd.isna(row["p"]):
        return ""
    return f" [{row['ci_low']:.3g}, {row['ci_high']:.3g}], p={row['p Holm']:.2g} after correction"


def _needed(seeds: int | float, n: int, outcome: str) -> str:
    """Return what would decide a comparison that n seeds leave undecided."""
    if math.isnan(seeds):
        return "More than 1,000 seeds would be needed, if the true difference is the estimated one."
    more = max(1, int(seeds) - n)
    word = "seed" if more == 1 else "seeds"
    return f"About {more} more {word} would {outcome} it, if the true difference is the estimated one."


def _span(rows: pd.DataFrame) -> tuple[float, float]:
    """Return the ends of an axis that shows all differences, their intervals, the finite ends of claims, and 0."""
    columns = [name for name in ("difference", "ci_low", "ci_high", "claimed_low", "claimed_high") if name in rows]
    ends = pd.concat([rows[column] for column in columns]).astype(float)
    ends = ends[ends.map(math.isfinite)]
    low, high = min(0.0, ends.min()), max(0.0, ends.max())
    return (low, high) if high > low else (low - 1, high + 1)


def _interval(row: pd.Series, axis: tuple[float, float], claimed: tuple[float, float] | None) -> Interval | None:
    if pd.isna(row["difference"]):
        return None
    return Interval(row["difference"], row["ci_low"], row["ci_high"], *axis, claimed)


def _best(inputs: ReportInputs) -> list[tuple[str, pd.Series, pd.DataFrame]]:
    """Return the settings with their values of the first metric of quality by seed and their runs, the best first.

    Routers that see later tokens are left out if others do not: their losses are not comparable.
    """
    metric = _quality(inputs)
    if metric is None or not inputs.factors:
        return []
    runs = inputs.runs[inputs.runs["status"] == "finished"]
    if (runs["causal"] == True).any():  # noqa: E712 (it may be unknown)
        runs = runs[runs["causal"] != False]  # noqa: E712
    found = []
    for cell, members in conditions(runs, inputs.factors):
        if len(values := by_seed(members, metric)):
            known = {factor: level for factor, level in cell.items() if level != ABSENT}
            found.append((name_cell(known), values, members))
    return sorted(found, key=lambda each: each[1].mean())


def _quality(inputs: ReportInputs) -> str | None:
    """Return the first tested metric of which less is better and that measures quality."""
    metrics = ((name, lookup(name)) for name in inputs.tested)
    fits = (name for name, metric in metrics if metric and metric.group == "quality" and metric.better == "lower")
    return next(fits, None)


def _best_setting(inputs: ReportInputs) -> Iterator[str]:
    """Yield a sentence about the setting with the best mean, what it costs, and how sure its lead is."""
    ranked = _best(inputs)
    if len(ranked) < 2:
        return
    (name, values, members), (other, other_values, _) = ranked[:2]
    unit = unit_of(str(_quality(inputs)))
    spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    text = f"**Best setting here:** {name}, with a {unit} of {values.mean():.4g}{spread} (n={len(values)})"
    text += f", of {len(ranked)} settings"
    lead = (other_values - values).dropna()
    text += f". The next one, {other}, is {lead.mean():.2g} behind" if len(lead) else ""
    if len(lead) > 1 and not has_no_spread(lead.to_numpy(), scale=float(values.abs().max())):
        low, high = DescrStatsW(lead.to_numpy()).tconfint_mean(1 - CONFIDENCE)
        text += f" [{low:.2g}, {high:.2g}]" + (", so the order of the two may be luck" if low < 0 else "")
    yield plain(text) + ". A setting that was chosen because it is the best looks better than it is."
    seconds = members["train_seconds"].mean()
    everything = [cost for *_, each in ranked if math.isfinite(cost := each["train_seconds"].mean())]
    if math.isfinite(seconds) and seconds > 0 and len(everything) == len(ranked):
        fastest = f", {seconds / min(everything):.2f} times as long as the fastest setting" if seconds else ""
        total = _duration(inputs.runs.drop_duplicates("folder")["train_seconds"].sum())
        yield (
            f"**Its cost:** {_duration(seconds)} of training a run{fastest}; all runs together: {total}. "
            "Times hold for this machine and what else it did."
        )


def _setup(inputs: ReportInputs) -> list[tuple[str, str]]:
    """Return the facts without which no number of the page can be judged."""
    runs = inputs.runs.drop_duplicates("folder")
    finished = runs[runs["status"] == "finished"]
    seeds = ", ".join(map(str, levels(runs["seed"]))) if "seed" in runs else "unknown"
    facts = [("Runs", f"{len(finished)} of {len(runs)} finished; seeds {seeds}")]
    grids = [name for name in levels(inputs.runs["experiment"]) if ": " in name]
    facts += [("Settings that differ from the experiment's own", name.partition(": ")[2]) for name in grids]
    total, active = (_range(finished, f"parameters.{part}", _count) for part in ("total", "active"))
    if total:
        facts.append(("Model", f"{total} parameters, {active} of them used by a token"))
    sizes = ["steps", "batch_size", "grad_accum", "data.seq_len"]
    if set(sizes) <= set(runs):
        tokens = runs[sizes].astype(float).prod(axis=1)
        steps = _range(runs, "steps", lambda value: f"{value:,.0f}")
        facts.append(
            ("Training", f"{_range(pd.DataFrame({'tokens': tokens}), 'tokens', _count)} tokens in {steps} steps")
        )
    source = _texts(runs, "data")
    tokenizer = _texts(runs, "data.tokenizer")
    words = _range(runs, "data.vocab_size", lambda value: f"{value:,.0f}")
    if source:
        facts.append(
            ("Data", f"{source}; tokenizer {tokenizer or 'trained on it'}" + (f", {words} tokens" if words else ""))
        )
    if days := sorted({str(start)[:10] for start in runs["started"].dropna()}):
        facts.append(("Date", " to ".join(dict.fromkeys((days[0], days[-1])))))
    if command := _command(inputs):
        facts.append(("Repeat", f"`{command}`"))
    return facts


def _command(inputs: ReportInputs) -> str:
    """Return the command that trains these runs, as their sweep.json tells it; an empty text if there is none."""
    runs = inputs.runs
    parents = {Path(folder).parent for folder in runs["folder"]}
    try:
        [parent] = parents
        record = SweepRecord.read(parent / SweepRecord.FILE)
    except (ValueError, RecordError):
        return ""
    grid = record.grid_with(*(Path(folder).name for folder in runs["folder"]))
    if grid is None or grid.search:
        return ""
    experiment = grid.name.partition(": ")[0]
    words = [f"experiment={experiment}"] if experiment != "default" else []
    words += [f"{key}={value}" for key, value in grid.fixed.items() if value is not None]
    for factor in (*grid.factors, "seed"):
        values = [without_causality(level) for level in levels(runs[factor])] if factor in runs else []
        given = dict.fromkeys(str(value) for value in values if value != ABSENT)
        words += [f"{factor}={','.join(given)}"] if given else []
    return f"python train.py -m {shlex.join(words)}"


def _warnings(inputs: ReportInputs) -> Iterator[str]:
    """Yield what changes how the page is to be read."""
    runs = inputs.runs.drop_duplicates("folder")
    lost = len(runs) - (runs["status"] == "finished").sum()
    if lost:
        yield f"**{lost} of {len(runs)} runs did not finish**, and no result includes them."
    if "seed" in runs and runs["seed"].nunique() == 1:
        yield ONE_SEED
    if several_tokenizers(runs):
        yield "The runs have different tokenizers, so only bits per byte are comparable between them."
    if (runs["causal"] == False).any() and (runs["causal"] == True).any():  # noqa: E712
        yield "Routers marked (not causal) see later tokens. Their losses are not comparable with those of the others."
    followers = [
        key for key, leader in inputs.tied.items() if not key.startswith(f"{leader}.") and leader != "experiment"
    ]
    if followers := [key for key in followers if key != "experiment"]:
        names = ", ".join(followers)
        yield f"{names}: changes only together with another factor, so the two effects cannot be told apart."


def _range(runs: pd.DataFrame, column: str, text: Any) -> str:
    """Return the values of a column of numbers: the one that all runs have, or the smallest and the largest."""
    values = pd.to_numeric(runs[column], errors="coerce").dropna() if column in runs else pd.Series(dtype=float)
    ends = dict.fromkeys(text(value) for value in (values.min(), values.max())) if len(values) else {}
    return " to ".join(ends)


def _texts(runs: pd.DataFrame, column: str) -> str:
    values = levels(runs[column]) if column in runs else []
    return ", ".join(str(value) for value in values if value not in (ABSENT, ""))


def _count(number: Any) -> str:
    """Return a number with three digits and the unit thousand, million or billion."""
    for size, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _duration(seconds: Any) -> str:
    return f"{seconds / 60:.3g} minutes" if seconds >= 100 else f"{seconds:.3g} seconds"
