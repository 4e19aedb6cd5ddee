"""Matryoshka routing: the number of experts per token is drawn at random in training, so that any number works."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.fused import uncompiled
from moe.routers.base import LinearRouter, check_k
from moe.routing.decision import Context, Routing


class Matryoshka(LinearRouter):
    """Router that takes the top-k of W x, where k is drawn anew for each layer and micro-batch (Wang 2509.26520).

    Training draws k from `k_min` ... `k_max`, all equally likely, for all tokens together (in the paper: layer-wise,
    uniform). Evaluation uses `k`. Gates are the softmax over the chosen experts. If one expert is drawn its gate is 1,
    and the router learns nothing from the output of that micro-batch.

    So the best expert learns to work alone, and each further one adds to those before it. The specialization study
    shows the loss at other numbers of experts. Causal when dropless. Under a capacity limit it counts as not causal,
    because the limit is a share of the number of assignments.

    k: experts per token in evaluation.
    k_min: fewest experts per token in training.
    k_max: most experts per token in training.
    """

    expects_load = True

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, k_min: int = 1, k_max: int = 4) -> None:
        for name, value in (("k", k), ("k_min", k_min), ("k_max", k_max)):
            check_k(value, num_experts, key=f"router.{name}")
        require(k_min <= k_max, "router.k_min", k_min, f"at most router.k_max={k_max}")
        require(k_max > 1, "router.k_max", k_max, "at least 2: a single expert always has the gate 1")
        super().__init__(dim, num_experts, fixed_k=k if k_min == k_max == k else None)
        self.k, self.k_min, self.k_max = k, k_min, k_max
        self.mean_k = (k_min + k_max) / 2

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        top = noisy.topk(draw(self.k_min, self.k_max) if self.training else self.k)
        weight = torch.softmax(top.values, -1)
        aux = self.expected_load(logits, noisy, top.indices.shape[-1], context)
        return Routing.token_choice(top.indices, weight, probs=torch.softmax(noisy, -1), logits=logits, aux=aux)


@uncompiled
def draw(least: int, most: int) -> int:
    """Return a whole number from `least` to `most`, all equally likely, from the generator of the CPU."""
    [number] = torch.randint(least, most + 1, (1,), device="cpu").tolist()
    return int(number)
