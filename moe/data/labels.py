"""What each position of a block of tokens is to predict."""

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

IGNORED = -100  # a label that is not predicted


def next_token(labels: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """What each position predicts: the label after it, and nothing (IGNORED) at the end. The only place that shifts.

    Labels move rather than logits: slicing logits would cost a copy of them in the backward pass.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
