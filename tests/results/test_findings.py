"""Tests that the numbers in the prose of findings and of studies are those of the shipped tables.

The table below has a page, a part of one of its sentences with places for numbers, and where the numbers come from.
Quoted verdicts and what `moe.analysis.pages` writes are tested elsewhere. Not here are numbers that no table holds:
shares of p, what earlier versions of a study did, and the size of the text.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from moe.analysis.pages import BEGIN, FINDINGS
from moe.analysis.report.sections.headline import NO_COMPARISON
from moe.results.shipped import RUNS, STUDIES

CAPACITY, NOISE, LEAGUE, SPECTRA = "capacity_factorial", "noise_lb_seed", "router_league", "spectra_ablation"
A, C, SCALING, SEEDS = "experiment_a", "experiment_c", "scaling", "seed_components"
TEMPERATURES, CHOSEN, SCHEDULES = "temperature_ablation", "temperature_best_long", "temperature_schedules"
STUDIES_OF_FINDINGS = (CAPACITY, NOISE, LEAGUE, SPECTRA, A, C, SCALING, SEEDS, TEMPERATURES, CHOSEN, SCHEDULES)

# Claims, by a part of their text that no other claim of the study has.
RISE, WEIGHT, WIDE, TIGHT, SECOND = "(+14)", "does not change", "factor 2.0", "costs quality", "A second expert"
NO_LOSS, SAME, BEST, PARTS = "without a loss", "matches", "is best", "Each part"

NUMBERS: list[tuple[str, str, Callable[[], Iterable[object]]]] = [
    # Findings: what all studies share.
    (FINDINGS, "models of less than {} million parameters", lambda: [a_or_word(math.ceil(largest_model() / 1e6))]),
    (FINDINGS, "{} of them after {} million tokens of mixed text", lambda: usual_length()),
    (FINDINGS, "1 % of perplexity is {} nats of loss", lambda: [f"{math.log(1.01):.2f}"]),
    (FINDINGS, "1 % of the loss is here about {} % of perplexity", lambda: [f"{perplexity(mean_loss() / 100):.0f}"]),
    (FINDINGS, "{} routers of the league were trained a second time", lambda: [word(len(trained_again()))]),
    # Noise and balance weight.
    (FINDINGS, "## Noise {} does not cost {} to {} % of perplexity here", lambda: [*levels(NOISE, RISE), *rise()[1:]]),
    (FINDINGS, "The noise study reported +{} perplexity for noise {}.", lambda: [rise()[0], *levels(NOISE, RISE)]),
    (
        FINDINGS,
        "## Balance weight {} lowers the load CV, and changes perplexity by less than {} %",
        lambda: [*levels(NOISE, WEIGHT), margin(NOISE, WEIGHT)],
    ),
    (FINDINGS, "Other weights than {},", lambda: levels(NOISE, WEIGHT)),
    (NOISE, "{} strengths of routing noise", lambda: [word(runs(NOISE)["noise"].nunique())]),
    (NOISE, "load-balance loss, {} seeds each", lambda: [word(seeds_each(NOISE, ["noise", "lb"]))]),
    (NOISE, "a rise of {} in perplexity for noise {}.", lambda: [rise()[0], *levels(NOISE, RISE)]),
    (NOISE, "changes perplexity by less than {} %", lambda: [margin(NOISE, WEIGHT)]),
    # Capacity.
    (FINDINGS, "a wide one less than {} % of the loss", lambda: [margin(CAPACITY, WIDE)]),
    (FINDINGS, "Half a percent of the loss is about {} % of perplexity", lambda: [f"{perplexity(half_percent()):.1f}"]),
    (
        FINDINGS,
        "loses {} % of its assignments at a factor of {}, and {} % at a factor of {}. Its loss is then {} and {} nats",
        lambda: [
            *(f"{100 * under_limit('1.0')['drop_rate']:.1f}", "1.0"),
            *(f"{100 * under_limit('2.0')['drop_rate']:.1f}", "2.0"),
            *(f"{under_limit(each)['loss'] - under_limit('none')['loss']:.3f}" for each in ("1.0", "2.0")),
        ],
    ),
    *(
        (CAPACITY, "| {} | {} | {} | {} |", lambda factor=factor: row_of_limits(factor))
        for factor in ("1.0", "1.25", "2.0", "none")
    ),
    (CAPACITY, "Means over {} seeds and both numbers", lambda: [runs(CAPACITY)["seed"].nunique()]),
    (
        FINDINGS,
        "## {} experts per token are better than {}, for {} the work",
        lambda: [
            *map(word, [*levels(CAPACITY, SECOND), *than(CAPACITY, SECOND)]),
            times(levels(CAPACITY, SECOND)[0] / than(CAPACITY, SECOND)[0]),
        ],
    ),
    (
        CAPACITY,
        "A factor of {:.1f} costs quality, and a factor of {:.1f} changes the loss by less than {} %, which is {} nats",
        lambda: [
            *claim(CAPACITY, TIGHT)["levels"],
            *claim(CAPACITY, WIDE)["levels"],
            margin(CAPACITY, WIDE),
            f"{half_percent():.4f}",
        ],
    ),
    (CAPACITY, "# Capacity, with {} expert per token and with {}", lambda: map(word, numbers_of_experts())),
    (CAPACITY, "training costs, with {} expert per token and with {}.", lambda: map(word, numbers_of_experts())),
    (CAPACITY, "costs more with {} expert than with {} is", lambda: map(word, numbers_of_experts())),
    (CAPACITY, "the plan asked for {} seeds", lambda: [word(planned(CAPACITY, "more quality")["seeds"])]),
    # The league.
    (FINDINGS, "one expert of {} the width has a {} loss too", lambda: [width_of("switch"), side_of("switch")]),
    (FINDINGS, "best of {} learning rates by {} seed, which was the {} one for {}.", lambda: tuned()),
    (FINDINGS, "{} router is shown to have a lower loss than top-k.", lambda: [word((league()["high"] < 0).sum())]),
    (
        FINDINGS,
        "The lowest loss is that of `{}`: {} nats per token, with a difference from top-k of {} [{}, {}], n={}.",
        lambda: [lowest(), f"{losses()[lowest()].mean():.3f}", *difference(lowest()), len(losses())],
    ),
    (FINDINGS, "the difference is {} [{}, {}] nats, n={}.", lambda: [*difference("hash"), len(losses())]),
    (
        FINDINGS,
        "`oracle` has {} expert for a token, of {} the width.",
        lambda: [word(experts(LEAGUE, "oracle")), width_of("oracle")],
    ),
    (
        FINDINGS,
        "{} expert instead of {} may explain most of the difference",
        lambda: [word(experts(LEAGUE, router)) for router in ("switch", "topk")],
    ),
    (FINDINGS, "That was claimed to cost no quality, within {} % of the loss", lambda: [margin(LEAGUE, NO_LOSS)]),
    (FINDINGS, "The {} routers are among those", lambda: [word(len(trained_again() & {*levels(LEAGUE, NO_LOSS)}))]),
    (
        FINDINGS,
        "The difference of `sigmoid_bias` is below {} %, but not zero: its interval leaves out 0, and {} % of this "
        "loss is about {} % of perplexity.",
        lambda: [
            margin(LEAGUE, NO_LOSS),
            f"{100 * league()['mean']['sigmoid_bias'] / losses()['topk'].mean():.1f}",
            f"{perplexity(league()['mean']['sigmoid_bias']):.0f}",
        ],
    ),
    (FINDINGS, "Top-k has a balance loss of weight {} here.", lambda: of_router("topk", "lb").unique()),
    (
        FINDINGS,
        "(means over layers and {} seeds: {} and {} instead of {})",
        lambda: [
            len(losses()),
            *(f"{load_cv()[router].mean():.3f}" for router in ("sigmoid_bias", "quantile_balancing", "topk")),
        ],
    ),
    (FINDINGS, "differ from that of top-k by {} than the spread of top-k over seeds", lambda: [near_in_load()]),
    (
        FINDINGS,
        "its load is {} even than that of top-k ({} instead of {}, layers pooled {} instead of {})",
        lambda: uneven("phi_balancing"),
    ),
    (
        FINDINGS,
        "The loss of `quantile_balancing`, for example, is {} on the test text: {} [{}, {}].",
        lambda: [
            "undecided"
            if league()["low"]["quantile_balancing"] < 0 < league()["high"]["quantile_balancing"]
            else "not",
            *difference("quantile_balancing"),
        ],
    ),
    (LEAGUE, "{} are left out: `replay`", lambda: [word(len(list(CONF.glob("*.yaml"))) - losses().shape[1])]),
    (LEAGUE, "with `topk` and experts of width {}.", lambda: of_router("topk", "model.ffn").unique()),
    (LEAGUE, "with experts of width {}, so", lambda: {*of_router("soft_moe", FFN), *of_router("spectra", FFN)}),
    (
        LEAGUE,
        "`router.mean_k={}` names; at the end it took {},",
        lambda: [f"{float(of_router('top_p', 'router.mean_k').iloc[0]):g}", f"{experts(LEAGUE, 'top_p'):.2f}"],
    ),
    (LEAGUE, "In evaluation it takes {:.0f} experts", lambda: [experts(LEAGUE, "matryoshka")]),
    (
        LEAGUE,
        "`base_layers`, `oracle`, `shuffled_oracle`, `switch` and `switch_jitter` have {} expert for a token, of {} "
        "the width",
        lambda: one([word(experts(LEAGUE, each)), width_of(each)] for each in wide_with_one()),
    ),
    (LEAGUE, "{} learning rates for each router", lambda: tuned()[:1]),
    (LEAGUE, "by the validation loss of {} run each", lambda: tuned()[1:2]),
    (LEAGUE, "{} routers chose the {} one.", lambda: tuned()[:1:-1]),
    (LEAGUE, "{} other seeds judge the routers", lambda: [word(len({*runs(LEAGUE)["seed"]} - {*searches()["seed"]}))]),
    (LEAGUE, "its default balance weight: {}, or {} if", lambda: [f"{each:g}" for each in balance_weights()]),
    (LEAGUE, "the {} routers whose default is 0 were", lambda: [word(len(trained_again()))]),
    (LEAGUE, "The tokens per second of these {} are", lambda: [word(len(trained_again()))]),
    (LEAGUE, "and those of the {} routers, which", lambda: [word(len(trained_again()))]),
    (LEAGUE, "The {} minutes of all runs below include {} minutes of `top_p`", lambda: minutes()),
    # Routers under a capacity limit.
    (
        FINDINGS,
        "Trained at capacity factor {}, it is better than switch, which sends a token to {} expert",
        lambda: [one(limits(C)), word(experts(C, "switch"))],
    ),
    (FINDINGS, "## Of {} routers that train with a limit, {} has the lowest perplexity", lambda: order_of_a()),
    (FINDINGS, "and switch has {} expert per token.", lambda: [word(experts(A, "switch"))]),
    (FINDINGS, "the order of the {} routers is known", lambda: order_of_a()[:1]),
    (FINDINGS, "equals softk within {} % is undecided", lambda: [margin(C, SAME)]),
    (A, "# {} routers, {} capacity factors", lambda: [*order_of_a()[:1], word(len(limits(A)))]),
    (A, "over the {} capacity factors {} has the lowest", lambda: [word(len(limits(A))), *order_of_a()[1:]]),
    (
        A,
        "over the {} routers a factor of {} is better than {}.",
        lambda: [*order_of_a()[:1], *mean_of(A, "capacity", "test/perplexity").sort_values().index],
    ),
    (
        A,
        "switch sends a token to {} expert and the others to {},",
        lambda: [word(experts(A, "switch")), word(one(experts(A, each) for each in ("softk", "topk_hard")))],
    ),
    (A, "The {} claims about speed", lambda: [word(claims_on_speed(A))]),
    (C, "# {} routers at capacity factor {}", lambda: [word(runs(C)["router"].nunique()), one(limits(C))]),
    (C, "switch, softk and topk_hard drop {} to {} %", lambda: dropped("switch", "softk", "topk_hard")),
    (C, "hash takes {} experts for a token and switch {},", lambda: [word(experts(C, r)) for r in ("hash", "switch")]),
    (C, "compares hash with the {} others alone", lambda: [word(len(than(C, "balances the load")))]),
    # Temperature.
    (FINDINGS, "## Temperature and its schedule: {} of {} claims is decided", lambda: decided_on_temperature()),
    (FINDINGS, "expected a constant temperature of {} to {} to be best", lambda: levels(TEMPERATURES, BEST)),
    (
        FINDINGS,
        "in the temperature study is {:g}, and the best of {} looks better than it is.",
        lambda: best_temperature(),
    ),
    (
        FINDINGS,
        "So temperature {} was compared with {} once more, by {} other seeds and after {} as many steps.",
        lambda: [*levels(CHOSEN, "chosen"), *than(CHOSEN, "chosen"), word(len(new_seeds())), times(lengths())],
    ),
    (FINDINGS, "do not confirm the lead of temperature {}:", lambda: levels(CHOSEN, "chosen")),
    (FINDINGS, "By its intervals, which hold together, {} costs more than {}.", lambda: wasteful_temperatures()),
    (TEMPERATURES, "{} constant temperatures of the router.", lambda: best_temperature()[1:]),
    (TEMPERATURES, "expected {} to {} to be best", lambda: levels(TEMPERATURES, BEST)),
    (
        TEMPERATURES,
        "compared with {1}? By its intervals, which hold for all {2} comparisons together, {0} costs more.",
        lambda: [*wasteful_temperatures(), word(len(at_equal_cost(TEMPERATURES)))],
    ),
    (TEMPERATURES, "No claim was about temperature {} alone", lambda: wasteful_temperatures()[:1]),
    (CHOSEN, "has {:g} as the best of {} constant temperatures", lambda: best_temperature()),
    (CHOSEN, "The best of {} looks better than it is", lambda: best_temperature()[1:]),
    (CHOSEN, "it is compared with {} by seeds", lambda: than(CHOSEN, "chosen")),
    (CHOSEN, "after {} as many steps", lambda: [times(lengths())]),
    (
        CHOSEN,
        "also names {} seeds that had a part",
        lambda: [word(len({*plan(CHOSEN)["seeds"]} & {*runs(TEMPERATURES)["seed"]}))],
    ),
    (SCHEDULES, "# Schedules of temperature, from {:g} to 1", lambda: starts()),
    (SCHEDULES, "{} schedules that lower the temperature", lambda: [word(len(levels(SCHEDULES, "Every")))]),
    (SCHEDULES, "With {} seeds no schedule", lambda: [word(seeds_each(SCHEDULES, ["schedule"]))]),
    (SCHEDULES, "a difference of about {} nats", lambda: [f"{max(detectable(SCHEDULES)):.2f}"]),
    # Sizes, tokens and experts.
    (FINDINGS, "with {} seeds for each setting", lambda: [word(seeds_each(SCALING, SETTING))]),
    (
        FINDINGS,
        "the {} of {} sizes has the lowest loss, at the middle one the {} size, and at the largest one the {} size.",
        lambda: best_sizes(),
    ),
    (
        FINDINGS,
        "At {} of the {} pairs of size and budget, {} experts have a lower mean loss than {}.",
        lambda: more_experts(),
    ),
    (
        SCALING,
        "models of {} widths, with {} and {} experts, trained at {} budgets",
        lambda: [word(len(widths())), *more_experts()[:1:-1], word(runs(SCALING)["variant"].nunique())],
    ),
    (SCALING, "Width {} has heads of {:.0f} values", lambda: [min(widths()), min(widths()) / heads()]),
    (SCALING, "a parabola through {} sizes", lambda: [word(len(widths()))]),
    # SPECTRA.
    (FINDINGS, "The second claim is about {} parts", lambda: [word(len(levels(SPECTRA, PARTS)))]),
    (SPECTRA, "# SPECTRA, its parts and {} baselines", lambda: [word(baselines())]),
    (SPECTRA, "SPECTRA without each of its parts, and {} baselines", lambda: [word(baselines())]),
    (SPECTRA, "one model size with {} million parameters", lambda: [{0.5: "half a"}[one(half_millions())]]),
    (SPECTRA, "(`dense_ffn` is {}, the experts and the shared expert together are {})", lambda: widths_of_spectra()),
    (SPECTRA, "it names {} seeds of the first study, {} to {};", lambda: old_seeds()),
    (
        SPECTRA,
        "asked for {} seeds for the {} claims within its reach, and said that {} would not be enough for the other {}.",
        lambda: reach(),
    ),
    (SPECTRA, "The study was made with {} seeds.", lambda: [runs(SPECTRA)["seed"].nunique()]),
    (SPECTRA, "enough for {} of the claims that the study tests", lambda: [word(in_reach_and_tested())]),
    # Seeds.
    (
        FINDINGS,
        "crossed {} seeds of the initial weights with {} of the data order",
        lambda: map(word, seeds_crossed()[1:]),
    ),
    (
        SEEDS,
        "{} runs of one setting: {} seeds of the initial weights with {} seeds of the data order",
        lambda: map(word, seeds_crossed()),
    ),
    # Cost and speed.
    (FINDINGS, "of {} routers of the league {} saves compute over plain top-k, and {} cost more:", lambda: dearer()),
    (
        FINDINGS,
        "the most `{}` ({}), `{}` ({}), `{}` ({}) and `{}` ({}), the least `{}` ({}).",
        lambda: extremes_of_cost(),
    ),
    (
        FINDINGS,
        "{} others have no verdict, because they may see later tokens",
        lambda: [word((at_equal_cost(LEAGUE)["verdict"] == "not comparable").sum())],
    ),
    (FINDINGS, "{} claims are about speed", lambda: [word(sum(map(claims_on_speed, STUDIES_OF_FINDINGS)))]),
]


def test_findings_say_which_losses_are_not_comparable_as_the_pages_of_studies_do() -> None:
    quotes = re.findall(r"(?m)^<!-- (\w+): (.*) -->\n(> .*)$", text_of(FINDINGS))
    warned = []
    for study, text, quote in quotes:
        lines = [line for line in text_of(study).splitlines() if line.startswith(f"- {text} (")]
        if any(NO_COMPARISON in line for line in lines):
            warned.append(study)
            assert NO_COMPARISON in quote, text
    assert {*warned} == {"experiment_c", "spectra_ablation"}


@pytest.mark.parametrize(("page", "sentence", "numbers"), NUMBERS, ids=[f"{page}: {text}" for page, text, _ in NUMBERS])
def test_prose_has_the_numbers_of_the_tables(page: str, sentence: str, numbers: Callable[[], Iterable[object]]) -> None:
    expected = sentence.format(*numbers())
    found = re.findall(rf"(?<!\w){re.escape(expected.lower())}(?!\w)", prose(page))
    assert len(found) == 1, f"{page} must say once: {expected}"


# --- Pages, tables, claims and plans

CONF = STUDIES.parents[1] / "conf" / "router"
FFN, SETTING = "model.ffn", ["variant", "model.dim", "model.num_experts"]
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WORDS += ["thirteen", "fourteen"]


@cache
def text_of(page: str) -> str:
    return (STUDIES.parent / page if page == FINDINGS else STUDIES / f"{page}.md").read_text()


@cache
def prose(page: str) -> str:
    """Return what was written by hand, in lower case and on one line."""
    written = text_of(page).partition(BEGIN)[0]
    lines = [line for line in written.splitlines() if not line.startswith(("> ", "<!--"))]
    return " ".join(" ".join(lines).split()).lower()


@cache
def table(study: str) -> pd.DataFrame:
    return pd.read_csv(STUDIES / study / RUNS, low_memory=False)


@cache
def runs(study: str) -> pd.DataFrame:
    """Return the runs of a study that judge, without those that tune."""
    return table(study)[lambda rows: rows["search"].isna()] if "search" in table(study) else table(study)


def searches() -> pd.DataFrame:
    return table(LEAGUE)[lambda rows: rows["search"].notna()]


def claims(study: str) -> list[dict[str, Any]]:
    recorded = table(study)["claims"].dropna().unique() if "claims" in table(study) else []
    return [each for text in recorded for each in json.loads(text)]


def claim(study: str, part: str) -> dict[str, Any]:
    return one(each for each in claims(study) if part in each["text"])


def levels(study: str, part: str) -> list[Any]:
    return shortly(claim(study, part)["levels"])


def than(study: str, part: str) -> list[Any]:
    return shortly(claim(study, part)["than"])


def shortly(values: Iterable[Any]) -> list[Any]:
    """Return 2.0 as 2, as a sentence has it."""
    return [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]


def margin(study: str, part: str) -> str:
    return claim(study, part)["margin"].removesuffix("%")


@cache
def plan(study: str) -> dict[str, Any]:
    return json.loads((STUDIES / study / "plan.json").read_text())


def under_limit(capacity: str) -> pd.Series:
    """Return the means of evaluation with the limit of training; without a limit, nothing is dropped."""
    members = runs(CAPACITY)[lambda rows: rows["capacity"] == capacity]
    values = {each: members[f"val_capacity/{each}"].mean() for each in ("loss", "drop_rate")}
    without = {"loss": members["val/loss"].mean(), "drop_rate": 0.0}
    return pd.Series(without if capacity == "none" else values)


def row_of_limits(capacity: str) -> list[str]:
    """Return a row of the table of the losses without and with the limit, and of the drop rate."""
    plain, limited = runs(CAPACITY).query("capacity == @capacity")["val/loss"].mean(), under_limit(capacity)
    rate = limited["drop_rate"]
    return [capacity, f"{plain:.3f}", f"{limited['loss']:.3f}", f"{rate:.3f}" if rate else "0"]


def planned(study: str, part: str) -> dict[str, Any]:
    return one(each for each in plan(study)["claims"] if part in each["text"])


def one(values: Iterable[Any]) -> Any:
    """Return what all values are."""
    first, *others = values
    assert all(each == first for each in others), (first, others)
    return first


def word(number: float) -> str:
    """Return a whole number as a sentence writes it."""
    assert number == int(number)
    return "thirty-six" if number == 36 else WORDS[int(number)]


def a_or_word(number: int) -> str:
    return "a" if number == 1 else word(number)


def times(ratio: float) -> str:
    return {1: "once", 2: "twice"}.get(ratio, f"{ratio:g} times")


def perplexity(nats: float) -> float:
    """Return the rise of perplexity in percent that a rise of the loss by `nats` means."""
    return 100 * math.expm1(nats)


# --- What all studies share


def largest_model() -> float:
    return max(table(study)["parameters.total"].max() for study in STUDIES_OF_FINDINGS)


def usual_length() -> list[str]:
    each = (runs(study) for study in STUDIES_OF_FINDINGS)
    shares = pd.concat([rows["steps"] * rows["batch_size"] * rows["data.seq_len"] for rows in each])
    shares = shares.value_counts(normalize=True)
    return ["most" if shares.iloc[0] > 0.5 else "some", f"{shares.index[0] / 1e6:.1f}"]


def mean_loss() -> float:
    return pd.concat([runs(study)["test/loss"] for study in STUDIES_OF_FINDINGS]).mean()


def mean_of(study: str, factor: str, metric: str) -> pd.Series:
    return runs(study).groupby(factor)[metric].mean()


def seeds_each(study: str, factors: list[str]) -> int:
    return one(runs(study).groupby(factors)["seed"].nunique())


def claims_on_speed(study: str) -> int:
    return sum(each["metric"] == "time/tokens_per_s" for each in claims(study))


def detectable(study: str) -> list[float]:
    """Return the smallest detectable effects on the page of a study."""
    return [float(each) for each in re.findall(r"smallest detectable effect ([\d.]+) test loss", text_of(study))]


def at_equal_cost(study: str) -> pd.DataFrame:
    """Return the verdicts at equal cost and times the compute, from the table on the page of a study."""
    section = text_of(study).partition("**Effective speed-up.**")[2].partition("\n**")[0].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| ([\w.]+)(?: \(not causal\))? \| ([a-z ]+) \| ([\d.]+) \[", section)
    return pd.DataFrame(rows, columns=["level", "verdict", "times"]).sort_values("times")


# --- Noise and capacity


def rise() -> list[str]:
    """Return the rise of perplexity that the noise study reported, and the percent that its claim allows."""
    rising = claim(NOISE, RISE)
    return [*re.findall(r"\(\+(\d+)\)", rising["text"]), *(each.removesuffix("%") for each in rising["size"])]


def half_percent() -> float:
    """Return the margin of the wide limit in nats: a share of the loss without a limit."""
    assert margin(CAPACITY, WIDE) == "0.5"
    return 0.005 * runs(CAPACITY)[lambda rows: rows["capacity"] == "none"]["test/loss"].mean()


def numbers_of_experts() -> list[int]:
    return sorted(runs(CAPACITY)["router.k"].unique())


def limits(study: str) -> list[Any]:
    """Return the capacity factors of a study; expert_choice has none of this kind."""
    return sorted({float(each) for each in runs(study)["capacity"] if each != "absent"})


def order_of_a() -> list[str]:
    perplexities = mean_of(A, "router", "test/perplexity")
    return [word(len(perplexities)), str(perplexities.idxmin())]


def dropped(*routers: str) -> list[int]:
    """Return whole percents around the shares of tokens that some routers drop in training."""
    shares = 100 * mean_of(C, "router", "train/routing/drop_rate")[[*routers]]
    return [math.floor(shares.min()), math.ceil(shares.max())]


# --- The league


@cache
def of_league(metric: str) -> pd.DataFrame:
    """Return a metric with a row for each seed and a column for each router."""
    return runs(LEAGUE).pivot(index="seed", columns="router", values=metric)


def losses() -> pd.DataFrame:
    return of_league("test/loss")


def load_cv() -> pd.DataFrame:
    return of_league("routing/load_cv")


@cache
def league() -> pd.DataFrame:
    """Return the mean differences from top-k and Bonferroni's intervals, for the routers that see no later token."""
    causal = runs(LEAGUE).groupby("router")["causal"].all()
    ranked = losses()[[router for router in losses() if causal[router] and router != "topk"]]
    differences = ranked.sub(losses()["topk"], axis=0)
    reach = stats.t.ppf(1 - 0.025 / ranked.shape[1], len(ranked) - 1) * differences.sem()
    mean = differences.mean()
    return pd.DataFrame({"mean": mean, "low": mean - reach, "high": mean + reach})


