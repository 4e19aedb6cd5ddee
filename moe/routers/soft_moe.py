"""Soft MoE: experts process mixtures of tokens, so nothing is selected, dropped or imbalanced."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import require
from moe.routers.base import Router
from moe.routing.decision import Context, Routing, Slots, fill_places
from moe.routing.loss_table import BALANCE_WEIGHTS


class SoftMoE(Router):
    """Router that gives each expert `slots` inputs per sequence, each a mixture of the tokens of the sequence.

    Puigcerver et al. 2308.00951, equations 1-3: a slot's input is a softmax-weighted mixture of tokens, and a token's
    output is a softmax-weighted mixture of the outputs of all slots. Logits are `scale` times the cosine of token and
    slot embedding (their section 2.3), plus noise. Dispatch weights are the softmax over the tokens of a sequence,
    combine weights the softmax over all slots. `probs` is the sum of the combine weights over each expert's slots.

    E * slots = K * seq_len costs as much as K experts per token. Loads are equal by construction, so balance losses and
    a capacity limit do not apply. Metrics of which token chose which expert are null. Not causal: every slot mixes the
    whole sequence. Text is generated with use_cache=False, so that slots mix the text so far and not one new token.

    slots: inputs of an expert for each sequence.
    """

    causal = False
    # A slot has one expert, and each expert has as many slots.
    ignores = BALANCE_WEIGHTS | {"lb_first", "importance", "z", "output_orthogonality", "capacity"}
    why = "tokens choose no experts: each expert has equally many slots"

    def __init__(self, dim: int, num_experts: int, *, slots: int = 32) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        require(slots >= 1, "router.slots", slots, "at least 1")
        self.slots = slots
        self.weight = nn.Parameter(torch.empty(num_experts * slots, dim))
        self.scale = nn.Parameter(torch.ones(()))

    def experts_per_token(self, seq_len: int) -> float:
        return self.num_experts * self.slots / seq_len

    def mixing_flops(self) -> int:
        return 2 * 2 * len(self.weight) * self.dim  # tokens to slots, and slots to tokens

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight.to(x.dtype), dim=-1))
        logits = self.add_noise(self.scale * cosine, context.knobs)
        combine = torch.softmax(logits, -1)
        shape, places = (*context.ids.shape, -1), context.ids.numel()
        lowest = torch.finfo(logits.dtype).min  # the softmax of padding is then 0, and finite for padding alone
        slot = torch.arange(len(context.ids) * len(self.weight), device=x.device)
        return Routing(
            token=slot,
            expert=slot % len(self.weight) // self.slots,
            weight=x.new_ones(len(slot)),
            probs=combine.view(-1, self.num_experts, self.slots).sum(-1),
            logits=None,
            slots=Slots(
                dispatch=torch.softmax(fill_places(logits, context.place, places, value=lowest).view(shape), 1).mT,
                combine=fill_places(combine, context.place, places).view(shape),
                place=context.place,
            ),
        )
