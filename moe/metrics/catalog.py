"""Catalog of every metric that a run writes: formula, meaning, label, unit and where it is shown, one entry each.

README's table, docs/metrics.md, the lists of the report, the labels of figures and the panels of the dashboard are
derived from these entries. The module does not import torch. The letters in the formulas are explained in `LETTERS`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe.metrics import formulas
from moe.metrics.formulas import Sums
from moe.routing.loss_table import LOSSES, ROUTER_LOSSES, Loss

LETTERS = """\
T tokens, L layers with experts, E experts. K_t: number of experts that token t asks for; K: its mean over tokens.
c_e: load of expert e, which is the number of tokens that ask for it, before drops; f_e = c_e / Σ c.
p_t: the router's probabilities for token t, at the router's temperature; P_e: mean of p_te over tokens.
z_t: the clean logits of token t, without noise and temperature. H(p) = -Σ p ln p, in nats.
kept: number of assignments carried out, after drops. W: the router's matrix, one row for each expert.
mean_t, std_t, var_t: over tokens; CV: std / mean; [A] is 1 where A is true and 0 elsewhere.
"""

GROUPS = {
    "quality": "Quality on the validation set",
    "capacity limit": "Quality under the capacity limit of training",
    "balance": "Balance of the load",
    "capacity": "Capacity and the number of experts",
    "sharpness": "Sharpness of the router",
    "specialization": "Specialization of the experts",
    "agreement": "Agreement between tokens, and over training",
    "loss": "Losses in training",
    "router loss": "Losses of single routers",
    "gradients": "Gradients and updates",
    "settings": "Settings that a schedule changes",
    "speed": "Time",
    "distribution": "Distributions, as lists",
}

VARIANTS = {
    "pooled": "the loads of all layers are added first, so that opposite imbalances cancel",
    "worst": "value of the worst layer",
    "layerNN": "value of one layer with experts, from `/layer00`",
    "<domain>": "value of one domain of the data",
    "decileN": "value of one decile of the position, `/decile0` to `/decile9`",
}
LAYER = ("layerNN",)
POOLED = ("pooled", "worst", *LAYER)

SHOWN = {
    "headline": "tables of the console and of the report",
    "tested": "compared and tested in every report",
    "conditions": "the report's table of routing by condition",
    "layer figures": "figures by layer",
    "gradient figure": "the figure of gradients and updates",
    "dashboard layers": "the dashboard's panels for each layer; six, because W&B shows six panels on a page",
}

WRITTEN = {
    "evaluation": "at every evaluation; metrics.json has the last value, except for settings and times",
    "step": "at every optimizer step",
    "end": "once, in metrics.json",
}


class Metric(NamedTuple):
    """A metric: what it means and where it is shown.

    A metric with a `function` is computed from routing sums alone and is the mean over layers. Such a metric is also
    written at every optimizer step, as `train/<name>` and without variants.
    """

    name: str
    formula: str
    meaning: str
    label: str  # `axis` adds the unit
    group: str  # key of GROUPS
    unit: str = ""
    better: str | None = None  # "lower" | "higher"
    directions: tuple[str, str] | None = None  # words for a rise and for a fall; by default `better` gives them
    variants: tuple[str, ...] = ()  # keys of VARIANTS
    written: tuple[str, ...] = ("evaluation",)  # keys of WRITTEN
    function: Callable[[Sums], np.ndarray] | None = None
    shown: tuple[str, ...] = ()  # keys of SHOWN
    headline_variant: str = ""  # the variant that is tested and shown in headlines
    noun: str = ""  # short name for verdicts, as in "+14 perplexity"; by default `name`
    per_token: bool = False  # a mean over tokens of text, which cannot be compared between tokenizers

    @property
    def axis(self) -> str:
        """Label with the unit, for the axis of a figure."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def final(self) -> bool:
        """Whether metrics.json has the metric as one number."""
        named = "/" in self.name and self.group != "distribution"
        return named and ("end" in self.written or ("evaluation" in self.written and self.group != "speed"))

    @property
    def headline(self) -> str:
        """Full name of the variant that is tested and shown in headlines."""
        return f"{self.name}/{self.headline_variant}" if self.headline_variant else self.name

    @property
    def rise(self) -> str:
        """Word for a rise of this metric, such as "worse"."""
        return self.directions[0] if self.directions else self._direction("higher")

    @property
    def fall(self) -> str:
        """Word for a fall of this metric, such as "better"."""
        return self.directions[1] if self.directions else self._direction("lower")

    def _direction(self, direction: str) -> str:
        if self.better is None:
            return direction
        improves = direction == self.better
        if self.group == "balance":
            return "more balanced" if improves else "less balanced"
        return "better" if improves else "worse"

    def variant(self, suffix: str) -> "Metric | None":
        """Return this metric under the name and label of a variant; None if it has no such variant."""
        if "pooled" in self.variants and suffix == "pooled":
            text = "layers pooled"
        elif "worst" in self.variants and suffix == "worst":
            text = "worst layer"
        elif "layerNN" in self.variants and (match := re.fullmatch(r"layer([0-9]{2,})", suffix)):
            text = f"layer {int(match[1])}"
        elif "decileN" in self.variants and (match := re.fullmatch(r"decile([0-9])", suffix)):
            text = f"decile {match[1]} of the position"
        elif "<domain>" in self.variants and suffix:
            text = suffix
        else:
            return None
        return self._replace(name=f"{self.name}/{suffix}", label=f"{self.label}, {text}")


