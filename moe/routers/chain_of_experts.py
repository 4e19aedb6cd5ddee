"""Chain of experts: the same experts, asked several times in a row, each time by a router of its own."""

from moe.checks import require
from moe.routers.base import Router
from moe.routers.topk import TopK


class ChainOfExperts(Router):
    """x_0 = x, x_c = x_{c-1} + sum_i g_{c,i} E_i(x_{c-1}) for c = 1 ... `iterations`, each with its own `TopK` of `k`
    experts; the layer returns x_C - x_0, for the block adds x itself (Wang et al. 2506.18945).

    The work is that of k * iterations experts a token, in sequence. One iteration is `TopK`. Losses are means over
    iterations; in the metrics a token counts once an iteration.
    """

    def __init__(self, dim: int, num_experts: int, *, iterations: int = 2, k: int = 1) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(iterations >= 1, "router.iterations", iterations, "at least 1")
        for iteration in range(iterations):
            self.add_module(str(iteration), TopK(dim, num_experts, k=k))

    @property
    def chain(self) -> list[Router]:
        return [router for router in self.children() if isinstance(router, Router)]
