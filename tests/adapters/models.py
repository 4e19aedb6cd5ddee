"""Small models of each kind that adapters are attached to."""

from typing import Any

import torch

from moe.config.classes import build
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from tests.architectures import V, around, tiny

SPECS = {
    "lora": {"_target_": "moe.adapters.lora.Lora", "parts": ["attention", "experts"], "rank": 2, "alpha": 4.0},
    "rslora": {
        "_target_": "moe.adapters.lora.Lora",
        "parts": ["attention", "experts"],
        "rank": 3,
        "alpha": 4.0,
        "variant": "rslora",
    },
    "dora": {
        "_target_": "moe.adapters.lora.Lora",
        "parts": ["attention"],
        "rank": 2,
        "alpha": 4.0,
        "variant": "dora",
    },
    "r": {
        "_target_": "moe.adapters.perft.Routed",
        "rank": 3,
        "adapters": 4,
        "activation": "silu",
        "router": {"_target_": "moe.routers.topk.TopK", "k": 2, "gate": "renorm"},
    },
    "e": {"_target_": "moe.adapters.perft.Embedded", "rank": 3, "activation": "silu"},
    "d": {"_target_": "moe.adapters.perft.Dense", "rank": 3, "adapters": 4, "activation": "silu"},
    "s": {"_target_": "moe.adapters.perft.Shared", "rank": 3, "activation": "silu"},
}


def decoder(shared: int = 1, k: int = 2) -> MoEForCausalLM:
    """Return a decoder of ours, with random weights that depend on nothing else than its sizes."""
    torch.manual_seed(0)
    router = {"_target_": "moe.routers.topk.TopK", "k": k, "gate": "renorm"}
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind = {"intermediate_size": 12, "num_experts": 4, "shared_experts": shared, "expert": "swiglu"}
    config = MoEConfig(**sizes, **kind, router=router, max_position_embeddings=32, initializer_range=0.3)
    return MoEForCausalLM(config, trusted=True).eval()


def model(kind: str) -> MoEForCausalLM:
    """Return a decoder of ours, or a tiny model of transformers around our layers."""
    return decoder() if kind == "ours" else around(tiny(kind)).eval()


def attached(base: MoEForCausalLM, spec: dict[str, Any]) -> MoEForCausalLM:
    """Attach the adapter of these settings to a model, and return the model."""
    base.attach(build(spec, "adapter", trusted=True), spec, trusted=True)
    return base.eval()


def ids() -> torch.Tensor:
    return torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def disturb(model: MoEForCausalLM) -> None:
    """Give the parameters of the adapter other values than those before the first step."""
    torch.manual_seed(7)
    named = dict(model.named_parameters())
    for name in sorted(model.adapter_names):
        named[name].add_(0.2 * torch.randn(named[name].shape))
