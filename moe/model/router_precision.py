"""Run a router in lower precision, and compare what it decides with fp32 arithmetic."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe.routers.base import Router
from moe.routing.decision import Context, Routing

# fp32: weights and arithmetic in fp32. bf16_weights: the parameters are rounded to bf16, and the arithmetic is in fp32.
# bf16: products of matrices round both factors and the result to bf16, and everything else, such as the softmax, is in
# fp32. In all of them the optimizer has fp32 weights.
PRECISIONS = ("fp32", "bf16_weights", "bf16")

PRODUCTS = {F.linear, torch.einsum, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm}
PRODUCTS |= {Tensor.__matmul__, Tensor.__rmatmul__}


class _RoundedProducts(TorchFunctionMode):
    """Inside the `with` block, products of matrices are computed in bf16, and their results have the type of before."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in PRODUCTS:
            return function(*args, **(kwargs or {}))
        result = function(*(each.bfloat16() if isinstance(each, Tensor) else each for each in args), **(kwargs or {}))
        return result.to(next(each.dtype for each in args if isinstance(each, Tensor)))


def decide(router: Router, x: Float[Tensor, "T D"], context: Context, precision: str) -> Routing:
    """Return the decision of a router in one of the `PRECISIONS`. Its numbers are in fp32, or in fp64 where x is.

    Buffers, which routers learn without a gradient, are not rounded in `bf16_weights`.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        if precision == "bf16":
            with _RoundedProducts():
                return cast(Routing, router(x, context))
        if precision == "bf16_weights":
            rounded = {name: p.bfloat16().to(p.dtype) for name, p in router.named_parameters()}
            return cast(Routing, torch.func.functional_call(router, rounded, (x, context)))
        return cast(Routing, router(x, context))


@torch.no_grad()
def flips(routing: Routing, exact: Routing, tokens: int, experts: int) -> Int[Tensor, "2"]:
    """Return for how many tokens two decisions have other experts, and for how many other experts or another order.

    The order of a token's experts is that of their weights; equal weights have no order.
    """
    pairs = [_weights(each, tokens, experts) for each in (routing, exact)]
    other_set = ((pairs[0] >= 0) != (pairs[1] >= 0)).any(1)
    orders = [weights.argsort(dim=1, descending=True, stable=True) for weights in pairs]
    return torch.stack([other_set.sum(), (other_set | (orders[0] != orders[1]).any(1)).sum()])


def _weights(routing: Routing, tokens: int, experts: int) -> Float[Tensor, "T E"]:
    """Return the weight of each token and expert, and -1 where a token does not take the expert."""
    return routing.weight.new_full((tokens, experts), -1.0).index_put_((routing.token, routing.expert), routing.weight)