def lowest() -> str:
    return str(league()["mean"].idxmin()) if league()["mean"].min() < 0 else "topk"


def difference(router: str) -> list[str]:
    mean, low, high = league().loc[router]
    return [f"{mean:+.4f}", f"{low:.4f}", f"{high:.4f}"]


def of_router(router: str, column: str) -> pd.Series:
    return runs(LEAGUE)[lambda rows: rows["router"] == router][column]


def width_of(router: str) -> str:
    return times(one(of_router(router, FFN)) / one(of_router("topk", FFN)))


def wide_with_one() -> list[str]:
    """Return all routers that have one expert for a token, of more than the usual width."""
    usual = one(of_router("topk", FFN))
    found = [each for each in losses() if experts(LEAGUE, each) == 1 and one(of_router(each, FFN)) > usual]
    assert sorted(found) == ["base_layers", "oracle", "shuffled_oracle", "switch", "switch_jitter"]
    return found


def side_of(router: str) -> str:
    return "higher" if league()["low"][router] > 0 else "lower"


def experts(study: str, router: str) -> float:
    """Return the mean number of experts for a token at the end."""
    return mean_of(study, "router", "routing/active_experts")[router]


def tuned() -> list[str]:
    """Return the numbers of learning rates and of seeds that chose, and which rate how many routers chose."""
    rates = sorted(searches()["optimizer.muon_lr"].unique())
    place = one(rates.index(each) for each in runs(LEAGUE)["optimizer.muon_lr"].unique())
    seeds = one(searches().groupby(["router", "optimizer.muon_lr"])["seed"].nunique())
    return [word(len(rates)), word(seeds), ["smallest", "middle", "largest"][place], "all"]


