"""Judge the source studies: recompute their published tables, and compare their sentences with their numbers.

The folder published_tables/ contains the published numbers with the column names of the sources: the runs of the noise
study (3 seeds), of the temperature study and of the routing bench's experiments A and C (one seed each), and the drop
rates of its experiment B. A sentence that is based on one seed, or on times that do not measure what it is about, is
not judged.
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

COLUMNS = {  # column of a published table -> column of our tables
    "noise_std": "noise",
    "load_balancing_weight": "lb",
    "temperature": "router.temp",
    "schedule": "schedule",
    "router": "router",
    "capacity_factor": "capacity",
    "seed": "seed",
    "val_perplexity": "val/perplexity",
    "val_ppl": "val/perplexity",
    "final_val_loss": "val/loss",
    "expert_usage_cv": "routing/load_cv/pooled",
    "load_cv": "routing/load_cv",
    "gini": "routing/load_gini/pooled",
    "tokens_per_s": "time/tokens_per_s",
}
ROUTER_NAMES = {"top1": "switch"}  # the bench's top1 selects as our switch does, but with a gate weight of 1
NON_CAUSAL = ("expert_choice",)
TOKENS_PER_STEP = 32_768  # of the bench
# The routers of top1 and topk_hard therefore stayed random, like hash.
NOT_TRAINED = "no gradient reached the routers of top1 (our switch) and topk_hard"
TIMED_VALIDATION = "the time of a step was mostly that of validation"
FALLBACK = "expert_choice routed 94 % of tokens or more as softk does"  # an expert took 64 tokens of 8,192 at most
NOT_JUDGED = "not judged"  # the verdict on a sentence whose numbers cannot decide it, however they turn out
ABOUT_ZERO = 0.01  # the source says "from 1-10 % to about 0", so "about 0" means less than 1 %


class Sentence(NamedTuple):
    """A sentence of a source, the verdict on it, and the numbers behind it.

    The verdict is supported, contradicted, undecided, or `NOT_JUDGED`.
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
    """Recompute the published tables and judge every sentence that the sources drew from them."""
    noise, temperature = as_runs(read_published("noise_runs")), read_published("temperature_runs")
    a, c = _with_corrected_speed(read_published("experiment_a")), _with_corrected_speed(read_published("experiment_c"))
    drops, factors, metrics = drop_rates(), ["noise", "lb"], ["val/perplexity", "routing/load_cv/pooled"]
    variance = pd.concat([anova(noise, metric, factors) for metric in metrics], ignore_index=True)
    compared = [contrasts(noise, metrics[0], factors, margin="1%"), contrasts(noise, metrics[1], factors)]
    tables = {
        "noise_conditions": noise_conditions(),
        "noise_contrasts": pd.concat(compared, ignore_index=True),
        "noise_anova": variance,
        "temperature_runs": temperature,
        "experiment_a": a,
        "experiment_b": drops,
        "experiment_c": c,
    }
    sentences = [
        *_judged(noise, "noise_lb_seed"),
        *_noise_above_all(noise),
        _active_share(),
        *_copying(temperature),
        *_judged(as_runs(a), "experiment_a", caveat=f"{NOT_TRAINED}; {TIMED_VALIDATION}"),
        _between(a),
        *judge_drops(drops),
        _diminishing(drops),
        *_judged(as_runs(c[c["capacity_factor"] == 1.25]), "experiment_c", caveat=f"{NOT_TRAINED}; {FALLBACK}"),
        _hash_balance(c),
        *_orderings(c),
        _throughput(a, c),
    ]
    return Replay(tables, pd.DataFrame(sentences))


