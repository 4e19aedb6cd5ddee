"""The sources' own numbers, judged as ours are: published tables recomputed, their sentences held against them.

`moe/analysis/published/` holds what was published, under the sources' own column names: the runs of the noise study (3
seeds), of the temperature study and of the routing bench's experiments A and C (one seed each), and its drop rates (B).
A sentence that has one seed is undecided, unless the numbers it was drawn from already go the other way.
"""

from importlib.resources import files
from typing import NamedTuple

import pandas as pd
import yaml

from moe.analysis.claims import evidence, judge
from moe.analysis.statistics import anova, contrasts
from moe.config.claim import ClaimConfig
from moe.config.options import CONF

OURS = {  # published column -> ours
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
NAMES = {"top1": "switch"}  # the bench's router with the same selection; its gate weight was 1
NON_CAUSAL = ("expert_choice",)
TOKENS_PER_STEP = 32_768  # of the bench
FROZEN = "no gradient reached the routers of top1 (our switch) and topk_hard"  # so they were as random as hash
VALIDATION = "the time of a step was mostly that of validation"
FALLBACK = "expert_choice routed 94 % of tokens or more as softk does"  # an expert took 64 tokens of 8,192 at most
ABOUT_ZERO = 0.01  # "from 1-10 % to about 0": less than what the sentence itself calls a drop rate


class Sentence(NamedTuple):
    """What a source says, whether its numbers bear it out (supported, contradicted or undecided), and these numbers."""

    source: str
    sentence: str
    verdict: str
    evidence: str


class Replay(NamedTuple):
    """`tables` by name, and `sentences`, a row a `Sentence`."""

    tables: dict[str, pd.DataFrame]
    sentences: pd.DataFrame


def replay() -> Replay:
    """Recompute what was published and judge every sentence that was drawn from it."""
    noise, temperature = as_runs(read_published("noise_runs")), read_published("temperature_runs")
    a, c = _honest_speed(read_published("experiment_a")), _honest_speed(read_published("experiment_c"))
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
        _interaction(variance),
        _active_share(),
        *_copying(temperature),
        *_judged(as_runs(a), "experiment_a", caveat=f"{FROZEN}; {VALIDATION}"),
        *judge_drops(drops),
        *_judged(as_runs(c[c["capacity_factor"] == 1.25]), "experiment_c", caveat=f"{FROZEN}; {FALLBACK}"),
        _hash_balance(c),
        _throughput(a, c),
    ]
    return Replay(tables, pd.DataFrame(sentences))