def balance_weights() -> list[float]:
    weights = pd.to_numeric(runs(LEAGUE)["lb"], errors="coerce").dropna().unique()
    return sorted(weights, reverse=True)


def trained_again() -> set[str]:
    """Return the routers that balance the load in another way than by a loss: later code trained all of them."""
    again = runs(LEAGUE)[lambda rows: pd.to_numeric(rows["lb"], errors="coerce") == 0]
    first = runs(LEAGUE)[lambda rows: rows["router"] == "topk"]["commit"]
    assert one(again["commit"]) != one(first)
    return {*again["router"]}


def near_in_load() -> str:
    near = [
        abs(cv[router].mean() - cv["topk"].mean()) < cv["topk"].std()
        for cv in (load_cv(), of_league("routing/load_cv/pooled"))
        for router in ("smebu", "sqrt_softplus_bias")
    ]
    return "less" if all(near) else "more"


def uneven(router: str) -> list[str]:
    """Return whether the load is less or more even than that of top-k, and the means of both load CVs."""
    means = [
        f"{cv[each].mean():.3f}" for cv in (load_cv(), of_league("routing/load_cv/pooled")) for each in (router, "topk")
    ]
    side = {True: "less", False: "more"}
    return [side[one({means[0] > means[1], means[2] > means[3]})], *means]


