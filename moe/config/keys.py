"""Names of settings: which belong to a run's identity, which a run may not use, and nested settings as flat keys."""

import json
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any

from moe.routing.loss_table import LOSSES

# Keys that are not part of a run's identity, so that they may change when a run is resumed. They do not influence what
# a run computes, with two exceptions: `threads` influences the last bits, and `expert_parallel` the random numbers of
# dropout. conf/config.yaml leaves the same keys out of folder names.
FREE_KEYS = (
    "out",
    "results",
    "threads",
    "save_every",
    "save_model",
    "gradient_checkpointing",
    "cuda_graph",
    "expert_parallel",
    "rank_timeout",
    "logger",
    "data.cache",
    "model.offload",
    "claims",
    "planned_seeds",
    "planned_effect",
    "tune",
    "tune_seeds",
    "question",
)

# Keys that not every run can use, each with the value that switches it off. A run whose router ignores a key has this
# value, and its record names no level of the key. `run_routers.ignored_keys` says which keys a run ignores.
OFF: dict[str, Any] = {
    "noise": 0.0,
    "capacity": None,
    "drop": "position",
    **{loss.weight: 0.0 for loss in LOSSES.values()},
}

# Such keys without a value that switches them off. A run that ignores them has their defaults.
RATES = frozenset(("optimizer.router_lr", "optimizer.experts_lr"))
DEFAULTED = RATES | {"optimizer.momentum", "optimizer.expert_step"}

# Groups that decide nothing in a model without Mixture-of-Experts layers.
DENSE_IGNORES = ("router", "schedule")

# Keys of `model` that decide nothing in such a model.
OF_EXPERTS = (
    "num_experts",
    "experts_by_layer",
    "ffn",
    "shared_experts",
    "shared_gate",
    "latent_dim",
    "router_input",
    "router_precision",
    "routers",
)


@cache
def is_free(key: str) -> bool:
    """Return whether a flat key is one of `FREE_KEYS` or lies below one."""
    return any(f"{key}.".startswith(f"{free}.") for free in FREE_KEYS)


def fingerprint(identity: dict[str, Any]) -> str:
    """Return a text that is equal for equal identities, however their numbers are written: 1 is 1.0."""

    def plain(value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps({key: plain(value) for key, value in sorted(identity.items())})


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested dict, or a dataclass, as one dict with dotted keys: {"a": {"b": 1}} becomes {"a.b": 1}.

    Dataclasses in a list, such as claims, become dicts.
    """
    flat: dict[str, Any] = {}
    for key, value in (vars(tree) if is_dataclass(tree) else tree).items():
        if isinstance(value, dict) or is_dataclass(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            records = isinstance(value, list) and any(map(is_dataclass, value))
            flat[f"{prefix}{key}"] = [asdict(item) for item in value] if records else value
    return flat
