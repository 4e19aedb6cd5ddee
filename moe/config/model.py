"""The section `model` of the configuration: sizes of the model, and where its weights come from."""

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from moe.checks import finite, one_of, require, require_path
from moe.config import layer_experts, layer_routers
from moe.config.checkpoints import dense as dense_checkpoint
from moe.config.checkpoints import saved


@dataclass
class ModelConfig:
    """Decoder-only transformer. `dim` is the width D, and `ffn` the hidden width F of one expert."""

    dim: int = MISSING  # width D of the hidden states
    heads: int = MISSING  # attention heads; D / heads must be even
    layers: int = MISSING  # decoder layers
    ffn: int = MISSING  # hidden width F of one expert
    num_experts: int = MISSING  # routed experts E of each MoE layer
    experts_by_layer: str | None = None  # other numbers of experts of single layers: 0-2:4 (layers 0 to 2), joined by +
    expert: str = "silu"  # form of an expert: silu | swiglu | geglu
    shared_experts: int = 0  # experts of the same width that every token uses, beside the routed ones
    shared_gate: bool = False  # multiply the output of shared experts by a learned sigmoid of the hidden state
    latent_dim: int | None = None  # width in which routed experts work, below dim (LatentMoE, 2601.18089); null: dim
    router_input: str = "feed_forward"  # what routers read: the input of feed_forward, or of attention before it
    router_precision: str = "fp32"  # numbers of routers: fp32 | bf16_weights (rounded) | bf16 (products too)
    routers: str | None = None  # other routers of single layers: 0-2:hash (an option), 0:k:1 (a setting), joined by +
    first_k_dense_replace: int = 0  # number of first layers that are dense feed-forward instead of MoE
    dense_ffn: int = MISSING  # hidden width of those dense layers
    dropout: float = 0.0  # probability that training sets a hidden value to 0
    embed_scale: bool = True  # multiply embeddings by sqrt(D)
    neftune_noise_alpha: float = 0.0  # uniform noise on embeddings in training, before that factor (2310.05914: 5)
    attention: str = "sdpa"  # implementation of the attention: eager | sdpa | flash_attention_2
    dense: str | None = None  # dense checkpoint to start from, a folder or hub name (`moe.model.upcycle`)
    dense_digest: str | None = None  # checksum of dense + those of upcycle_parents; filled in; a given one must match
    upcycle_noise: float = 0.0  # noise on each copied expert, as a share of the std of each matrix (2212.05055)
    upcycle_reset: float = 0.0  # share of each copied expert's hidden units that is drawn anew (2502.19261: 0.5)
    upcycle_split: int = 1  # parts into which each copied MLP is cut, one expert each (2410.07524)
    upcycle_parents: list[str] = field(default_factory=list)  # other checkpoints; experts copy all in turn (2403.07816)
    checkpoint: str | None = None  # Mixture of Experts to start from: of transformers, or a saved model of ours
    checkpoint_digest: str | None = None  # checksum of that model; filled in automatically; a given one must match
    offload: str | None = None  # folder from which experts are read when they run: for large models; steps=0 only

    def check(self) -> None:
        one_of("model.expert", self.expert, ("silu", "swiglu", "geglu"))
        one_of("model.attention", self.attention, ("eager", "sdpa", "flash_attention_2"))
        one_of("model.router_input", self.router_input, ("feed_forward", "attention"))
        one_of("model.router_precision", self.router_precision, ("fp32", "bf16_weights", "bf16"))
        usable = self.attention != "flash_attention_2" or importlib.util.find_spec("flash_attn") is not None
        require(usable, "model.attention", self.attention, "eager or sdpa, unless the package flash-attn is installed")
        for name in ("dim", "heads", "layers", "ffn", "num_experts", "dense_ffn"):
            value = getattr(self, name)
            require(1 <= value <= 10**6, f"model.{name}", value, "a whole number from 1 to 10^6")
        for key in ("dense", "checkpoint"):
            made = getattr(self, key) is not None or getattr(self, f"{key}_digest") is None
            require(made, f"model.{key}_digest", getattr(self, f"{key}_digest"), f"left out without model.{key}")
        one = self.dense is None or self.checkpoint is None
        require(one, "model.checkpoint", self.checkpoint, "left out with model.dense")
        if self.offload is not None:
            require(self.checkpoint is not None, "model.offload", self.offload, "null without model.checkpoint")
            require_path("model.offload", self.offload)
        divides = self.dim % self.heads == 0 and (self.dim // self.heads) % 2 == 0
        require(
            divides or self.checkpoint is not None,
            "model.heads",
            self.heads,
            f"a divisor of model.dim={self.dim} leaving an even head width",
        )
        require(self.shared_experts >= 0, "model.shared_experts", self.shared_experts, ">= 0")
        gated = self.shared_gate and not self.shared_experts
        require(not gated, "model.shared_gate", True, "false without model.shared_experts")
        latent, allowed = self.latent_dim, f"null, or a whole number from 1 to {self.dim - 1}, below model.dim"
        require(latent is None or 1 <= latent < self.dim, "model.latent_dim", latent, allowed)
        dense, allowed = self.first_k_dense_replace, f"between 0 and model.layers={self.layers}"
        require(0 <= dense <= self.layers, "model.first_k_dense_replace", dense, allowed)
        allowed = "null: all layers of a model of transformers are alike"
        if self.experts_by_layer is not None:
            require(self._has_our_decoder(), layer_experts.KEY, self.experts_by_layer, allowed)
            layer_experts.check(self.experts_by_layer, dense=self.first_k_dense_replace, layers=self.layers)
        if self.routers is not None:
            require(self._has_our_decoder(), layer_routers.KEY, self.routers, allowed)
            layer_routers.check(self.routers, dense=self.first_k_dense_replace, layers=self.layers)
        require(finite(self.dropout) and 0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        alpha = self.neftune_noise_alpha
        require(finite(alpha) and alpha >= 0, "model.neftune_noise_alpha", alpha, "a finite number >= 0")
        self._check_upcycling()

    def _has_our_decoder(self) -> bool:
        """Return whether our decoder takes the weights of the checkpoints, if there are some."""
        imports = self.checkpoint is not None and not self.continues
        return not imports and all(dense_checkpoint.kind(*each) == dense_checkpoint.OURS for each in self.parents)

    def explicit(self) -> "ModelConfig":
        """Return the same settings, with the texts for single layers written in the one way that a record has them."""
        experts, routers = self.experts_by_layer, self.routers
        return replace(
            self,
            experts_by_layer=None if experts is None else layer_experts.explicit(experts),
            routers=None if routers is None else layer_routers.explicit(routers),
        )

    def experts_of(self, layer: int) -> int:
        """Return the number of routed experts of a decoder layer."""
        return layer_experts.of_layer(self.experts_by_layer, layer, self.num_experts)

    @property
    def experts_of_layers(self) -> list[int]:
        """The number of routed experts of each decoder layer that has experts."""
        return [self.experts_of(layer) for layer in self.moe_layers]

    @property
    def moe_layers(self) -> range:
        """The decoder layers that have experts."""
        return range(self.first_k_dense_replace, self.layers)

    @property
    def continues(self) -> bool:
        """Whether the checkpoint is a saved model of this project."""
        return self.checkpoint is not None and saved.is_saved(self.checkpoint, self.checkpoint_digest)

    @property
    def parents(self) -> list[dense_checkpoint.Parent]:
        """The dense checkpoints to start from."""
        return [] if self.dense is None else dense_checkpoint.parents(vars(self))

    def _check_upcycling(self) -> None:
        off: Any
        for key, off in (("noise", 0), ("reset", 0), ("split", 1), ("parents", [])):
            value = getattr(self, f"upcycle_{key}")
            require(self.dense is not None or value == off, f"model.upcycle_{key}", value, f"{off} without model.dense")
        for key, off in (("shared_gate", False), ("latent_dim", None), ("router_input", "feed_forward")):
            value = getattr(self, key)
            allowed = "left out with model.dense, whose MLPs become experts as they are"
            require(self.dense is None or value == off, f"model.{key}", value, allowed)
        noise, reset, split = self.upcycle_noise, self.upcycle_reset, self.upcycle_split
        require(finite(noise) and noise >= 0, "model.upcycle_noise", noise, "a finite number >= 0")
        allowed = f"0, or from 1 / model.ffn = {1 / self.ffn:.2g} to 1"
        require(reset == 0 or 1 / self.ffn <= reset <= 1, "model.upcycle_reset", reset, allowed)
        for key in ("num_experts", "shared_experts"):
            allowed = f"a multiple of model.upcycle_split={split}, because a copy has so many experts"
            require(getattr(self, key) % split == 0, f"model.{key}", getattr(self, key), allowed)
        parents = max(1, len(self.parents))
        allowed = f"a multiple of {parents}, the number of dense checkpoints, times model.upcycle_split={split}"
        require(self.num_experts % (parents * split) == 0, "model.num_experts", self.num_experts, allowed)
        divides = all(experts % (parents * split) == 0 for experts in self.experts_of_layers)
        require(divides, layer_experts.KEY, self.experts_by_layer, f"of numbers that are each {allowed}")