def minutes() -> list[str]:
    seconds = runs(LEAGUE).groupby("router")["train_seconds"].sum()
    return [f"{seconds.sum() / 60:.0f}", f"{seconds['top_p'] / 60:.0f}"]


def dearer() -> list[str]:
    verdicts = at_equal_cost(LEAGUE)["verdict"][lambda verdicts: verdicts != "not comparable"]
    saving = (~verdicts.isin(["costs more", "not told apart", "not shown"])).sum()
    return [str(len(verdicts)), "none" if saving == 0 else word(saving), str((verdicts == "costs more").sum())]


def extremes_of_cost() -> list[str]:
    """Return the four routers that cost most, and of those that cost more the one that costs least."""
    rows = at_equal_cost(LEAGUE)[lambda rows: rows["verdict"] == "costs more"][["level", "times"]]
    return [*rows.iloc[[0, 1, 2, 3, -1]].to_numpy().ravel()]


# --- Temperature


def best_temperature() -> list[Any]:
    losses = mean_of(TEMPERATURES, "router.temp", "val/loss")
    return [losses.idxmin(), word(len(losses))]


def new_seeds() -> set[int]:
    """Return the seeds of the chosen temperature. None of them chose it."""
    seeds = {*runs(CHOSEN)["seed"]}
    assert not seeds & {*runs(TEMPERATURES)["seed"]}
    return seeds


