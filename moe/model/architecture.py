"""The configuration class of the model for transformers. `save_pretrained` writes it beside the weights."""

import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, cast

from transformers import PretrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from moe.checks import check_values, require
from moe.config import layer_experts, layer_routers
from moe.config.checkpoints import dense, imported, saved, transformers_config
from moe.config.model import ModelConfig
from moe.routers.imported import Imported

# Types of the keys of config.json that transformers writes for every model, and of those whose annotation in
# transformers is not for JSON.
FILE_TYPES: dict[str, Any] = {
    "model_type": Literal["moe_routing"],
    "architectures": list[str] | None,
    "auto_map": dict,
    "transformers_version": str | None,
    "_name_or_path": str,
    "dtype": Literal["float64", "float32", "bfloat16", "float16"] | None,
    "rope_parameters": dict | None,
    "hidden_act": Literal["silu"],  # `expert` says which function the experts use
    "expert": Literal["silu", "swiglu", "geglu"],
    "router_input": Literal["feed_forward", "attention"],
    "router_precision": Literal["fp32", "bf16_weights", "bf16"],
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict"), bool | None),
    "is_encoder_decoder": bool,
    "chunk_size_feed_forward": int,
    **dict.fromkeys(("id2label", "label2id"), dict | None),
    "problem_type": str | None,
}

# The smallest value of each number in config.json that may be given.
LEAST: dict[str, float] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), 1),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings", "num_experts", "dense_ffn"), 1),
    "latent_dim": 1,
    **dict.fromkeys(("shared_experts", "first_k_dense_replace", "router_noise", "neftune_noise_alpha"), 0),
    **dict.fromkeys(("rms_norm_eps", "attention_dropout"), 0),
    "router_temperature": 1e-30,
    "router_aux_loss_coef": 0,
}


# The file that `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` runs, and its classes. A saved model
# has a copy of the file.
CODE = Path(__file__).with_name("modeling_moe_routing.py")
AUTO_MAP = {"AutoConfig": f"{CODE.stem}.MoEConfig", "AutoModelForCausalLM": f"{CODE.stem}.MoEForCausalLM"}

