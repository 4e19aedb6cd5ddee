"""The FLOPs that runs spent in training, also of runs that did not record them, as far as their evaluation tells."""

import pandas as pd

SPENT = "train/flops"
CLOSE = 0.01  # costs that differ by this share are equal
SIZES = ("batch_size", "grad_accum", "data.seq_len")
# Routers that run more experts in training than in evaluation.
MORE_IN_TRAINING = ("moe.routers.dense_mixer.DenseMixer", "moe.routers.matryoshka.Matryoshka")
# Its tokens have different numbers of experts, but all of them together always have as many.
FIXED_LOAD = "moe.routers.expert_choice.ExpertChoice"


def tokens_of_step(runs: pd.DataFrame) -> pd.Series:
    """Return the number of tokens in a training step of each run; NaN where it is unknown."""
    return _numbers(runs, *SIZES).prod(axis=1, skipna=False)


def training_tokens(runs: pd.DataFrame) -> pd.Series:
    """Return the number of tokens that each run read in training; NaN where it is unknown."""
    return tokens_of_step(runs) * _numbers(runs, "steps")["steps"]


def of_step_as_evaluated(runs: pd.DataFrame) -> pd.Series:
    """Return the FLOPs of a step of each run, as its evaluation tells them; NaN where training ran other experts.

    They are three times the forward FLOPs of its tokens (`moe.model.cost.flops_per_token`). Nothing else tells the cost
    of a run that has no `SPENT`, because it is older. Training ran more experts with `MORE_IN_TRAINING`. It may have
    run fewer or more with a router that gives tokens different numbers of them, and fewer with a capacity limit. All
    runs of a setting are known or none is: a choice of seeds by what they measured would mislead.
    """
    number = _numbers(runs, "flops_per_token", "routing/active_experts_std", "capacity")
    router = runs.get("router._target_", pd.Series(runs.index, runs.index))
    varies = router.isin(set(router[number["routing/active_experts_std"] > 0]) - {FIXED_LOAD})
    other = varies | router.isin(MORE_IN_TRAINING) | number["capacity"].notna()
    return (3 * number["flops_per_token"] * tokens_of_step(runs)).mask(other)


def training_flops(runs: pd.DataFrame) -> pd.Series:
    """Return the FLOPs of all training steps of each run; NaN where they are not known."""
    number = _numbers(runs, SPENT, "steps")
    return number[SPENT].fillna(number["steps"] * of_step_as_evaluated(runs))


def _numbers(runs: pd.DataFrame, *columns: str) -> pd.DataFrame:
    return runs.reindex(columns=list(columns)).apply(pd.to_numeric, errors="coerce")