def lengths() -> float:
    return one(runs(CHOSEN)["steps"]) / one(runs(TEMPERATURES)["steps"])


def wasteful_temperatures() -> list[str]:
    """Return the temperatures that cost more at equal cost, and the one that all were compared with, as prose does."""
    reference = re.findall(r"factor is router\.temp, reference is ([\d.]+),", text_of(TEMPERATURES))
    found = [*at_equal_cost(TEMPERATURES)[lambda rows: rows["verdict"] == "costs more"]["level"], *reference[:1]]
    return [each.removesuffix(".0") for each in found]


def decided_on_temperature() -> list[str]:
    verdicts = re.findall(r"(?m)^<!-- temperature_\w+: .*\n> .*?: \*\*([\w ]+)\*\*", text_of(FINDINGS))
    assert len(verdicts) == sum(len(claims(study)) for study in (TEMPERATURES, CHOSEN, SCHEDULES))
    decided = sum(each != "undecided" for each in verdicts)
    return ["none" if decided == 0 else word(decided), word(len(verdicts))]


def starts() -> set[float]:
    starts = pd.to_numeric(runs(SCHEDULES)["schedule.start"], errors="coerce").dropna()
    return {*starts}


# --- Sizes, SPECTRA and seeds


def widths() -> list[int]:
    return sorted(runs(SCALING)["model.dim"].unique())


