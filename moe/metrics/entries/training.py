"""Metrics of a step: losses, gradients and updates, settings that a schedule changes, and time."""

from moe.metrics.metric import Metric
from moe.routing.loss_table import LOSSES, ROUTER_LOSSES, Loss


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
        "train/flops",
        "Σ_steps (3 FLOPs of all but routed experts + 3 F Σ kept + F (runs without a backward pass))",
        "FLOPs of all training steps so far. F: those of the forward pass of an expert for a token. The experts are "
        "those that the steps ran: without dropped assignments, and with those that run for the router alone.",
        "training FLOPs",
        "speed",
        unit="FLOPs",
        written=("evaluation", "step", "end"),
    ),
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
)
