"""Continue from a saved model of this project, with its own router or another one."""

import torch
from safetensors.torch import load_file

from moe.config.checkpoints import files
from moe.config.model import ModelConfig
from moe.files import Find, weight_files
from moe.model.architecture import MoEConfig
from moe.model.causal_lm import MoEForCausalLM, check_weights, file_finder


def continued(config: MoEConfig, settings: ModelConfig) -> MoEForCausalLM:
    """Return a model with the weights of the saved model `settings.checkpoint`.

    A router takes those tensors of the saved router that have the names and shapes of its own. The others keep their
    initial values, which depend on the seed. So a setting of the router that changes no weights, such as k, and a
    router with the same matrix, such as `temperature` for `topk`, start with the saved one.

    Only safetensors are read, and no code of the checkpoint's folder runs. Raises ValueError for weights that are not
    those of `config`.
    """
    check_continued(config, settings)
    model = MoEForCausalLM(config, trusted=True)
    tensors = model.state_dict()
    with torch.no_grad():
        for path in weight_files(_finder(settings)):
            for name, tensor in load_file(path).items():
                if name in tensors and tensors[name].shape == tensor.shape:
                    tensors[name].copy_(tensor)
    return model


def check_continued(config: MoEConfig, settings: ModelConfig) -> None:
    """Raise ConfigError unless the saved model has the weights of `config`, apart from those of routers.

    Only headers of files are read.
    """
    name = f"model.checkpoint={settings.checkpoint}"
    check_weights(config, name, _finder(settings), trusted=True, any_router=True)


def _finder(settings: ModelConfig) -> Find:
    assert settings.checkpoint is not None
    revision = files.revision(settings.checkpoint, settings.checkpoint_digest)
    return file_finder(settings.checkpoint, {"revision": revision})