def heads() -> int:
    return one(runs(SCALING)[lambda rows: rows["model.dim"] == min(widths())]["model.heads"])


def best_sizes() -> list[str]:
    """Return which size has the lowest loss at the smallest budget, the number of sizes, and those of the others."""
    best = runs(SCALING).groupby(SETTING)["val/loss"].mean().groupby(["variant", "model.num_experts"]).idxmin()
    names = dict(zip(widths(), ["smallest", "middle", "largest"], strict=True))
    sizes = [
        names[one(dim for budget, dim, _ in best if budget == f"budget_{name}")]
        for name in ("small", "medium", "large")
    ]
    return [sizes[0], word(len(names)), *sizes[1:]]


def more_experts() -> list[str]:
    """Return how often more experts are better, the number of pairs of size and budget, and the numbers of experts."""
    losses = runs(SCALING).groupby(SETTING)["val/loss"].mean().unstack()
    few, many = losses.columns
    better = (losses[many] < losses[few]).sum()
    return ["each" if better == len(losses) else str(better), word(len(losses)), str(many), str(few)]


def baselines() -> int:
    return len([each for each in runs(SPECTRA)["variant"].unique() if not each.startswith("spectra")])


def half_millions() -> set[float]:
    return {round(total * 2e-6) / 2 for total in runs(SPECTRA)["parameters.total"]}