def _loss(name: str, loss: Loss, group: str) -> Metric:
    source = f" {loss.paper}." if loss.paper else ""
    return Metric(
        f"train/{name}",
        loss.formula,
        f"{loss.meaning} Weighted by `{loss.weight}`.{source}",
        f"{name.replace('_', '-')} loss, unweighted",
        group,
        written=("step",),
    )


ENTRIES = (
    Metric(
        "val/loss",
        "-mean ln p(next token)",
        "Cross-entropy of the validation tokens. No capacity limit, no noise, no dropout.",
        "validation loss",
        "quality",
        unit="nats per token",
        better="lower",
        variants=("<domain>",),
        shown=("headline",),
        per_token=True,
    ),
    Metric(
        "val/perplexity",
        "exp(val/loss)",
        "Exponential of the validation loss.",
        "validation perplexity",
        "quality",
        better="lower",
        shown=("headline", "tested"),
        noun="perplexity",
        per_token=True,
    ),
    Metric(
        "val/bits_per_byte",
        "Σ -log2 p(next token) / bytes of the text",
        "Bits that the model needs for a byte of the validation text in UTF-8. Unlike the loss and the perplexity of a "
        "token, it can be compared between tokenizers. Null if the tokens stand for no text.",
        "validation bits per byte",
        "quality",
        unit="bits per byte",
        better="lower",
        variants=("<domain>",),
        shown=("headline",),
    ),
    Metric(
        "val/accuracy",
        "mean [argmax p = next token]",
        "Share of validation tokens that the model predicts.",
        "validation accuracy",
        "quality",
        unit="share of tokens",
        better="higher",
        shown=("headline",),
        per_token=True,
    ),
    Metric(
        "val_capacity/loss",
        "-mean ln p(next token)",
        "`val/loss` with the capacity limit of training. Absent without a limit, like all `val_capacity/...`.",
        "validation loss under the capacity limit",
        "capacity limit",
        unit="nats per token",
        better="lower",
        per_token=True,
    ),
    Metric(
        "val_capacity/perplexity",
        "exp(val_capacity/loss)",
        "Exponential of `val_capacity/loss`.",
        "validation perplexity under the capacity limit",
        "capacity limit",
        better="lower",
        per_token=True,
    ),
    Metric(
        "val_capacity/drop_rate",
        "1 - kept / Σ c",
        "Share of assignments over capacity. The deciles show at which positions they are dropped.",
        "drop rate",
        "capacity limit",
        unit="share of assignments",
        better="lower",
        variants=("decileN",),
    ),
    Metric(
        "val_capacity/unrouted_rate",
        "tokens without an expert / T",
        "Share of tokens that no expert processed.",
        "unrouted tokens under the capacity limit",
        "capacity limit",
        unit="share of tokens",
        better="lower",
    ),
    Metric(
        "routing/load_cv",
        "std(c) / mean(c), ddof 0",
        "Coefficient of variation of the load. 0 is balanced; at most sqrt(E/K - 1) if K is fixed. "
        "The noise study calls `/pooled` expert usage CV.",
        "load CV over experts",
        "balance",
        better="lower",
        variants=POOLED,
        function=formulas.load_cv,
        shown=("headline", "tested", "layer figures", "dashboard layers"),
        headline_variant="pooled",
        noun="load CV",
    ),
    Metric(
        "routing/load_cv_normalized",
        "load_cv / its maximum",
        "Load CV as a share of the largest that these tokens could have: sqrt(E/K - 1) for a fixed K. Values for "
        "different K can be compared. Null for K = E.",
        "load CV / its maximum",
        "balance",
        better="lower",
        variants=POOLED,
        function=formulas.load_cv_normalized,
    ),
    Metric(
        "routing/load_cv_floor",
        "sqrt((E - K') / KT), K' = mean_t K_t² / mean_t K_t",
        "Root mean square of the load CV by chance, if each of T tokens took its experts at random, independently of "
        "all other tokens. The tokens of a text are not independent: texts alone can make the CV several times as "
        "large.",
        "load CV of routing at random",
        "balance",
        variants=POOLED,
        function=formulas.load_cv_floor,
    ),
    Metric(
        "routing/load_max_violation",
        "max(c) / mean(c) - 1",
        "Excess of the busiest expert, one-sided MaxVio (Wang et al. 2408.15664). At most E/K - 1 if K is fixed.",
        "MaxVio (largest load / mean - 1)",
        "balance",
        better="lower",
        variants=POOLED,
        function=formulas.load_max_violation,
        shown=("conditions", "layer figures"),
    ),
    Metric(
        "routing/load_max_violation_normalized",
        "load_max_violation / its maximum",
        "MaxVio as a share of the largest that these tokens could have: E/K - 1 for a fixed K. Null for K = E.",
        "MaxVio / its maximum",
        "balance",
        better="lower",
        variants=POOLED,
        function=formulas.load_max_violation_normalized,
    ),
    Metric(
        "routing/load_max_violation_two_sided",
        "max(abs(c - mean(c))) / mean(c)",
        "Largest distance from the mean load (SPECTRA). At least 1 once an expert is unused.",
        "two-sided MaxVio",
        "balance",
        better="lower",
        variants=POOLED,
        function=formulas.load_max_violation_two_sided,
    ),
    Metric(
        "routing/load_max_violation_batch",
        "mean over micro-batches of max(c) / mean(c) - 1",
        "MaxVio of one micro-batch. It depends on how tokens are cut into micro-batches.",
        "MaxVio of a micro-batch",
        "balance",
        better="lower",
        variants=LAYER,
        function=formulas.load_max_violation_batch,
    ),
    Metric(
        "routing/load_max_violation_sequence",
        "mean over sequences of max(c) / mean(c) - 1",
        "MaxVio of one sequence (block).",
        "MaxVio of a sequence",
        "balance",
        better="lower",
        variants=LAYER,
        function=formulas.load_max_violation_sequence,
    ),
    Metric(
        "routing/load_gini",
        "Σ_ij abs(f_i - f_j) / 2E",
        "Gini coefficient of the load. 0 is balanced; at most 1 - K/E if K is fixed.",
        "Gini coefficient of the experts' load",
        "balance",
        better="lower",
        variants=POOLED,
        function=formulas.load_gini,
        shown=("conditions",),
    ),
    Metric(
        "routing/load_gini_normalized",
        "load_gini / its maximum",
        "Gini coefficient as a share of the largest that these tokens could have: 1 - K/E for a fixed K. "
        "Null for K = E.",
        "Gini coefficient / its maximum",
        "balance",
        better="lower",
        variants=POOLED,
        function=formulas.load_gini_normalized,
    ),
    Metric(
        "routing/load_entropy",
        "H(f) / ln E",
        "Entropy of the load relative to a balanced one. 1 is balanced.",
        "entropy of the load / ln E",
        "balance",
        better="higher",
        variants=POOLED,
        function=formulas.load_entropy,
    ),
    Metric(
        "routing/effective_experts",
        "exp(H(f))",
        "Number of experts that would have the same entropy with equal loads, 1 to E.",
        "effective number of experts",
        "balance",
        better="higher",
        variants=POOLED,
        function=formulas.effective_experts,
    ),
    Metric(
        "routing/unused_experts",
        "mean_e [c_e = 0]",
        "Share of experts that no token asked for.",
        "unused experts",
        "balance",
        unit="share of experts",
        better="lower",
        variants=POOLED,
        function=formulas.unused_experts,
        shown=("conditions", "dashboard layers"),
    ),
    Metric(
        "routing/drop_rate",
        "1 - kept / Σ c",
        "Share of assignments over capacity. 0 in evaluations, which have no capacity limit.",
        "drop rate",
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
    Metric(
        "routing/entropy",
        "mean_t H(p_t)",
        "Entropy of the router's probabilities, at its temperature.",
        "router entropy",
        "sharpness",
        unit="nats per token",
        directions=("less sharp", "sharper"),
        variants=LAYER,
        function=formulas.entropy,
        shown=("conditions", "layer figures"),
    ),
    Metric(
        "routing/entropy_t1",
        "mean_t H(softmax(z_t))",
        "Entropy of the clean logits at temperature 1.",
        "router entropy at T = 1",
        "sharpness",
        unit="nats per token",
        directions=("less sharp", "sharper"),
        variants=LAYER,
        function=formulas.entropy_t1,
        shown=("dashboard layers",),
    ),
    Metric(
        "routing/gate_entropy",
        "mean_t H(g_t), g_te = w_te / Σ_e w_te",
        "Entropy of the weights with which a token's experts are added: 0 for one expert, at most ln K. Mean over "
        "tokens that ask for an expert, before capacity.",
        "entropy of the gate weights",
        "sharpness",
        unit="nats per token",
        directions=("less sharp", "sharper"),
        variants=LAYER,
        function=formulas.gate_entropy,
        shown=("conditions",),
    ),
    Metric(
        "routing/confidence",
        "mean_t max_e p_te",
        "Largest probability of a token, at the router's temperature.",
        "largest probability",
        "sharpness",
        unit="token mean",
        directions=("sharper", "less sharp"),
        variants=LAYER,
        function=formulas.confidence,
    ),
    Metric(
        "routing/confidence_t1",
        "mean_t max softmax(z_t)",
        "Largest probability of the clean logits at temperature 1.",
        "largest probability at T = 1",
        "sharpness",
        unit="token mean",
        directions=("sharper", "less sharp"),
        variants=LAYER,
        function=formulas.confidence_t1,
        shown=("dashboard layers",),
    ),
    Metric(
        "routing/margin",
        "mean_t (largest p_te - second largest p_te)",
        "Lead of the most probable expert over the second one, mean over tokens.",
        "largest - second largest probability",
        "sharpness",
        unit="token mean",
        directions=("sharper", "less sharp"),
        variants=LAYER,
        function=formulas.margin,
    ),
    Metric(
        "routing/top_k_mass",
        "mean_t Σ p_te over the experts that t asks for",
        "Summed probability of the experts that a token asks for.",
        "probability of the experts asked for",
        "sharpness",
        unit="token mean",
        variants=LAYER,
        function=formulas.top_k_mass,
    ),
    Metric(
        "routing/logit_rms",
        "sqrt(mean_te z_te²)",
        "Root mean square of the clean logits.",
        "RMS of the router logits",
        "sharpness",
        variants=LAYER,
        function=formulas.logit_rms,
    ),
    Metric(
        "routing/logsumexp_squared",
        "mean_t (ln Σ_e exp z_te)²",
        "Squared log-sum-exp of the clean logits: what the router z-loss keeps small.",
        "squared log-sum-exp of the router logits",
        "sharpness",
        variants=LAYER,
        function=formulas.logsumexp_squared,
    ),
    Metric(
        "routing/mutual_information",
        "H(P) - mean_t H(p_t)",
        "Mutual information of token and expert: soft specialization.",
        "mutual information",
        "specialization",
        unit="nats",
        directions=("more specialized", "less specialized"),
        variants=LAYER,
        function=formulas.mutual_information,
        shown=("layer figures", "dashboard layers"),
    ),
    Metric(
        "routing/position_information",
        "I(expert; decile of the position), corrected for bias",
        "Mutual information of expert and decile of the token's position. The bias (P - 1)(E - K') / 2KT is "
        "subtracted, with P = 10 and K' = mean_t K_t² / mean_t K_t.",
        "mutual information of expert and position",
        "specialization",
        unit="nats",
        variants=LAYER,
        function=formulas.position_information,
    ),
    Metric(
        "routing/output_similarity",
        "mean cosine over all pairs of experts",
        "Similarity of two experts' outputs for the same token. Measured on one validation token in 251.",
        "cosine of two experts' outputs",
        "specialization",
        better="lower",
        variants=LAYER,
        function=formulas.output_similarity,
        shown=("dashboard layers",),
    ),
    Metric(
        "routing/jaccard",
        "mean over pairs of experts: tokens of both / tokens of either",
        "Overlap of the token sets of two experts. Null if no token asks for two experts.",
        "Jaccard index of two experts' tokens",
        "agreement",
        variants=LAYER,
        function=formulas.jaccard,
        shown=("conditions",),
    ),
    Metric(
        "routing/jaccard_chance",
        "(K' - 1) / (2 (E - 1) - (K' - 1)), K' = mean_t K_t² / mean_t K_t",
        "Jaccard index of balanced routing at random. Null if no token asks for two experts.",
        "Jaccard index at random",
        "agreement",
        variants=LAYER,
        function=formulas.jaccard_chance,
    ),
    Metric(
        "routing/router_gram",
        "‖G - I‖_F / sqrt(E (E - 1))",
        "Distance of the experts' normalized directions (router rows; SPECTRA: mean expression vectors) from "
        "orthogonal; G is their Gram matrix. 0 is orthogonal, 1 is all alike.",
        "Gram of router directions",
        "specialization",
        variants=LAYER,
        shown=("conditions", "layer figures"),
    ),
    Metric(
        "routing/sequential_overlap",
        "assignments that the token before asked for too / assignments",
        "Share of a token's experts that the token before it in the text asked for too.",
        "overlap with the token before",
        "agreement",
        variants=LAYER,
        function=formulas.sequential_overlap,
        shown=("conditions",),
    ),
    Metric(
        "routing/sequential_overlap_chance",
        "K/E",
        "Sequential overlap of balanced routing at random.",
        "overlap with the token before at random",
        "agreement",
        variants=LAYER,
        function=formulas.sequential_overlap_chance,
    ),
    Metric(
        "routing/sequential_overlap_kappa",
        "(o - K Σ f²) / (1 - K Σ f²)",
        "Sequential overlap o, corrected for the overlap that these loads give by chance.",
        "overlap with the token before, beyond chance",
        "agreement",
        variants=LAYER,
        function=formulas.sequential_overlap_kappa,
        shown=("conditions",),
    ),
    Metric(
        "routing/consistency",
        "experts shared by the last two traces / K",
        "Share of a token's experts that it asked for at 75 % of training and still does at the end, on 4,096 "
        "validation tokens.",
        "experts that a token keeps",
        "agreement",
        written=("end",),
        shown=("conditions",),
    ),
    Metric(
        "routing/consistency_kappa",
        "(consistency - chance) / (1 - chance)",
        "Consistency, corrected for the overlap that the same loads give by chance.",
        "experts that a token keeps, beyond chance",
        "agreement",
        written=("end",),
        shown=("conditions",),
    ),
    Metric(
        "train/loss",
        "-mean ln p(next token)",
        "Cross-entropy of the step's batch, without auxiliary losses. In metrics.json: mean over the steps "
        "between the last two evaluations.",
        "training loss",
        "loss",
        unit="nats per token",
        better="lower",
        written=("step", "end"),
        per_token=True,
    ),
    *(_loss(name, loss, "loss") for name, loss in LOSSES.items()),
    *(_loss(name, loss, "router loss") for name, loss in ROUTER_LOSSES.items()),
    Metric(
        "grad_norm",
        "‖gradient‖₂",
        "Norm of the gradient of all parameters, before clipping.",
        "gradient norm",
        "gradients",
        written=("step",),
    ),
    Metric(
        "grad_norm/router",
        "‖gradient of all routers‖₂",
        "Norm of the gradient of all routers, before clipping.",
        "gradient norm of all routers",
        "gradients",
        written=("step",),
        shown=("gradient figure",),
    ),
    Metric(
        "grad_norm/experts",
        "‖gradient of all experts‖₂",
        "Norm of the gradient of all experts, before clipping.",
        "gradient norm of all experts",
        "gradients",
        written=("step",),
        shown=("gradient figure",),
    ),
    Metric(
        "update/router",
        "‖change‖₂ / ‖weights before‖₂",
        "Relative change of the routers by an optimizer step. Only at steps that end with an evaluation.",
        "relative update of the routers",
        "gradients",
        written=("step",),
        shown=("gradient figure",),
    ),
    Metric(
        "update/experts",
        "‖change‖₂ / ‖weights before‖₂",
        "Relative change of the experts by an optimizer step. Only at steps that end with an evaluation.",
        "relative update of the experts",
        "gradients",
        written=("step",),
        shown=("gradient figure",),
    ),
    Metric(
        "learning_rate",
        "schedule of the optimizer",
        "Learning rate of the first parameter group.",
        "learning rate",
        "settings",
        written=("evaluation", "step"),
    ),
    Metric(
        "temperature",
        "schedule of the router",
        "Temperature that divides the router's logits.",
        "router temperature",
        "settings",
        written=("evaluation", "step"),
    ),
    Metric(
        "noise",
        "schedule of the router",
        "Standard deviation of the Gaussian noise on the router's logits, in training only.",
        "router noise",
        "settings",
        unit="std of the logits' noise",
        written=("evaluation", "step"),
    ),
    Metric(
        "time/tokens_per_s",
        "tokens of the step / its seconds",
        "Speed of training steps alone, without evaluation and saving. In metrics.json: median after the first five.",
        "training speed",
        "speed",
        unit="tokens per second",
        better="higher",
        written=("step", "end"),
        shown=("conditions",),
    ),
    Metric(
        "time/elapsed",
        "wall time",
        "Time that the run was active after set-up. A resumed run continues the count; pauses are not counted.",
        "elapsed time",
        "speed",
        unit="s",
        written=("evaluation", "step"),
    ),
    Metric(
        "time/train_seconds",
        "wall time of all steps",
        "Time of training steps alone, without evaluation and saving.",
        "training time",
        "speed",
        unit="s",
        better="lower",
        written=("end",),
    ),
    Metric(
        "routing/utilization",
        "f of every layer and expert",
        "Share of the assignments by layer and expert.",
        "share of assignments",
        "distribution",
    ),
    Metric(
        "routing/drop_rate_by_position",
        "1 - kept / asked for, by decile of the position",
        "Share of assignments over capacity in each decile of the position, mean over layers. 0 when dropless.",
        "drop rate",
        "distribution",
    ),
)
METRICS = {metric.name: metric for metric in ENTRIES}
# Metrics that are computed from routing sums alone.
ROUTING_METRICS = {name: metric for name, metric in METRICS.items() if metric.function is not None}


def select(*, group: str | None = None, shown: str | None = None, written: str | None = None) -> list[Metric]:
    """Return the entries that meet all conditions, in the order of the catalog."""
    return [
        metric
        for metric in ENTRIES
        if group in (None, metric.group)
        and (shown is None or shown in metric.shown)
        and (written is None or written in metric.written)
    ]


def final_metrics() -> list[str]:
    """Return the names of all final metrics, and those of their variants that are shown in headlines."""
    return list(dict.fromkeys(name for metric in ENTRIES if metric.final for name in (metric.name, metric.headline)))


def dead_layers(values: Mapping[str, Any]) -> list[str]:
    """Return the layers in which no token takes an expert, such as layer01, given the metrics of an evaluation."""
    prefix = "routing/active_experts/"
    return [name.removeprefix(prefix) for name, value in values.items() if name.startswith(prefix) and value == 0]


def lookup(name: str) -> Metric | None:
    """Return the entry of a metric, or of the variant `name`, with the variant's name and label; None if there is none.

    Understands `/pooled`, `/worst`, `/layer03`, `/<domain>`, `/decile0` and `train/routing/...`.
    """
    if name in METRICS:
        return METRICS[name]
    if name.startswith("train/routing/"):
        metric = ROUTING_METRICS.get(name.removeprefix("train/"))
        return metric and metric._replace(name=name, label=f"{metric.label}, in training")
    base, _, suffix = name.rpartition("/")
    return METRICS[base].variant(suffix) if base in METRICS else None
