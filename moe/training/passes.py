"""Run the forward and backward pass of one micro-batch."""

from contextlib import nullcontext
from typing import Any, NamedTuple

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moe.config.schema import Config
from moe.routing.decision import Knobs
from moe.routing.loss_table import COSTLY
from moe.training.objective import Outcome, total_loss
from moe.training.process import repeatable_gradients
from moe.training.setup import Training


class PassInput(NamedTuple):
    """The tensors that a pass reads beside the weights of the model.

    ids, labels, position_ids, told: as in `moe.data.blocks.Batch`. temperature, noise: as in `Knobs`. load: the load of
    the earlier micro-batches of the step, see `MoEForCausalLM.forward`.
    """

    ids: Int[Tensor, "B S"]
    labels: Int[Tensor, "B S"]
    position_ids: Int[Tensor, "B S"] | None
    told: Int[Tensor, "B 2"] | None
    temperature: Float[Tensor, ""]
    noise: Float[Tensor, ""] | None
    load: Shaped[Tensor, "L C E"] | None


class LossWeights(NamedTuple):
    """The numbers that weight the losses of a pass.

    labels: weight of the micro-batch's mean cross-entropy in its step. routers, beside: the `loss_weights` of the
    routers, of the model and of its adapter. passes: over so many micro-batches this rank takes the mean.
    """

    labels: float
    routers: list[dict[str, float]]
    beside: list[dict[str, float]]
    passes: int


class PassResult(NamedTuple):
    """What a step needs of a pass after it. load: what this micro-batch adds to the load of the step."""

    outcome: Outcome
    load: Shaped[Tensor, "L C E"] | None


def layer_settings(config: Config) -> dict[str, Any]:
    """Return the arguments of `MoEForCausalLM.forward` that hold for all passes of a run."""
    costly = frozenset(key for key in COSTLY if getattr(config, key))
    return {"capacity": config.capacity, "drop": config.drop, "costly": costly}


def forward_backward(training: Training, inputs: PassInput, weights: LossWeights) -> PassResult:
    """Add the gradients of one micro-batch to those of the parameters, and return its losses and routing sums."""
    config, accelerator = training.config, training.accelerator
    output = training.forward(
        input_ids=inputs.ids,
        labels=inputs.labels,
        position_ids=inputs.position_ids,
        told=inputs.told,
        knobs=Knobs(inputs.temperature, inputs.noise),
        load=inputs.load,
        loss_only=True,
        **layer_settings(config),
    )
    loss = total_loss(config, weights.routers, output, weight=weights.labels, beside_weights=weights.beside)
    # The gradient is then the mean over this rank's micro-batches. DDP and FSDP average it over the ranks.
    with nullcontext() if config.compile else repeatable_gradients(accelerator.device):
        accelerator.backward(loss / weights.passes)
    aux = {name: values.detach().mean() for name, values in (output.aux or {}).items()}
    beside = None if output.beside is None else output.beside["stats"]
    return PassResult(Outcome(output.loss.detach() * weights.labels, aux, output.stats, beside), output.load)
