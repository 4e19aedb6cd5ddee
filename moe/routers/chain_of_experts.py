"""Chain of experts: the same experts process a token several times in a row."""

from moe.checks import require
from moe.routers.base import Router
from moe.routers.topk import TopK


class ChainOfExperts(Router):
    """Router that runs `iterations` top-k routers in a row over the same experts (Wang et al. 2506.18945).

    x_0 = x and x_c = x_{c-1} + sum_i g_{c,i} E_i(x_{c-1}) for c = 1 ... `iterations`. Each iteration has its own `TopK`
    of `k` experts. The layer returns x_C - x_0, because the decoder layer adds x itself. Causal.

    A token costs as much as k * iterations experts, which run one after another. With one iteration this is `TopK`.
    Losses are means over iterations. In the metrics a token counts once per iteration.

    iterations: how many times in a row the layer routes its tokens.
    k: experts per token in each iteration.
    """

    expects_load = True

    def __init__(self, dim: int, num_experts: int, *, iterations: int = 2, k: int = 1) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(1 <= iterations <= 100, "router.iterations", iterations, "between 1 and 100")
        for iteration in range(iterations):
            self.add_module(str(iteration), TopK(dim, num_experts, k=k))
        if num_experts == 1:
            self.ignores = frozenset(("noise",))

    @property
    def chain(self) -> list[Router]:
        return [router for router in self.children() if isinstance(router, Router)]
