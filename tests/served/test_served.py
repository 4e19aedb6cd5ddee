"""Tests that llama.cpp's server, built from source, answers as transformers does. Run with `-m served`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import around, router_of, tiny
from exported_models import make, upcycle
from gguf import GGUFReader
from llama_server import serve
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe.config.cell import Cell
from moe.data.tokenizer import train_bpe
from moe.foreign.anatomy import anatomy_of
from moe.foreign.export import expressing, to_transformers
from moe.foreign.export_command import main
from moe.foreign.targets import TARGETS
from moe.launch.run import run
from moe.model.causal_lm import MoEForCausalLM, load_model

pytestmark = pytest.mark.served

TOKENS = 12
TEXT = "for x in range(12345):  # Ünïts, 3.5 %\n\t\treturn <|im_end|> x's  \n"


def unwanted(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens that end a text, and those that are no whole characters.

    The server ends a text at each token of the first kind, and joins the probabilities of those of the second.
    """
    return [
        number
        for number in range(len(tokenizer))
        if number in tokenizer.all_special_ids or "\ufffd" in tokenizer.decode([number])
    ]


def greedy(model: MoEForCausalLM, ids: list[int], banned: list[int]) -> tuple[list[int], Tensor]:
    """Return what transformers appends to a text, and the logarithms of all probabilities at each of these tokens.

    A model that no architecture of transformers expresses is run as it is.
    """
    plain: Any = to_transformers(model) if expressing(anatomy_of(model), list(TARGETS.values())) else model
    options = {"max_new_tokens": TOKENS, "do_sample": False, "suppress_tokens": banned, "use_cache": True}
    inputs = torch.tensor([ids])
    found = plain.generate(
        inputs, attention_mask=torch.ones_like(inputs), output_logits=True, return_dict_in_generate=True, **options
    )
    return found.sequences[0, len(ids) :].tolist(), torch.cat(found.logits).log_softmax(-1)


def check_completion(model: MoEForCausalLM, file: Path, ids: list[int], banned: list[int]) -> None:
    """Compare the tokens that the server appends, and the logarithms of the five largest probabilities of each."""
    tokens, expected = greedy(model, ids, banned)
    with serve(file, context=64) as client:
        options = {"n_predict": TOKENS, "temperature": 0.0, "n_probs": 5, "return_tokens": True}
        answer = client.post("/completion", prompt=ids, logit_bias=[[token, False] for token in banned], **options)
    assert answer["tokens"] == tokens
    for step, probabilities in zip(answer["completion_probabilities"], expected, strict=True):
        assert len(step["top_logprobs"]) == 5
        for given in step["top_logprobs"]:
            assert given["logprob"] == pytest.approx(probabilities[given["id"]].item(), abs=1e-4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe([TEXT, "words return more words than units"], 300)


@pytest.mark.parametrize(
    ("router", "changes"),
    [
        ("topk", {}),
        ("topk", {"expert": "silu", "attention_bias": True}),
        ("temperature", {"embed_scale": False, "num_key_value_heads": 1, "head_dim": 6}),
        ("gumbel", {"tie_word_embeddings": False}),
        ("topk", {"shared_experts": 2, "first_k_dense_replace": 1}),
        ("switch", {}),
        ("softmax_all", {"shared_experts": 1}),
        ("uniform", {}),
        ("random", {"first_k_dense_replace": 1}),
        ("biased", {}),
        ("biased_raw", {"shared_experts": 2, "first_k_dense_replace": 1}),
        ("groups", {"num_experts": 6}),
    ],
)
def test_the_server_gives_the_same_greedy_tokens_and_probabilities(
    router: str, changes: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """For each kind of router that the format expresses, and each part that a model can have beside it."""
    check_export(make(router, vocab_size=len(tokenizer), **changes), tokenizer, tmp_path)


def check_export(model: MoEForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """Compare what the server and transformers append to a text. Return the architecture of the file."""
    model.save_pretrained(folder / "saved")
    tokenizer.save_pretrained(folder / "saved")
    assert main([str(folder / "saved"), "--to", "gguf", "--out", str(folder / "out")]) == 0
    file = folder / "out" / "model.gguf"
    check_completion(model, file, tokenizer("for x in words")["input_ids"], unwanted(tokenizer))
    return str(GGUFReader(file).fields["general.architecture"].contents())


IMPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3moe", {}),
    "olmoe": ("olmoe", {"clip_qkv": None, "num_key_value_heads": 4}),
    "mixtral": ("llama", {"sliding_window": None}),
}


@pytest.mark.parametrize("kind", IMPORTED)
def test_an_imported_model_is_served_in_its_own_architecture(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    architecture, changes = IMPORTED[kind]
    source = tiny(kind, vocab_size=len(tokenizer), **changes)
    assert check_export(around(source, router_of(source)), tokenizer, tmp_path) == architecture


@pytest.mark.parametrize(
    ("parent", "router", "changes", "architecture"),
    [
        ("qwen2", "topk", {}, "llama"),
        ("qwen2", "softmax_all", {}, "glm4moe"),
        ("qwen3", "topk", {}, "qwen3moe"),
        ("qwen3", "biased", {"shared_experts": 1, "first_k_dense_replace": 1}, "glm4moe"),
    ],
)
def test_an_upcycled_model_is_served(
    parent: str,
    router: str,
    changes: dict[str, Any],
    architecture: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """Biases, and norms of queries and keys, are among what its dense parent brings."""
    model = upcycle(parent, router, vocab_size=len(tokenizer), **changes)
    assert check_export(model, tokenizer, tmp_path) == architecture


@pytest.fixture
def trained(cell: Callable[..., Cell], tmp_path: Path) -> tuple[Path, Path]:
    """Return the folder of a run, and that of its export."""
    one = cell("model.expert=swiglu", "router=top2")
    run(one)
    assert main([str(one.folder), "--to", "gguf", "--out", str(tmp_path / "out")]) == 0
    return one.folder, tmp_path / "out"


def test_an_exported_run_is_served_to_a_client(trained: tuple[Path, Path]) -> None:
    """The server splits text into the same tokens, completes it through the interface of OpenAI, whole and in parts."""
    folder, out = trained
    model, tokenizer = load_model(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("The state of")["input_ids"]
    banned = unwanted(tokenizer)
    check_completion(model, out / "model.gguf", ids, banned)
    text = tokenizer.decode(greedy(model, ids, banned)[0])
    with serve(out / "model.gguf", context=64) as client:
        given = client.post("/tokenize", content=TEXT, parse_special=True, add_special=True)["tokens"]
        assert given == tokenizer(TEXT)["input_ids"]
        assert client.post("/detokenize", tokens=given)["content"] == TEXT
        [listed] = client.get("/v1/models")["data"]
        assert listed["id"].endswith("model.gguf")
        request = {"prompt": "The state of", "max_tokens": TOKENS, "temperature": 0.0, "model": listed["id"]}
        request |= {"logit_bias": dict.fromkeys(map(str, banned), -100)}
        whole = client.post("/v1/completions", **request)
        assert whole["choices"][0]["text"] == text
        assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (len(ids), TOKENS)
        sent = client.lines("/v1/completions", stream=True, **request).strip().split("\n\n")
        *parts, end = (line.removeprefix("data: ") for line in sent)
        assert end == "[DONE]"
        assert "".join(json.loads(part)["choices"][0]["text"] for part in parts) == text
