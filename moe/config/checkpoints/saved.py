"""A saved model of this project to continue from: what its config.json says. Reading it needs no torch."""

from functools import lru_cache
from typing import Any

from moe.checks import require
from moe.config.checkpoints.files import check_numbers
from moe.config.checkpoints.files import content as content_of

KIND = "moe_routing"  # model_type in its config.json

# Key of `moe.config.model.ModelConfig` -> key of config.json, and its type.
KEYS: dict[str, tuple[str, Any]] = {
    "dim": ("hidden_size", int),
    "heads": ("num_attention_heads", int),
    "layers": ("num_hidden_layers", int),
    "ffn": ("intermediate_size", int),
    "num_experts": ("num_experts", int),
    "experts_by_layer": ("experts_by_layer", str | None),
    "expert": ("expert", str),
    "shared_experts": ("shared_experts", int),
    "shared_gate": ("shared_gate", bool),
    "latent_dim": ("latent_dim", int | None),
    "router_input": ("router_input", str),
    "router_precision": ("router_precision", str),
    "routers": ("routers", str | None),
    "first_k_dense_replace": ("first_k_dense_replace", int),
    "dense_ffn": ("dense_ffn", int),
    "embed_scale": ("embed_scale", bool),
}


@lru_cache
def is_saved(name: str, revision: str | None) -> bool:
    """Return whether the checkpoint `name`, a folder or a name on the hub, is a saved model of this project."""
    return bool(content_of("model.checkpoint", name, revision).get("model_type") == KIND)


def read(name: str, revision: str | None) -> dict[str, Any]:
    """Return the content of config.json of a saved model. The file may be a stranger's.

    Raises ConfigError if it lacks what a command line needs, and for a model with an adapter.
    `MoEConfig.from_dict` checks the rest.
    """
    content = content_of("model.checkpoint", name, revision)
    where = f"in config.json of model.checkpoint={name}"
    check_numbers(content, where.removeprefix("in "))  # what follows goes through all layers
    sizes = [*KEYS.values(), ("vocab_size", int), ("max_position_embeddings", int)]
    for key, kind in sizes:
        value, type_name = content.get(key), getattr(kind, "__name__", str(kind))
        fits = isinstance(value, kind) and (type(value) is bool) == (kind is bool)
        require(fits, f"{key} {where}", value, f"there, of type {type_name}")
    router, adapter = content.get("router"), content.get("adapter")
    named = isinstance(router, dict) and isinstance(router.get("_target_"), str)
    require(named, f"router {where}", router, "a class as _target_, and its settings")
    require(adapter is None, f"adapter {where}", adapter, "null: only a model without an adapter can be continued")
    return content


def resolve(name: str, revision: str | None) -> dict[str, Any]:
    """Return the keys of the `model` group that a saved model fixes."""
    content = read(name, revision)
    own = {} if content.get("imported") is None else {"dropout": 0.0}
    return {key: content.get(json_key) for key, (json_key, _) in KEYS.items()} | own


def router(name: str) -> dict[str, Any]:
    """Return the router of a saved model: its class and its settings.

    Raises ConfigError for a class outside of this project. Its code runs only if the command names it.
    """
    spec: dict[str, Any] = read(name, None)["router"]
    target = spec["_target_"]
    allowed = f"a class of this project, or name the router in the command: router._target_={target}"
    ours = target.startswith("moe.")
    require(ours, f"router._target_ in config.json of model.checkpoint={name}", target, allowed)
    return spec
