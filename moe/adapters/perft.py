"""PERFT (2411.08212): bottleneck adapters beside a frozen MoE layer, with or without a router of their own.

A bottleneck is A(x) = U f(D x), with D of shape (rank, width) and U of shape (width, rank). U starts at zero, so that
the model starts with the outputs of its frozen weights. In most of the paper's experiments, f is the identity. The
paper has four kinds, for an MoE layer with the experts E_i and
the weights g_i of its router:

- R: y = sum_i g_i(x) E_i(x) + sum_j h_j(x) A_j(x), where h is a router over the M adapters.
- E: y = sum_i g_i(x) (E_i(x) + A_i(x)).
- D: y = sum_i g_i(x) E_i(x) + sum_j A_j(x).
- S: as D, with one adapter.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.adapters.base import Adapter, renamed
from moe.checks import ConfigError, one_of, require
from moe.config.classes import build
from moe.model.causal_lm import MoEForCausalLM
from moe.model.decoder import DenseFFN
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.base import Router

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "silu": F.silu}


class Bottlenecks(Experts):
    """Stacked bottlenecks, as experts with two matrices. Their output matrices, `down`, start at zero."""

    def __init__(self, number: int, dim: int, *, rank: int, activation: str) -> None:
        super().__init__(number, dim, hidden=rank, kind="silu")
        self.activation = ACTIVATIONS[activation]

    @torch.no_grad()
    def initialize(self, std: float, names: dict[Tensor, str]) -> None:
        super().initialize(std, names)
        if self.down in names:
            self.down.zero_()


class Bottleneck(DenseFFN):
    """One bottleneck, through which every token passes."""

    def __init__(self, dim: int, *, rank: int, activation: str) -> None:
        nn.Module.__init__(self)
        self.experts = Bottlenecks(1, dim, rank=rank, activation=activation)


class _Perft(Adapter):
    """Bottlenecks in every MoE layer.

    rank: hidden width of a bottleneck.
    activation: f of a bottleneck: identity or silu.
    """

    def __init__(self, *, rank: int, activation: str = "identity") -> None:
        require(1 <= rank <= 10**6, "adapter.rank", rank, "a whole number from 1 to 10^6")
        one_of("adapter.activation", activation, ACTIVATIONS)
        self.rank, self.activation = rank, activation

    def attach(self, model: MoEForCausalLM, *, trusted: bool) -> None:
        added = [self.add_to(layer, model.config.hidden_size, trusted=trusted) for layer in model.moe_layers]
        routers = [module.router for module in added if isinstance(module, MoELayer)]
        for router in routers[1:]:
            router.tie_to(routers[0])
        reference = next(model.parameters())
        names = {tensor: name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        for module in added:
            module.to(reference.device)
            for part in module.modules():
                if isinstance(part, Bottlenecks):
                    part.to(reference.dtype)
                    part.initialize(model.config.initializer_range, names)
            if isinstance(module, MoELayer):
                module.router.initialize(model.config.initializer_range, names)

    def add_to(self, layer: MoELayer, dim: int, *, trusted: bool) -> nn.Module:
        """Put bottlenecks of width `dim` into a layer, and return them."""
        raise NotImplementedError


class Routed(_Perft):
    """PERFT-R: `adapters` bottlenecks beside each MoE layer, with a router of their own.

    The router sees what the layer sees. Its balance losses have the weights of those of the layer's own router. There
    is no capacity limit for adapters.

    rank: hidden width of a bottleneck.
    adapters: number of bottlenecks in a layer.
    router: the router over them: its class as adapter.router._target_, and its settings.
    """

    acts_on = frozenset(("router",))

    def __init__(self, *, rank: int, adapters: int, router: dict[str, Any], activation: str = "identity") -> None:
        super().__init__(rank=rank, activation=activation)
        require(1 <= adapters <= 10**6, "adapter.adapters", adapters, "a whole number from 1 to 10^6")
        self.adapters, self.router = adapters, router
        self.muon = "stacks" if adapters > 1 else "matrices"

    def check(self, *, dim: int) -> None:
        with torch.device("meta"):
            self._router(dim, trusted=True).check_class()

    def add_to(self, layer: MoELayer, dim: int, *, trusted: bool) -> nn.Module:
        bottlenecks = Bottlenecks(self.adapters, dim, rank=self.rank, activation=self.activation)
        layer.beside = MoELayer(self._router(dim, trusted=trusted).float(), bottlenecks)
        return layer.beside

    def _router(self, dim: int, *, trusted: bool) -> Router:
        try:
            router: Router = build(self.router, "router", dim, self.adapters, trusted=trusted)
        except ConfigError as error:
            names = {"router.": "adapter.router.", "model.num_experts": "adapter.adapters"}
            raise renamed(error, names) from error
        alone = router.decides_alone and not router.uses_ids and not router.told
        fits = alone and not router.mixing_flops() and not router.adds_output
        name = f"{type(router).__module__}.{type(router).__qualname__}"
        allowed = "a router that in evaluation decides for each token by its hidden state alone, and adds no output"
        require(fits, "adapter.router._target_", name, allowed)
        return router


class Embedded(_Perft):
    """PERFT-E: one bottleneck beside each routed expert, with the same tokens and weights as the expert.

    rank: hidden width of a bottleneck.
    """

    acts_on = frozenset(("outputs",))

    def add_to(self, layer: MoELayer, dim: int, *, trusted: bool) -> nn.Module:
        width = dim if layer.latent is None else layer.latent.down.out_features
        layer.beside_experts = Bottlenecks(layer.router.num_experts, width, rank=self.rank, activation=self.activation)
        return layer.beside_experts


class Dense(_Perft):
    """PERFT-D: `adapters` bottlenecks beside each MoE layer, through all of which every token passes.

    Their sum is computed as one bottleneck of `adapters` times the rank, which is the same function.

    rank: hidden width of a bottleneck.
    adapters: number of bottlenecks in a layer.
    """

    acts_on = frozenset()
    muon = "matrices"

    def __init__(self, *, rank: int, adapters: int, activation: str = "identity") -> None:
        super().__init__(rank=rank, activation=activation)
        require(1 <= adapters <= 10**6, "adapter.adapters", adapters, "a whole number from 1 to 10^6")
        self.adapters = adapters

    def add_to(self, layer: MoELayer, dim: int, *, trusted: bool) -> nn.Module:
        layer.beside = Bottleneck(dim, rank=self.adapters * self.rank, activation=self.activation)
        return layer.beside


class Shared(Dense):
    """PERFT-S: one bottleneck beside each MoE layer, through which every token passes.

    rank: hidden width of the bottleneck.
    """

    def __init__(self, *, rank: int, activation: str = "identity") -> None:
        super().__init__(rank=rank, adapters=1, activation=activation)
