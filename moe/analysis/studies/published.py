"""Judge the source studies: recompute their published tables, and compare their sentences with their numbers.

The folder published_tables/ contains the published numbers with the column names of the sources: the runs of the noise
study (3 seeds), of the temperature study and of the routing bench's experiments A and C (one seed each), and the drop
rates of its experiment B. A sentence about differences of runs with one seed is left out, because such runs decide
nothing. docs/sources.md says what else is wrong with them.
"""

from importlib.resources import files
from typing import NamedTuple

import pandas as pd
import yaml
from scipy import stats

from moe.analysis.claims import evidence_sentence, judge
from moe.analysis.power import SIGNIFICANCE
from moe.analysis.statistics import contrasts
from moe.analysis.variance import anova
from moe.checks import plain
from moe.config.claim import ClaimConfig
from moe.config.options import CONF

COLUMNS = {  # column of the noise study's runs -> column of our tables
    "noise_std": "noise",
    "load_balancing_weight": "lb",
    "seed": "seed",
    "val_perplexity": "val/perplexity",
    "expert_usage_cv": "routing/load_cv/pooled",
}
TOKENS_PER_STEP = 32_768  # of the bench
ABOUT_ZERO = 0.01  # the source says "from 1-10 % to about 0", so "about 0" means less than 1 %


class Sentence(NamedTuple):
    """A sentence of a source, the verdict on it, and the numbers behind it.

    The verdict is supported, contradicted or undecided.
    """

    source: str
    sentence: str
    verdict: str
    evidence: str


class Replay(NamedTuple):
    """The recomputed `tables` by name, and `sentences`, a table with a row for each `Sentence`."""

    tables: dict[str, pd.DataFrame]
    sentences: pd.DataFrame


def replay() -> Replay:
    """Recompute the published tables and judge the sentences that the sources drew from them."""
    noise = as_runs(read_published("noise_runs"))
    a, c = _with_corrected_speed(read_published("experiment_a")), _with_corrected_speed(read_published("experiment_c"))
    drops, factors, metrics = drop_rates(), ["noise", "lb"], ["val/perplexity", "routing/load_cv/pooled"]
    variance = pd.concat([anova(noise, metric, factors) for metric in metrics], ignore_index=True)
    compared = [contrasts(noise, metrics[0], factors, margin="1%"), contrasts(noise, metrics[1], factors)]
    tables = {
        "noise_conditions": noise_conditions(),
        "noise_contrasts": pd.concat(compared, ignore_index=True),
        "noise_anova": variance,
        "temperature_runs": read_published("temperature_runs"),
        "experiment_a": a,
        "experiment_b": drops,
        "experiment_c": c,
    }
    sentences = [
        *_judged(noise),
        *_noise_above_all(noise),
        _active_share(),
        *judge_drops(drops),
        _diminishing(drops),
        _hash_balance(c),
        _throughput(a, c),
    ]
    return Replay(tables, pd.DataFrame(sentences))