def widths_of_spectra() -> list[int]:
    """Return the width of the dense arm, and that of what a token uses with top-2 routing."""
    two = runs(SPECTRA)[lambda rows: rows["variant"] == "top2"]
    used = one(two["routing/active_experts"]) + one(two["model.shared_experts"])
    return [one(runs(SPECTRA)["model.dense_ffn"]), int(one(two[FFN]) * used)]


def old_seeds() -> list[str]:
    """Return how many seeds of the first study the plan names, and the first and the last. None was trained."""
    seeds = {*plan(SPECTRA)["seeds"]} & {*range(42, 48)}  # those of the first study, as the page says
    assert not seeds & {*runs(SPECTRA)["seed"]}
    return [word(len(seeds)), str(min(seeds)), str(max(seeds))]


def reach() -> list[Any]:
    """Return the most seeds that a claim needs, the number of such claims, the limit, and the claims beyond it."""
    needed = [each["seeds"] for each in plan(SPECTRA)["claims"]]
    known = [seeds for seeds in needed if seeds]
    return [max(known), word(len(known)), plan(SPECTRA)["most_seeds"], word(len(needed) - len(known))]


def in_reach_and_tested() -> int:
    """Return how many claims the trained seeds are enough for. One without values of its metric is not tested."""
    tested = {each["text"] for each in claims(SPECTRA) if runs(SPECTRA)[each["metric"]].notna().any()}
    enough = [
        each for each in plan(SPECTRA)["claims"] if (each["seeds"] or math.inf) <= runs(SPECTRA)["seed"].nunique()
    ]
    return sum(each["text"] in tested for each in enough)


