"""Labels: the token that each position of a block has to predict."""

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

IGNORED = -100  # The label of a token that is not to be predicted.


def next_token(labels: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Return the target of each position: the label of the next position, and IGNORED for the last position.

    This is the only place that shifts labels. Labels are shifted rather than logits, because a slice of the logits
    would cost a copy of them in the backward pass.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
