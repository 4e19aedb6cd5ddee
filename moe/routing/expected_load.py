"""The load of each expert that is expected if the noise of one expert at a time is drawn again.

An expert with logit z is chosen if z + noise exceeds a bar. The bar depends on the noisy logits of the other experts
alone, so the probability to be chosen is that of a normal distribution (Shazeer et al. 1701.06538, appendix A).

Letters in shapes: T tokens, E experts.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.fused import uncompiled


def bar(values: Float[Tensor, "T E"], k: int) -> Float[Tensor, "T E"]:
    """Return what an expert has to exceed to be among the k largest, if the others keep their values: -inf for k = E.

    It is the k-th largest of the others: the (k+1)-th of all for an expert that is among the k itself, and the k-th
    for the rest.
    """
    if k >= values.shape[-1]:
        return torch.full_like(values, -torch.inf)
    kth, following = values.topk(k + 1).values[:, -2:].split(1, dim=-1)
    return torch.where(values > following, following, kth)


def bar_in_groups(values: Float[Tensor, "T E"], k: int, *, groups: int, top_groups: int) -> Float[Tensor, "T E"]:
    """Return what an expert has to exceed to be chosen, if groups of neighboring experts are chosen first.

    A token takes the k largest values in the `top_groups` groups whose two largest values have the largest sum. Values
    are positive. An expert has to pass two bars. First it has to lift its group among the chosen ones, if the group is
    not there anyway. Then it has to be among the k largest of its group and of the other groups that are chosen.
    """
    size = values.shape[-1] // groups
    if top_groups == groups or size == 1:
        return bar(values, k)
    grouped = values.unflatten(-1, (groups, size))
    scores, bars = grouped.topk(2).values.sum(-1), []
    for number in range(groups):
        others = scores.index_fill(-1, torch.tensor([number], device=values.device), -torch.inf).topk(top_groups)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, others.indices[:, :-1], True)
        chosen[:, number] = True
        within = values.masked_fill(~chosen.repeat_interleave(size, -1), -torch.inf)
        last, own = others.values[:, -1:], grouped[:, number]
        largest, second = bar(own, 1), bar(own, 2)  # of the others in its group
        entry = torch.where(largest + second > last, -torch.inf, last - largest)
        bars.append(torch.maximum(entry, bar(within, k).unflatten(-1, (groups, size))[:, number]))
    return torch.cat(bars, -1)


def stay_probability(
    clean: Float[Tensor, "T E"], bar: Float[Tensor, "T E"], spread: Float[Tensor, "T E"] | Float[Tensor, ""]
) -> Float[Tensor, "T E"]:
    """Return the probability that clean + spread * N(0, 1) exceeds the bar, which may be infinite."""
    within = bar.isfinite()
    probability = torch.special.ndtr((clean - torch.where(within, bar, 0.0)) / spread)
    return torch.where(within, probability, (bar < 0).to(probability.dtype))


def cv_squared(values: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """Return variance (ddof 0) / mean^2. It is 0 if all values are equal, also for a single expert."""
    return values.var(correction=0) / values.mean().square()


# A plain function that computes this loss, a softmax and a top-k from the same logits of four experts gets half of its
# gradient from inductor (torch 2.13 on a CPU), and all of it from the backend aot_eager_decomp_partition.
@uncompiled
def expected_load_cv(
    clean: Float[Tensor, "T E"], bar: Float[Tensor, "T E"], noise: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Compute CV^2 over experts of the expected load, which is the sum of `stay_probability` over tokens.

    Unlike a count of tokens it has a gradient. In the paper each logit has a standard deviation of its own.

    clean: logits without noise; -inf for experts that a token cannot take. bar: what logits with noise have to exceed.
    noise: the standard deviation.
    """
    return cv_squared(stay_probability(clean, bar, noise).sum(0)).to(clean.dtype)
