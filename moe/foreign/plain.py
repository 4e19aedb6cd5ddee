"""Read a Mixture of Experts that transformers has saved, as a model of this project, without a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from moe.checks import ConfigError
from moe.config.checkpoints import imported
from moe.config.model import ModelConfig
from moe.config.options import router_spec
from moe.model.architecture import IDS, MoEConfig
from moe.model.causal_lm import MoEForCausalLM
from moe.model.imported_checkpoint import read_checkpoint


def check_plain(folder: Path) -> None:
    """Raise ConfigError, with one line that names the folder, for a model that cannot be imported."""
    with _lines_of(folder):
        imported.read(str(folder), None)


@contextmanager
def _lines_of(folder: Path) -> Iterator[None]:
    """Raise errors about `model.checkpoint`, a key that the user has not written, as those of the folder."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error).replace(f"model.checkpoint={folder}", str(folder))) from error


def read_plain(folder: Path) -> MoEForCausalLM:
    """Return the model in `folder` in evaluation mode, imported as `model=imported` imports it.

    Raises ValueError, with one line that names the folder, for a model that cannot be imported.
    """
    name = str(folder)
    keys: dict[str, Any] = dict.fromkeys(field.name for field in fields(ModelConfig))
    with _lines_of(folder):
        settings = ModelConfig(checkpoint=name, **imported.resolve(keys | {"checkpoint": name}))
        source = imported.read(name, settings.checkpoint_digest)
        checkpoint = read_checkpoint(settings)
    config = MoEConfig.around(source, settings, router_of(source))
    for key in IDS:
        setattr(config, key, getattr(source, key, None))
    model = MoEForCausalLM(config, causal_lm=checkpoint).eval()
    model.generation_config = checkpoint.generation_config
    return model


def router_of(source: PretrainedConfig) -> dict[str, Any]:
    """Return the router that an imported model has unless another one is chosen: its class and its settings."""
    option, settings = imported.router(source)
    if option is None:
        return {"_target_": "moe.routers.imported.Imported", **settings}
    return router_spec(option) | settings
