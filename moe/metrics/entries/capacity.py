"""Metrics of capacity and of the number of experts."""

from moe.metrics import formulas
from moe.metrics.metric import LAYER, Metric

ENTRIES = (
    Metric(
        "routing/drop_rate",
        "1 - kept / Σ c",
        "Share of assignments over capacity. 0 in evaluations, which have no capacity limit.",
        "drop rate (0 without a capacity limit)",
        "capacity",
        unit="share of assignments",
        better="lower",
        variants=LAYER,
        function=formulas.drop_rate,
    ),
    Metric(
        "train/routing/drop_rate",
        "1 - kept / Σ c",
        "Share of assignments over capacity in training. In metrics.json: mean over the second half of the steps.",
        "drop rate, in training",
        "capacity",
        unit="share of assignments",
        better="lower",
        written=("step", "end"),
        shown=("conditions",),
    ),
    Metric(
        "routing/capacity_usage",
        "kept / capacity of all experts",
        "Share of the capacity that is used. Null when dropless.",
        "used share of the capacity",
        "capacity",
        better="higher",
        variants=LAYER,
        function=formulas.capacity_usage,
    ),
    Metric(
        "routing/unrouted_rate",
        "tokens without an expert / T",
        "Share of tokens that no expert processed.",
        "unrouted tokens",
        "capacity",
        unit="share of tokens",
        better="lower",
        variants=LAYER,
        function=formulas.unrouted_rate,
    ),
    Metric(
        "routing/active_experts",
        "mean_t (experts that t asks for)",
        "Number of experts that a token asks for: K where it is fixed.",
        "experts per token",
        "capacity",
        variants=LAYER,
        function=formulas.active_experts,
    ),
    Metric(
        "routing/active_experts_std",
        "std_t (experts that t asks for), ddof 0",
        "Standard deviation over tokens of the number of experts that a token asks for: 0 where it is fixed.",
        "std of experts per token",
        "capacity",
        variants=LAYER,
        function=formulas.active_experts_std,
    ),
)
