"""What the axes of the fields of `moe.routing.stats.RoutingStats` stand for. This module does not import torch."""

from typing import Any

DECILES = 10  # tenths of a sequence's length

# The fields that have numbers for each expert, with how many of their last axes are experts. An axis of E + 1 numbers
# counts too, because it also loses one for each expert that a layer lacks.
EXPERT_AXES = {
    "offered": 1,
    "kept": 1,
    "offered_by_position": 1,
    "coactivation": 2,
    "tokens_by_active": 1,
    "importance": 1,
}


def without_absent(name: str, field: Any, absent: int) -> Any:
    """Return the field `name`, a tensor or an array, without the last `absent` experts, which a layer lacks."""
    present = slice(None, -absent) if absent else slice(None)
    return field[(..., *[present] * EXPERT_AXES.get(name, 0))]
