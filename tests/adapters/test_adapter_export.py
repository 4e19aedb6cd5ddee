"""A model with an adapter of its own is refused by everything that writes models of transformers."""

from pathlib import Path

import pytest

from moe.checks import ConfigError
from moe.data.tokenizer import train_bpe
from moe.foreign.export import to_transformers
from moe.foreign.gguf import write_gguf
from tests.adapters.models import SPECS, attached, model


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
@pytest.mark.parametrize("name", ["lora", "r", "e", "s"])
def test_an_adapter_that_is_not_merged_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    net = attached(model(kind), SPECS[name])
    with pytest.raises(ConfigError, match=r"adapter=moe\.adapters\..*: must be none, or LoRA that is merged"):
        to_transformers(net)
    with pytest.raises(ConfigError, match="must be none, or LoRA"):
        write_gguf(net, train_bpe(["a text"], 260), tmp_path / "new", name="new")
    assert not (tmp_path / "new").exists()


def test_merged_lora_is_exported() -> None:
    net = attached(model("ours"), SPECS["lora"])
    merged, _ = net.adapter.merged(net, net.state_dict())
    assert to_transformers(merged).config.model_type == "qwen2_moe"  # which has shared experts
