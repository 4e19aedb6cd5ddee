"""The overrides that the choice of a checkpoint implies: its own router and its tokenizer."""

from collections.abc import Sequence

from moe.checks import ConfigError
from moe.config import imported
from moe.launch.hydra_errors import FAULTS
from moe.launch.overrides import parsed

KEY = "model.checkpoint"


def implied_by_checkpoint(words: Sequence[str]) -> list[str]:
    """Return the overrides that `model.checkpoint=NAME` implies among the words of a command.

    A key that the command gives itself is left out, and the whole router if the command chooses one. Raises ConfigError
    for several checkpoints, and for one that cannot be imported.
    """
    given = {word.partition("=")[0].lstrip("+"): word for word in words}
    if KEY not in given:
        return []
    try:
        override = parsed(given[KEY])
    except FAULTS:  # the parser of the command line says what is wrong
        return []
    if override.is_sweep_override():
        raise ConfigError(f"{given[KEY]:.200}: must be one checkpoint for a command, because each has its own router")
    name = override.value()
    if not isinstance(name, str):
        return []
    chosen = {"router", "router._target_"} & given.keys()
    implied = [(word.partition("=")[0], word) for word in imported.overrides(name)]
    return [word for key, word in implied if key not in given and not (chosen and key.partition(".")[0] == "router")]