LONGEST = 2**20  # tokens of a text for an imported model without a limit
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class MoEConfig(LlamaConfig):
    """Llama's configuration with the fields of `moe.config.model.ModelConfig` that Llama lacks.

    intermediate_size: the width of one expert.
    router: the router's `_target_` and its settings.
    adapter: the same of the adapter that the model has. None: it has none.
    imported: the configuration of the transformers model whose MoE blocks run our layers, or of a dense one whose MLPs
        they replace (`moe.model.imported`). Then only its own fields count for the sizes. None: the model is our
        decoder.
    experts_by_layer: `model.experts_by_layer`. The layers that it does not name have `num_experts`.
    routers, router_layers: `model.routers`, and the class and settings of the router of each layer that it names.
    router_temperature, router_noise: the knobs that the model uses if it is called without any. A run saves each model
        with the values of its step, which a schedule may have changed.
    output_router_logits, router_aux_loss_coef: as in transformers' Mixtral, see `MoEForCausalLM.forward`. A run weights
        its losses itself, so these stay at their defaults.
    """

    model_type = "moe_routing"
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "aux",
        "stats",
        "routing",
        "load",
        "beside",
        "aux_loss",
        "router_logits",
    ]  # for transformers' Trainer
    __no_type_check__ = True  # for the type-checked tests: transformers passes keywords that are not fields

    num_experts: int = 8
    experts_by_layer: str | None = None
    expert: str = "silu"
    shared_experts: int = 0
    shared_gate: bool = False
    latent_dim: int | None = None
    router_input: str = "feed_forward"
    router_precision: str = "fp32"
    first_k_dense_replace: int = 0
    dense_ffn: int = 512
    dropout: float = 0.0
    embed_scale: bool = True
    neftune_noise_alpha: float = 0.0
    router_temperature: float = 1.0
    router_noise: float = 0.0
    router: dict[str, Any] | None = None
    routers: str | None = None
    router_layers: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    imported: dict[str, Any] | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration with the content of a config.json.

        The file may be a stranger's, so its keys and their types are checked before anything is built. Raises
        ConfigError for a wrong one, for example for a key that names code to load.
        """
        _check_content(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and the file by which transformers finds the code of the model."""
        self.auto_map = AUTO_MAP
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CODE, Path(save_directory) / CODE.name)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def num_experts_per_tok(self) -> int:
        """The routers' k, under the name that other models have for it. AttributeError unless all layers have one k."""
        found = {spec.get("k") for spec in (self.router or {}, *(self.router_layers or {}).values())}
        if len(found) > 1 or None in found:
            raise AttributeError("num_experts_per_tok: these routers have no common number of experts per token")
        return int(found.pop())

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing. transformers would copy this file, which cannot run alone, to each saved model."""

    def router_of(self, layer: int) -> dict[str, Any] | None:
        """Return class and settings of the router of a decoder layer."""
        found: dict[str, Any] | None = (self.router_layers or {}).get(str(layer), self.router)
        return found

    def experts_of(self, layer: int) -> int:
        """Return the number of routed experts of a decoder layer."""
        return layer_experts.of_layer(self.experts_by_layer, layer, self.num_experts)

    @property
    def most_experts(self) -> int:
        """The largest number of experts of a layer."""
        return max(map(self.experts_of, range(self.first_k_dense_replace, self.num_hidden_layers)), default=0)

    def set_routers(self, model: ModelConfig, router: dict[str, Any]) -> None:
        """Give all layers the routers of a configuration."""
        self.router, self.routers = router, model.routers
        self.router_temperature = layer_routers.temperature(model.routers, router)
        others = layer_routers.specs(model.routers, router)
        self.router_layers = {str(layer): spec for layer, spec in others.items()} or None

    def check(self) -> None:
        """Raise ConfigError for what `from_dict` refuses: this object may have been made in another way."""
        _check_content(self.to_dict())
        known = self._attn_implementation in (None, *ATTENTIONS)
        require(known, "attn_implementation", self._attn_implementation, f"one of {', '.join(ATTENTIONS)}")

    @staticmethod
    def of(model: ModelConfig, router: dict[str, Any], *, vocab_size: int | None, seq_len: int) -> "MoEConfig":
        """Return the transformers configuration of a model in this project's configuration.

        vocab_size: number of token ids. None is enough for a checkpoint, which has its own.
        """
        if model.checkpoint is not None and model.continues:
            return MoEConfig.continuing(saved.read(model.checkpoint, model.checkpoint_digest), model, router)
        if model.checkpoint is not None:
            return MoEConfig.around(imported.read(model.checkpoint, model.checkpoint_digest), model, router)
        settings: dict[str, Any] = {
            "max_position_embeddings": seq_len,
            "tie_word_embeddings": True,
            "bos_token_id": None,  # a run that saves the model sets the ids of its tokenizer
            "eos_token_id": None,
        }
        if model.dense is not None:
            first = model.parents[0]
            content = dense.language_model("model.dense", *first)
            source = transformers_config.parse(content, "config.json of model.dense")
            if source.model_type != dense.OURS:
                config = MoEConfig.around(source, model, router)
                for name in ("expert", "shared_experts", "first_k_dense_replace", "dense_ffn"):
                    setattr(config, name, getattr(model, name))
                return config
            settings = {name: getattr(source, name) for name in dense.INHERITED}
        assert vocab_size is not None
        config = MoEConfig(
            vocab_size=vocab_size,
            hidden_size=model.dim,
            num_attention_heads=model.heads,
            num_hidden_layers=model.layers,
            intermediate_size=model.ffn,
            num_experts=model.num_experts,
            experts_by_layer=model.experts_by_layer,
            expert=model.expert,
            shared_experts=model.shared_experts,
            shared_gate=model.shared_gate,
            latent_dim=model.latent_dim,
            router_input=model.router_input,
            router_precision=model.router_precision,
            first_k_dense_replace=model.first_k_dense_replace,
            dense_ffn=model.dense_ffn,
            dropout=model.dropout,
            embed_scale=model.embed_scale,
            neftune_noise_alpha=model.neftune_noise_alpha,
            **settings,
        )
        config.set_routers(model, router)
        config._attn_implementation = model.attention
        return config

    @staticmethod
    def continuing(content: dict[str, Any], model: ModelConfig, router: dict[str, Any]) -> "MoEConfig":
        """Return the configuration of a saved model, with this router. content: that of its config.json."""
        config = MoEConfig.from_dict(content)
        imports = f"{Imported.__module__}.{Imported.__qualname__}"
        own = [spec["_target_"] == imports for spec in (content["router"], router)]
        allowed = "left out, because the saved model has its router in the parts of an imported one"
        require(own[0] == own[1] or config.imported is None, "router._target_", router["_target_"], allowed)
        config.set_routers(model, router)
        config.router_noise = 0.0
        config.dropout, config.neftune_noise_alpha = model.dropout, model.neftune_noise_alpha
        config._attn_implementation = model.attention
        return cast(MoEConfig, config)

    @staticmethod
    def around(source: PretrainedConfig, model: ModelConfig, router: dict[str, Any]) -> "MoEConfig":
        """Return the configuration of a model of transformers whose MoE blocks run our layers.

        source: the configuration of that model.
        """
        config = MoEConfig(
            vocab_size=source.vocab_size,
            hidden_size=model.dim,
            num_attention_heads=model.heads,
            num_hidden_layers=model.layers,
            intermediate_size=model.ffn,
            max_position_embeddings=transformers_config.longest_text(source) or LONGEST,
            num_experts=model.num_experts,
            embed_scale=False,
            tie_word_embeddings=bool(getattr(source, "tie_word_embeddings", False)),
            neftune_noise_alpha=model.neftune_noise_alpha,
            router_temperature=float(router.get("temp", 1.0)),
            router=router,
            imported=source.to_dict(),
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = model.attention
        return config


def _check_content(content: dict[str, Any]) -> None:
    """Raise ConfigError for a wrong key, type or number in the content of a config.json."""
    types = {field.name: field.type for field in fields(MoEConfig)} | FILE_TYPES
    check_values(content, types, "config.json")
    if content.get("imported") is not None:
        transformers_config.parse(content["imported"], "config.json.imported")
    auto_map = content.get("auto_map", AUTO_MAP)
    require(auto_map == AUTO_MAP, "config.json.auto_map", auto_map, f"{AUTO_MAP}, because no other code may be run")
    for name, least in LEAST.items():
        value = content.get(name)
        require(value is None or value >= least, f"config.json.{name}", value, f"at least {least}")
    last = content.get("vocab_size", MoEConfig.vocab_size) - 1
    if (text := content.get("experts_by_layer")) is not None:
        dense = content.get("first_k_dense_replace", MoEConfig.first_k_dense_replace)
        layer_experts.check(text, dense=dense, layers=content.get("num_hidden_layers", MoEConfig.num_hidden_layers))
    for name in IDS:
        value = content.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        require(all(0 <= id <= last for id in ids), f"config.json.{name}", value, f"from 0 to vocab_size - 1 = {last}")
