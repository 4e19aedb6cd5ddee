"""Experts: E small feed-forward networks with stacked weights, each applied to its own group of rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Experts(nn.Module):
    """E feed-forward networks without biases, weights stacked as (E, out, in), like E `nn.Linear` weights.

    silu: down(silu(up x)), two matrices. swiglu: down(silu(gate x) * up x), three matrices (Shazeer 2002.05202).
    """

    def __init__(self, num_experts: int, dim: int, *, hidden: int, kind: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, dim)) if kind == "swiglu" else None
        self.up = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
        """Rows sorted by expert, `counts` of them for each; one without rows costs nothing, gets gradient 0."""
        groups = x.split(counts.tolist())
        # unbind, not indexing: the gradient of E slices is stacked once instead of E times in full size
        gates = self.gate.unbind() if self.gate is not None else [None] * len(groups)
        outputs = [
            self._expert(rows, gate, up, down)
            for rows, gate, up, down in zip(groups, gates, self.up.unbind(), self.down.unbind(), strict=True)
        ]
        return torch.cat(outputs)

    def _expert(self, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        hidden = F.silu(F.linear(x, up)) if gate is None else F.silu(F.linear(x, gate)) * F.linear(x, up)
        return F.linear(F.dropout(hidden, self.dropout, self.training), down)
