"""Laws about unusual inputs, about precision, and about devices."""

import copy
import itertools

import torch

from moe.model.layer import LayerOutput
from moe.routing.loss_table import COSTLY
from moe.testing.inputs import (
    B,
    D,
    S,
    context,
    hidden_states,
    random_layer,
    random_router,
    token_ids,
)
from moe.testing.law import Make, hold, law


@law
def unusual_batches_are_finite(make: Make) -> None:
    """Outputs and gradients are finite with ties, with all tokens at one expert, and with experts that get no token.

    The gradient of an expert that gets no token is 0. Every assignment is counted.
    """
    fills = {"one token": 1.0, "identical tokens": 0.7, "zeros": 0.0, "huge": 1e4, "far below 0": 1e4}
    for (batch, fill), capacity in itertools.product(fills.items(), (None, 1.0)):
        shape = (1, 1, D) if batch == "one token" else (B, S, D)
        layer = random_layer(make)
        if batch == "far below 0":  # every logit of a linear router is then so negative that its sigmoid is 0 in fp32
            with torch.no_grad():
                for p in layer.router.parameters():
                    p.copy_(-p.abs())
        x = torch.full(shape, fill).requires_grad_()
        output: LayerOutput = layer(x, context(torch.full(shape[:2], 3), capacity=capacity))
        (output.y.mean() + sum(output.aux.values())).backward()
        hold(output.y.isfinite().all(), f"{batch}: the output is not finite")
        for name, p in layer.named_parameters():
            hold(p.grad is not None, f"{batch}: {name} gets no gradient; keep it in the graph, with weight 0 at least")
            hold(p.grad.isfinite().all(), f"{batch}: the gradient of {name} is not finite")  # type: ignore[union-attr]
        counted = output.stats.offered.sum() == output.stats.assignments
        hold(counted and output.stats.kept.sum() <= output.stats.assignments, f"{batch}: assignments are lost")
        gradient = layer.experts.up.grad
        assert gradient is not None
        hold((gradient[output.stats.kept == 0] == 0).all(), f"{batch}: an expert without tokens gets a gradient")


@law
def large_logits_choose_as_in_fp64(make: Make) -> None:
    """The router chooses in fp32 what it chooses in fp64, for hidden states and so for logits of any size.

    The logits themselves differ by more than their rounding. But probabilities of fp32 round to ties where logits
    differ by 104 (softmax) or are above 17 (sigmoid). Those of fp64 do so at 745 and 37.
    """
    router, ids = random_router(make).eval(), token_ids()
    exact = copy.deepcopy(router).double()
    for scale in (1.0, 4.0, 16.0, 64.0, 256.0):
        x = scale * torch.randn(B * S, D, generator=torch.Generator().manual_seed(3))
        for link, exact_link in zip(router.chain, exact.chain, strict=True):
            routing, reference = link(x, context(ids)), exact_link(x.double(), context(ids))
            for values in (reference.probs, reference.logits):
                hold(values is None or values.dtype == torch.float64, "compute in the precision of x")
            chosen, expected = (
                sorted(zip(r.token.tolist(), r.expert.tolist(), strict=True)) for r in (routing, reference)
            )
            advice = f"at {scale} times the hidden states fp64 chooses other experts: choose by logits"
            hold(chosen == expected, advice)


@law
def tensors_are_created_on_the_device_of_the_input(make: Make) -> None:
    """The layer and its router create all tensors on the device of their input.

    On a GPU the default device (the CPU) is another one. Here the default device is `meta`, because mixing it with the
    CPU is an error.
    """
    x, ids = hidden_states().requires_grad_(), token_ids()
    layer = random_layer(make)
    for capacity in (None, 1.0):
        layer_context = context(ids, noise=0.1, capacity=capacity)._replace(
            costly=COSTLY, compared=torch.arange(0, ids.numel(), 3)
        )
        try:
            with torch.device("meta"):
                output = layer(x, layer_context)
                torch.stack([output.y.square().mean(), *output.aux.values()]).sum().backward()
                for router in layer.router.chain:
                    router.after_step(output.stats)
        except (RuntimeError, NotImplementedError) as error:
            advice = "give device=x.device to each new tensor"
            raise AssertionError(f"a tensor is created on the default device ({error}); {advice}") from error