def read_published(name: str) -> pd.DataFrame:
    """Return a published table by the name of its file, with the column names of the source."""
    with (files("moe.analysis.studies") / "published_tables" / f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def as_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Return a published table in the form of `load_runs`; the bench and the temperature study had one seed."""
    runs = table[[column for column in COLUMNS if column in table]].rename(columns=COLUMNS)
    if "router" in runs:
        runs = runs.assign(router=runs["router"].replace(ROUTER_NAMES), causal=~runs["router"].isin(NON_CAUSAL))
    return runs.assign(seed=runs.get("seed", 0), status="finished", folder="published", experiment="published")


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


def _judged(runs: pd.DataFrame, experiment: str, *, caveat: str = "") -> list[Sentence]:
    """Judge the claims of one of our experiments by the published runs."""
    sentences = []
    for _, row in judge(runs, experiment_claims(experiment)).iterrows():
        verdict = NOT_JUDGED if row["n"] == 1 else row["verdict"]
        parts = filter(None, [evidence_sentence(row), caveat])
        sentences.append(Sentence(row["source"], row["claim"], verdict, "; ".join(parts)))
    return sentences


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


def _copying(runs: pd.DataFrame) -> list[Sentence]:
    """Return the temperature study's sentences. Its runs give no evidence, because their training measured copying."""
    best, final, train = runs["best_val_loss"], runs["final_val_loss"], runs["last_train_loss"]
    caveat = (
        "no evidence, because labels were not shifted, so that training measured copying: train loss at most "
        f"{train.max():.4f}, val loss up from {best.min():.2f} to at least {final.min():.2f}"
    )
    ablation = runs[(runs["schedule"] == "constant") & (runs["steps"] == runs["steps"].min())]
    schedules = runs[runs["temperature"] == 1.0]
    judged = _judged(as_runs(ablation), "temperature_ablation", caveat=caveat)
    judged += _judged(as_runs(schedules), "temperature_schedules", caveat=caveat)
    balance, gini = ablation["last_aux"], ablation.set_index("temperature")["gini"]
    spread = f"from {balance.min():.5f} to {balance.max():.5f} over all temperatures; {caveat}"
    losses = ablation.set_index("temperature")["final_val_loss"]
    later = f"final val loss {losses[1.0]:.2f} at 1, {losses[3.0]:.2f} at 3 and {losses[10.0]:.2f} at 10; {caveat}"
    even = f"only the load is known: Gini {gini[10.0]:g} at 10 and {gini[1.0]:g} at 1; {caveat}"
    judged += [
        Sentence("temperature study, questions", "The temperature can reduce the load-balancing loss", "", spread),
        Sentence("temperature study, key insights", "Temperatures above 2 converge more slowly", "", later),
        Sentence("temperature study, expected outcomes", "Temperature 10 specializes experts too little", "", even),
    ]
    return [sentence._replace(verdict=NOT_JUDGED) for sentence in judged]


def _between(a: pd.DataFrame) -> Sentence:
    """Return the bench's sentence that topk_hard lies between top1 and softk. Each of its runs has one seed."""
    perplexity = a[a["capacity_factor"] == 1.0].set_index("router")["val_ppl"]
    order = ", ".join(f"{router} {perplexity[router]:.2f}" for router in ("top1", "topk_hard", "softk"))
    evidence = f"at capacity factor 1: {order}; one seed; {NOT_TRAINED}"
    return Sentence("routing bench, A", "topk_hard lies between top1 and softk", NOT_JUDGED, evidence)


def _diminishing(drops: pd.DataFrame) -> Sentence:
    """Judge the bench's sentence about larger capacity factors: a further step must save less than the one before."""
    mean = drops.groupby("capacity_factor")["avg_drop_rate"].mean()
    saved = (-mean.diff() / pd.Series(mean.index, mean.index).diff()).dropna()
    text = "Larger capacity factors show diminishing returns"
    diminishing = len(saved) > 1 and bool((saved.diff().dropna() <= 0).all())
    steps = ", ".join(f"up to {capacity:g}: {rate:.2g}" for capacity, rate in saved.items())
    evidence = f"drop rate saved per unit of capacity factor, mean over experts and k, {steps}"
    return Sentence("routing bench, B", text, "supported" if diminishing else "contradicted", evidence)


def _orderings(c: pd.DataFrame) -> list[Sentence]:
    """Return the bench's sentences about speed, balance and sharpness in C. Each of its runs has one seed."""
    runs = c[c["capacity_factor"] == 1.25].set_index("router")

    def listed(column: str, digits: str) -> str:
        return ", ".join(f"{router} {value:{digits}}" for router, value in runs[column].sort_values().items())

    speed, load = listed("tokens_per_s", ",.0f"), listed("load_cv", ".2f")
    sentences = {
        "K dominates the speed": f"tokens/s {speed}; {TIMED_VALIDATION}",
        "expert_choice is about as fast as softk": f"tokens/s {speed}; {TIMED_VALIDATION}",
        "expert_choice keeps a balanced load and few drops": f"load CV after drops {load}; {FALLBACK}",
        "softk and expert_choice have a lower load CV than top1 and topk_hard": f"load CV after drops {load}",
        "softk and expert_choice alone have gate entropy, top1 and topk_hard none": (
            f"gate entropy {listed('gate_entropy', '.2f')}; the gates of top1 and topk_hard are constant"
        ),
    }
    return [
        Sentence("routing bench, C", text, NOT_JUDGED, f"{evidence}; one seed") for text, evidence in sentences.items()
    ]


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