def read_published(name: str) -> pd.DataFrame:
    """Return a published table by the name of its file, with the column names of the source."""
    with (files("moe.analysis.studies") / "published_tables" / f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def as_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the noise study in the form of `load_runs`."""
    runs = table[list(COLUMNS)].rename(columns=COLUMNS)
    return runs.assign(status="finished", folder="published", experiment="published")


def experiment_claims(experiment: str) -> list[ClaimConfig]:
    """Return the claims in the yaml of one of our experiments, about validation text: the studies had no test text."""
    content = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    return [ClaimConfig(**claim | {"metric": claim["metric"].replace("test/", "val/")}) for claim in content["claims"]]


def noise_conditions() -> pd.DataFrame:
    """Return the noise study's printed table beside the recomputed one. Its ± is a standard deviation with ddof=0."""
    keys = ["noise_std", "load_balancing_weight"]
    cells = read_published("noise_runs").groupby(keys)
    perplexity = cells["val_perplexity"]
    recomputed = pd.DataFrame(
        {
            "n": perplexity.count(),
            "perplexity": perplexity.mean(),
            "std (ddof=0)": perplexity.std(ddof=0),
            "std (ddof=1)": perplexity.std(ddof=1),
            "expert usage CV": cells["expert_usage_cv"].mean(),
        }
    )
    printed = read_published("noise_aggregates").set_index(keys).add_prefix("printed ")
    return recomputed.join(printed).reset_index()


def drop_rates() -> pd.DataFrame:
    """Return the published drop rates under the names of capacity_cf_multi.jsonl of `python -m moe.bench dispatch`."""
    wide = read_published("drop_rates").rename(columns={"k": "top_k"})
    long = wide.melt(["num_experts", "top_k"], var_name="capacity_factor", value_name="avg_drop_rate")
    return long.assign(capacity_factor=long["capacity_factor"].str.removeprefix("cf_").astype(float))


def judge_drops(drops: pd.DataFrame) -> list[Sentence]:
    """Judge experiment B's sentence for each capacity factor.

    `drops` is the content of a capacity_cf_multi.jsonl (`pd.read_json(path, lines=True)`). The drop rate of random
    routing over many tokens hardly varies, so no seeds are needed.
    """
    sentences = []
    before = drops.loc[drops["capacity_factor"] == 1.0, "avg_drop_rate"]
    for capacity in (1.05, 1.1):
        cells = drops[drops["capacity_factor"] == capacity]
        text = f"Capacity factor {capacity} collapses the drop rate to about 0, across experts and k"
        if cells.empty or before.empty:
            sentences.append(Sentence("routing bench, B", text, "undecided", "not measured"))
            continue
        small = cells["avg_drop_rate"] < ABOUT_ZERO
        worst = cells.loc[cells["avg_drop_rate"].idxmax()]
        evidence = (
            f"{small.sum()} of {len(cells)} combinations below {ABOUT_ZERO:.0%}, the largest "
            f"{worst['avg_drop_rate']:.2%} (E={worst['num_experts']:.0f}, k={worst['top_k']:.0f}); "
            f"at 1.0 {before.min():.2%} to {before.max():.2%}"
        )
        verdict = "supported" if small.all() else "contradicted"
        sentences.append(Sentence("routing bench, B", text, verdict, evidence))
    return sentences


def _judged(runs: pd.DataFrame) -> list[Sentence]:
    """Judge the claims of our experiment `noise_lb_seed` by the published runs."""
    judged = judge(runs, experiment_claims("noise_lb_seed"))
    return [
        Sentence(row["source"], row["claim"], row["verdict"], evidence_sentence(row)) for _, row in judged.iterrows()
    ]


def _noise_above_all(runs: pd.DataFrame) -> list[Sentence]:
    """Judge the noise study's sentences that the ranking of noise levels is consistent, and that noise is what costs.

    The first holds if each of its comparisons holds, so its p is the largest of theirs. The second is a t test, paired
    by seed, of the effect of noise 0.5 minus the size of the effect of the balance weight.
    """
    pairs = [
        ClaimConfig("", "val/perplexity", "noise", [more], "higher", than=[less], within={"lb": [lb]})
        for less, more in ((0.0, 0.1), (0.1, 0.5))
        for lb in (0.0, 0.01)
    ]
    judged = judge(runs, pairs)
    in_order, p = bool((judged["difference"] > 0).all()), judged["p"].max()
    steps = ", ".join(f"{difference:+.3g}" for difference in judged["difference"])
    effects = {factor: runs.pivot_table("val/perplexity", "seed", factor) for factor in ("noise", "lb")}
    noise = effects["noise"][0.5] - effects["noise"][0.0]
    balance = effects["lb"][0.01] - effects["lb"][0.0]
    lead = stats.ttest_1samp(noise - balance.abs(), 0)
    low, high = lead.confidence_interval()
    return [
        Sentence(
            "noise study, 9",
            "The ranking of noise levels is the same at both balance weights",
            "supported" if in_order and p <= SIGNIFICANCE else "undecided",
            f"0.1 minus 0 and 0.5 minus 0.1, each at lb 0 and 0.01: {steps}; the largest p is {p:.2g}, n={len(noise)}",
        ),
        Sentence(
            "noise study, 9",
            "Noise, not the balance weight, is the primary driver of the degradation",
            "supported" if lead.pvalue <= SIGNIFICANCE and low > 0 else "undecided",
            f"noise 0.5 costs {noise.mean():+.3g}, the balance weight changes {balance.mean():+.3g}; the first minus "
            f"the size of the second [{low:.3g}, {high:.3g}], p={lead.pvalue:.2g}, n={len(noise)}",
        ),
    ]


def _active_share() -> Sentence:
    """Judge the temperature study's share of active parameters."""
    [row] = read_published("parameters").itertuples()
    printed = row.printed_active / row.total
    active = (row.printed_active + row.experts * row.top_k / row.num_experts) / row.total
    return Sentence(
        "temperature study, architecture",
        f"About {printed:.1%} of the parameters are active",
        "contradicted",
        f"that leaves out all experts; with {row.top_k} of {row.num_experts} a token uses {active:.1%}",
    )


def _diminishing(drops: pd.DataFrame) -> Sentence:
    """Judge the bench's sentence about larger capacity factors: a further step must save less than the one before."""
    mean = drops.groupby("capacity_factor")["avg_drop_rate"].mean()
    saved = (-mean.diff() / pd.Series(mean.index, mean.index).diff()).dropna()
    text = "Larger capacity factors show diminishing returns"
    diminishing = len(saved) > 1 and bool((saved.diff().dropna() <= 0).all())
    steps = ", ".join(f"up to {capacity:g}: {rate:.2g}" for capacity, rate in saved.items())
    evidence = f"drop rate saved per unit of capacity factor, mean over experts and k, {steps}"
    return Sentence("routing bench, B", text, "supported" if diminishing else "contradicted", evidence)


def _hash_balance(c: pd.DataFrame) -> Sentence:
    """Judge the bench's sentence about the balance of hash routing."""
    row = c[(c["router"] == "hash") & (c["capacity_factor"] == 1.25)].iloc[0]
    balanced = row["drop_rate"] == row["load_cv"] == 0
    return Sentence(
        "routing bench, C",
        "hash has a drop rate and a load CV near zero",
        "supported" if balanced else "undecided",
        f"drop rate {row['drop_rate']:g}, load CV {row['load_cv']:g}; by construction, because it hashed the position",
    )


def _with_corrected_speed(runs: pd.DataFrame) -> pd.DataFrame:
    """Add the true tokens per second.

    The bench's tokens/s (and TFLOP/s, GiB/s) are too large by the number of steps between evaluations: it counted the
    tokens of one step in the time between evaluations as those of all steps in between.
    """
    return runs.assign(tokens_per_s=runs["median_tokens_per_s"] / runs["eval_interval"])


def _throughput(a: pd.DataFrame, c: pd.DataFrame) -> Sentence:
    """Judge the bench's throughput.

    The logged time of a step includes a share of an evaluation, which took place every 100 steps in A and every 200 in
    C. This gives two equations for each router. Their solution is the time of an evaluation, and so its share.
    """
    both = a.merge(c, on=["router", "capacity_factor"], suffixes=("_a", "_c"))
    seconds = {side: TOKENS_PER_STEP / both[f"tokens_per_s_{side}"] for side in "ac"}
    evaluation = (seconds["a"] - seconds["c"]) / (1 / both["eval_interval_a"] - 1 / both["eval_interval_c"])
    share = evaluation / both["eval_interval_c"] / seconds["c"]
    training = TOKENS_PER_STEP / (seconds["c"] - evaluation / both["eval_interval_c"])
    speeds = [(router, speed) for router, speed in zip(both["router"], training, strict=True) if speed > 0]
    alone = plain(", ".join(f"{router} {speed:.2g}" for router, speed in speeds))
    return Sentence(
        "routing bench, A and C",
        plain(f"Throughput is {a['median_tokens_per_s'].min():.3g} to {c['median_tokens_per_s'].max():.3g} tokens/s"),
        "contradicted",
        f"inflated {a['eval_interval'].iloc[0]} and {c['eval_interval'].iloc[0]} times: it is "
        f"{a['tokens_per_s'].min():,.0f} to {c['tokens_per_s'].max():,.0f}, and {share.min():.0%} or more of the "
        f"time in C went into validation, so it ranks routers by validation; training alone, from the two equations: "
        f"{alone} tokens/s",
    )