def seeds_crossed() -> list[int]:
    """Return the numbers of runs, of seeds of the initial weights, and of seeds of the data order."""
    return [len(runs(SEEDS)), runs(SEEDS)["init_seed"].nunique(), runs(SEEDS)["data_seed"].nunique()]


# --- Changes of a difference

CHANGES = [
    (study, each["text"]) for study in STUDIES_OF_FINDINGS for each in claims(study) if each["kind"] == "interaction"
]


@pytest.mark.parametrize(("study", "text"), CHANGES, ids=[text for _, text in CHANGES])
def test_a_claim_about_a_change_shows_the_difference_that_it_names_at_both_levels(study: str, text: str) -> None:
    """A cost of a limit is shown, where a claim is about this cost, and not the effect of the other factor."""
    change = claim(study, text)
    factor, [level], [reference], metric = (change[key] for key in ("factor", "levels", "than", "metric"))
    [(other, places)] = change["within"].items()

    def effect(place: object) -> float:
        rows, values = runs(study), metric
        if other == "domain":
            values = f"{metric}/{place}"
        else:
            rows = rows[rows[other] == place]
        sides = [
            rows[rows[factor].astype(str) == ("none" if side is None else str(side))] for side in (level, reference)
        ]
        a, b = (side.set_index("seed")[values] for side in sides)
        return float((a - b).mean())

    shown = " vs ".join(f"{effect(place):+.4g} at {other}={place}" for place in reversed(places))
    line = one(each for each in text_of(study).splitlines() if each.startswith(f"- {text} ("))
    assert f" {shown}, difference {effect(places[1]) - effect(places[0]):+.3g} [" in line