def read_published(name: str) -> pd.DataFrame:
    """A published table by the name of its file, under the source's own column names."""
    with (files("moe.analysis") / "published" / f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def as_runs(table: pd.DataFrame) -> pd.DataFrame:
    """A published table as `load_runs` would return it; the bench and the temperature study had one
    seed."""
    runs = table[[column for column in OURS if column in table]].rename(columns=OURS)
    if "router" in runs:
        runs = runs.assign(router=runs["router"].replace(NAMES), causal=~runs["router"].isin(NON_CAUSAL))
    return runs.assign(seed=runs.get("seed", 0), status="finished", folder="published", experiment="published")


def claims_of(experiment: str) -> list[ClaimConfig]:
    """The claims in one of our experiments' yaml."""
    content = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    return [ClaimConfig(**claim) for claim in content["claims"]]


def noise_conditions() -> pd.DataFrame:
    """The noise study's printed table beside its recomputation: its ± is the population standard deviation (ddof=0)."""
    keys = ["noise_std", "load_balancing_weight"]
    cells = read_published("noise_runs").groupby(keys)
    perplexity = cells["val_perplexity"]
    again = pd.DataFrame(
        {
            "n": perplexity.count(),
            "perplexity": perplexity.mean(),
            "std (ddof=0)": perplexity.std(ddof=0),
            "std (ddof=1)": perplexity.std(ddof=1),
            "expert usage CV": cells["expert_usage_cv"].mean(),
        }
    )
    printed = read_published("noise_aggregates").set_index(keys).add_prefix("printed ")
    return again.join(printed).reset_index()


def drop_rates() -> pd.DataFrame:
    """The published drop rates, under the names in the capacity_cf_multi.jsonl of `python -m moe.bench dispatch`."""
    wide = read_published("drop_rates").rename(columns={"k": "top_k"})
    long = wide.melt(["num_experts", "top_k"], var_name="capacity_factor", value_name="avg_drop_rate")
    return long.assign(capacity_factor=long["capacity_factor"].str.removeprefix("cf_").astype(float))


def judge_drops(drops: pd.DataFrame) -> list[Sentence]:
    """Experiment B's sentence on any capacity_cf_multi.jsonl (`pd.read_json(path, lines=True)`), per capacity factor.

    A drop rate of random routing over many tokens is all but deterministic, so it needs no seeds.
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
        seen = (
            f"{small.sum()} of {len(cells)} combinations below {ABOUT_ZERO:.0%}, the largest "
            f"{worst['avg_drop_rate']:.2%} (E={worst['num_experts']:.0f}, k={worst['top_k']:.0f}); "
            f"at 1.0 {before.min():.2%} to {before.max():.2%}"
        )
        verdict = "supported" if small.all() else "contradicted"
        sentences.append(Sentence("routing bench, B", text, verdict, seen))
    return sentences


def _judged(runs: pd.DataFrame, experiment: str, *, caveat: str = "") -> list[Sentence]:
    """The claims of one of our experiments, judged by the published runs."""
    sentences = []
    for _, row in judge(runs, claims_of(experiment)).iterrows():
        opposite = row["n"] == 1 and row["estimates"] == "against"
        row["verdict"] = "contradicted" if opposite else row["verdict"]
        row["reason"] = "one seed, and it says the opposite" if opposite else row["reason"]
        parts = filter(None, [evidence(row), caveat])
        sentences.append(Sentence(row["source"], row["claim"], row["verdict"], "; ".join(parts)))
    return sentences


def _interaction(variance: pd.DataFrame) -> Sentence:
    rows = variance[variance["term"] == "noise:lb"].set_index("metric")
    p = rows.loc["val/perplexity", "p"]
    seen = "; ".join(f"{name}: F={row['F']:.2f}, p={row['p']:.2g}" for name, row in rows.iterrows())
    verdict = "contradicted" if p <= 0.05 else "undecided"
    return Sentence(
        "noise study, 9",
        "The interaction of noise and balance weight is limited",
        verdict,
        f"{seen}; a large p is no evidence that there is none",
    )


def _active_share() -> Sentence:
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
    """The temperature study's sentences: without evidence, whatever its numbers say."""
    best, final, train = runs["best_val_loss"], runs["final_val_loss"], runs["last_train_loss"]
    caveat = (
        "no evidence, for labels were not shifted and training measured copying: train loss at most "
        f"{train.max():.4f}, val loss up from {best.min():.2f} to at least {final.min():.2f}"
    )
    ablation = runs[(runs["schedule"] == "constant") & (runs["steps"] == runs["steps"].min())]
    schedules = runs[runs["temperature"] == 1.0]
    judged = _judged(as_runs(ablation), "temperature_ablation", caveat=caveat)
    judged += _judged(as_runs(schedules), "temperature_schedules", caveat=caveat)
    return [sentence._replace(verdict="undecided") for sentence in judged]


def _hash_balance(c: pd.DataFrame) -> Sentence:
    row = c[(c["router"] == "hash") & (c["capacity_factor"] == 1.25)].iloc[0]
    balanced = row["drop_rate"] == row["load_cv"] == 0
    return Sentence(
        "routing bench, C",
        "hash has a drop rate and a load CV near zero",
        "supported" if balanced else "undecided",
        f"drop rate {row['drop_rate']:g}, load CV {row['load_cv']:g}; by construction, for it hashed the position",
    )


def _honest_speed(runs: pd.DataFrame) -> pd.DataFrame:
    """The bench counted the tokens of one step in the time between evaluations as those of all steps in between, so
    its tokens/s (and TFLOP/s, GiB/s) are too large by the number of steps between evaluations."""
    return runs.assign(tokens_per_s=runs["median_tokens_per_s"] / runs["eval_interval"])


def _throughput(a: pd.DataFrame, c: pd.DataFrame) -> Sentence:
    """A step's logged time is its own plus its share of an evaluation, every 100 steps in A and every 200 in C: two
    equations a router, for the time of an evaluation and so for its share."""
    both = a.merge(c, on=["router", "capacity_factor"], suffixes=("_a", "_c"))
    seconds = {side: TOKENS_PER_STEP / both[f"tokens_per_s_{side}"] for side in "ac"}
    evaluation = (seconds["a"] - seconds["c"]) / (1 / both["eval_interval_a"] - 1 / both["eval_interval_c"])
    share = evaluation / both["eval_interval_c"] / seconds["c"]
    return Sentence(
        "routing bench, A and C",
        f"Throughput is {a['median_tokens_per_s'].min():.3g} to {c['median_tokens_per_s'].max():.3g} tokens/s",
        "contradicted",
        f"inflated {a['eval_interval'].iloc[0]} and {c['eval_interval'].iloc[0]} times: it is "
        f"{a['tokens_per_s'].min():,.0f} to {c['tokens_per_s'].max():,.0f}, of which {share.min():.0%} or more of the "
        "time in C went into validation, so that it ranks validation",
    )
