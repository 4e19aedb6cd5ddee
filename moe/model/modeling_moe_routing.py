"""Name the classes of this model for transformers. Their code is in the Python package moe-routing.

Each saved model has a copy of this file. transformers runs it only with `trust_remote_code=True`.
"""

try:  # transformers reads imports outside of `try` as names of packages to install, and `moe` is another one's name
    from moe.model.causal_lm import MoEConfig, MoEForCausalLM
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] != "moe":
        raise
    raise ImportError(
        "this model needs the Python package moe-routing, the project that trained it: "
        "install it with `pip install FOLDER`, where FOLDER is a checkout of the project, or with its wheel"
    ) from error

__all__ = ["MoEConfig", "MoEForCausalLM"]
