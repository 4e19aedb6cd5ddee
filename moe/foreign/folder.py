"""Write an exported model to a folder that is complete by itself: weights, tokenizer, generation settings and card."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from moe.checks import ConfigError, escaped, first_line, require
from moe.config import layer_experts
from moe.config.checkpoints.transformers_config import longest_text
from moe.data.tokenizer import plain_tokenizer, pretrained_tokenizer
from moe.files import apply_umask, read_text, sha256, write_text
from moe.foreign.export import Difference
from moe.foreign.gguf import write_gguf
from moe.foreign.plain import check_plain, read_plain
from moe.model.architecture import MoEConfig
from moe.model.causal_lm import MoEForCausalLM, load_model
from moe.runs.record import MetricsRecord, RunRecord

LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of this repository on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""


GGUF = "model.gguf"
SERVING = f"""```sh
llama-server -m {GGUF}
```

Its weights are in fp32. `llama-quantize` makes them smaller."""

# What somebody must know who runs a model of these architectures in another program.
SCALED = """All numbers between the layers are multiplied by a large power of two, so that the norms of queries and
keys, which the original does not have, change nothing. Compute in fp32 or bf16. In fp16 the numbers overflow."""
ADDED = """Layers have different numbers of experts (`{setting}`), which this format cannot say. So layers with fewer
of them got more, at the end: experts of zeros, with a bias that keeps every token from them. They count as parameters,
and as unused experts where loads are measured."""
NOTES = {
    "gpt_oss": "A program must read `swiglu_limit` from config.json. With a limit of 7 some results can differ.",
    "deepseek_v3": "A program must support `longrope` positions in this architecture, as transformers does.",
}


class Source(NamedTuple):
    """A saved model that is exported.

    folder: that of the saved model. run: the folder of the run that saved it after its last step, or None. record,
    val_loss: those of that run. tokenizer: None if the folder has none. imported_from: the architecture from which the
    model was imported, or None. is_plain: whether it is a model that transformers has saved.
    """

    folder: Path
    run: Path | None
    record: RunRecord | None
    val_loss: float | None
    tokenizer: PreTrainedTokenizerFast | None
    imported_from: str | None
    is_plain: bool

    def model(self) -> MoEForCausalLM:
        """Return the model. Raises ValueError if it cannot be read, or if a weight is not finite."""
        model = read_plain(self.folder) if self.is_plain else load_model(self.folder)
        for name, weight in model.state_dict().items():
            if not bool(weight.isfinite().all()):
                raise ConfigError(f"{self.folder}: {name} has numbers that are not finite")
        return model


def read_source(path: Path) -> Source:
    """Return what is known about the run folder or the saved model at `path`. Raises ValueError with one line."""
    if not path.is_dir():
        raise ConfigError(f"{path}: is a file, not a folder" if path.exists() else f"no folder {path}")
    here = path.absolute()
    around = here.parent if here.name == "model" else None  # that of a milestone says nothing about its model
    run = next((each for each in (path, around) if each and (each / RunRecord.FILE).is_file()), None)
    folder = path / "model" if run == path else path
    record, val_loss = None, None
    if run is not None:
        record = RunRecord.read(run / RunRecord.FILE)
        if not folder.is_dir():
            saving = record.config.get("save_model")
            reason = f"there is no {folder}, and it is {record.status}, with save_model={saving}"
            advice = "" if record.status == "finished" else "; the command that trained it finishes it"
            raise ConfigError(f"{run}: this run has no saved model; {reason}{advice}")
        RunRecord.read_typed(run / RunRecord.FILE)  # names the file if its settings are not those of this version
        if record.status == "finished":
            val_loss = MetricsRecord.read(run / MetricsRecord.FILE).scalars()["val/loss"]
    content = _saved_config(folder, path)
    is_plain = content["model_type"] != MoEConfig.model_type
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = _tokenizer(folder, is_plain=is_plain)
    kind = content["model_type"] if is_plain else (content.get("imported") or {}).get("model_type")
    return Source(folder, run, record, val_loss, tokenizer, kind, is_plain)


def _tokenizer(folder: Path, *, is_plain: bool) -> Any:
    """Return the tokenizer in a folder; that of a plain model keeps what it adds to a text.

    Raises ConfigError if it cannot be read.
    """
    try:
        return (plain_tokenizer if is_plain else pretrained_tokenizer)(str(folder.resolve()))
    except ValueError as error:
        known = (folder / "tokenizer_config.json").is_file()
        reason = first_line(error) if known else "there is no tokenizer_config.json"
        raise ConfigError(f"{folder}: its tokenizer cannot be read: {reason}") from error


def _saved_config(folder: Path, given: Path) -> dict[str, Any]:
    """Return the content of config.json of a saved model. Raises ConfigError if it is none, or cannot be exported.

    given: the folder that the user named.
    """
    if not (folder / "config.json").is_file():
        if folder != given:
            raise ConfigError(f"{folder}: has no config.json, so it is no saved model")
        runs = (each.parent for depth in ("*", "*/*", "*/*/*") for each in sorted(given.glob(f"{depth}/run.json")))
        first = next(runs, None)
        below = "" if first is None else f"; it has runs, such as {first}: name one of them"
        raise ConfigError(f"{given}: is neither the folder of a run nor a saved model{below}")
    content = json.loads(read_text(folder / "config.json"))
    kind = content.get("model_type") if isinstance(content, dict) else None
    known = isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    allowed = f"{MoEConfig.model_type}, or that of a causal language model of the transformers library"
    require(known, f"model_type in config.json of {folder}", kind, allowed)
    if kind != MoEConfig.model_type:
        check_plain(folder)
        return cast(dict[str, Any], content)
    for part in ("router", "adapter"):
        target = str((content.get(part) or {}).get("_target_", "moe."))
        if not target.startswith("moe."):
            raise ConfigError(f"{folder}: {part}._target_={target}: what code outside of this project does is unknown")
    try:
        MoEConfig.from_dict(content)  # here, because transformers prints lines about a wrong one with a tokenizer
    except ValueError as error:
        raise ConfigError(f"{folder}: {first_line(error)}") from error
    return cast(dict[str, Any], content)


def check_new(out: Path, source: Path | None = None) -> None:
    """Raise ConfigError unless a new folder or file can be made at `out`, outside of the folder `source`.

    Nothing is ever overwritten.
    """
    require(not os.path.lexists(out), "--out", str(out), "a new name; this one exists, and nothing is overwritten")
    parent = out.absolute().parent
    require(parent.is_dir(), "--out", str(out), f"in a folder that exists; {parent} does not")
    inside = source is not None and out.resolve().is_relative_to(source.resolve())
    require(not inside, "--out", str(out), f"outside of {source}, because a run has the files of its training alone")


@contextmanager
def complete(out: Path) -> Iterator[Path]:
    """Give a temporary folder that is renamed to `out` when the `with` block ends, and removed after an error."""
    check_new(out)
    temporary = out.absolute().with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        apply_umask(temporary)
        check_new(out)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_shards(size: str | None, to: str) -> None:
    """Raise ConfigError for a size of files of weights that is no number of bytes, or if there is one file alone."""
    if size is None:
        return
    require(to != "gguf", "--max-shard-size", size, "left out with --to gguf, which is one file")
    known = re.fullmatch(r"\d*[1-9]\d*([KMGT]I?B)?", size.upper())
    require(known is not None, "--max-shard-size", size, "a number of bytes, or one with KB, MB, GB or TB, such as 5GB")


def notes(model: MoEForCausalLM, exported: PreTrainedModel) -> list[str]:
    """Return what somebody must know who runs `exported`, as which `model` was written, in another program."""
    source = model.config.imported or {}
    if exported.config.model_type == source.get("model_type"):
        return []
    rescaled = exported.config.rms_norm_eps > source.get("rms_norm_eps", model.config.rms_norm_eps)
    note = NOTES.get(exported.config.model_type)
    return ([SCALED] if rescaled else []) + ([note] if note else []) + _added(model)


def _added(model: MoEForCausalLM) -> list[str]:
    """Return a note if layers of `model` with fewer experts than others are filled up (`target_weights.selected`)."""
    numbers = model.config.experts_by_layer
    return [] if numbers is None else [ADDED.format(setting=f"{layer_experts.KEY}={numbers}")]


def write_folder(
    exported: PreTrainedModel,
    source: Source,
    out: Path,
    *remarks: str,
    difference: Difference,
    shards: str | None = None,
) -> None:
    """Write the model as its architecture writes it, with the tokenizer and the card of `source`.

    remarks: paragraphs for the card, see `notes`. shards: the largest size of one file of weights, such as 5GB.
    """
    disable_progress_bar()  # transformers would show one while it writes a single small file
    name, positions = exported.config.model_type, longest_text(exported.config) or 0
    with complete(out) as folder:
        options: dict[str, Any] = {} if shards is None else {"max_shard_size": shards}
        exported.save_pretrained(folder, **options)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        equality = _equality(difference, positions)
        write_text(folder / "README.md", card(source, name, equality, *remarks, loading=LOADING))


def write_gguf_folder(model: MoEForCausalLM, source: Source, out: Path) -> str:
    """Write the model as a GGUF file, with the card of `source`. Return the architecture of the file.

    Raises ConfigError, with one line, for a model or a tokenizer that the format does not express.
    """
    if source.tokenizer is None:
        raise ConfigError(f"--to gguf: {source.folder} has no tokenizer, which is a part of a GGUF file")
    with complete(out) as folder:
        name = write_gguf(model, source.tokenizer, folder / GGUF, name=_title(source))
        write_text(folder / "README.md", card(source, f"{name}, in a GGUF file", *_added(model), loading=SERVING))
    return name


def card(source: Source, name: str, *remarks: str, loading: str) -> str:
    """Return the card of a model that was exported as the architecture `name`, in Markdown with front matter.

    Names that the user chose are escaped. Paths are not part of it, because they may be private.
    """
    from huggingface_hub import ModelCardData

    tags = ["mixture-of-experts", "moe-routing"]
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    digests = [f"- `{path.name}`: sha256 `{sha256(path)}`" for path in sorted(source.folder.glob("*.safetensors"))]
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# A Mixture-of-Experts language model as {name}",
        _what(source, name),
        "## Where it comes from",
        *_origin(source),
        "Its weights were computed from these files:\n\n" + "\n".join(digests),
        *remarks,
        "## How to load it",
        loading,
        "No license of this model is set. Add one, as `license:` at the top of this file.",
    ]
    return "\n\n".join(parts) + "\n"


def _what(source: Source, name: str) -> str:
    if source.is_plain:
        return f"A {source.imported_from}, written by moe-routing as a model of the architecture {name}."
    return (
        "A model that was trained with moe-routing for research on routing, written as a model of the architecture "
        f"{name}. It completes text like its training data, and is no assistant."
    )


def _origin(source: Source) -> list[str]:
    if source.record is None:
        return [
            f"A saved {'model of transformers' if source.is_plain else 'model; no record of its run was beside it'}."
        ]
    record = source.record
    lines = [
        f"- experiment: {escaped(record.experiment)}",
        f"- run: {_title(source)}",
        f"- moe-routing: {escaped(record.versions.get('moe-routing', 'unknown'))}, commit {record.commit or 'unknown'}",
    ]
    if source.val_loss is not None:
        lines.append(f"- val/loss: {source.val_loss:.6g} nats per token, after the last step")
    return ["\n".join(lines)]


def _title(source: Source) -> str:
    """Return the name of the run, without paths that may be part of it."""
    if source.record is None:
        return "a saved model"
    return "a run" if set("/\\~") & set(source.record.name) else escaped(source.record.name)


def _equality(difference: Difference, read: int) -> str:
    """Return how the logits were compared. `read`: how many tokens the model reads."""
    compared = f"in fp32, on two texts of {difference.tokens} random tokens"
    found = f"Its logits were compared with those of the original {compared}. They differ by up to {difference}."
    longer = f" The model reads up to {read} tokens; texts of this length were not compared."
    return found + (longer if difference.tokens < read else "")
