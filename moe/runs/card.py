"""The model card of a saved model: the README.md that the hub shows, written from the run's record."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.checks import escaped
from moe.config import run_routers
from moe.config.keys import flatten
from moe.config.model import ModelConfig
from moe.config.schema import Config
from moe.files import read_text, write_text
from moe.routing.loss_table import LOSSES
from moe.runs.events import FILE as EVENTS
from moe.runs.events import read_events
from moe.runs.record import MetricsRecord, RecordError, RunRecord

FILE = "README.md"
TAGS = ["mixture-of-experts", "moe-routing", "custom_code"]
METRICS = (*MetricsRecord.EVERY_RUN, "val/bits_per_byte", "routing/load_cv", "routing/utilization", "routing/entropy")

LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "model"  # this folder, or the name of this repository on the hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

This needs the Python package moe-routing: `pip install FOLDER`, where FOLDER is a checkout of that project, or its
wheel. `trust_remote_code=True` runs `modeling_moe_routing.py`, which only imports that package."""

CAVEAT = """These are the numbers of one run with one seed, measured on the validation text after {last}.
Another seed gives other numbers. Compare settings only over several seeds."""
UNFINISHED = """This is the model after step {step:,} of {steps:,}, saved in the middle of its training. The learning
rate was that of this step, so it is not the model that a run of {step:,} steps would give."""


def write_cards(folder: Path, record: RunRecord) -> None:
    """Write the cards of the saved models of a run. `folder` is the run's, and has its metrics.json and its events.

    Those are the final model and, with `save_model=all`, those of milestones.
    """
    if (folder / "model").is_dir():
        metrics = MetricsRecord.read(folder / MetricsRecord.FILE)
        write_text(
            folder / "model" / FILE, model_card(record, metrics.scalars(), has_adapter=_has_adapter(folder / "model"))
        )
    milestones = {int(path.name.partition("-")[2]): path for path in (folder / "milestones").glob("step-*")}
    events = read_events(folder / EVENTS) if milestones else []
    seen = {event["step"]: event for event in events if event["kind"] == "eval"}
    for step, path in milestones.items():
        write_text(path / FILE, model_card(record, seen.get(step, {}), has_adapter=_has_adapter(path), step=step))


def _has_adapter(model: Path) -> bool:
    return bool(json.loads(read_text(model / "config.json")).get("adapter"))


def model_card(
    record: RunRecord, metrics: Mapping[str, Any], *, has_adapter: bool = False, step: int | None = None
) -> str:
    """Return the card of a saved model of a finished run, in Markdown with front matter for the hub.

    metrics: those of this model; empty if it was not evaluated. step: the steps done, if they are not all.
    has_adapter: whether the saved model has the adapter of the run as a part of its own, not merged into its weights.

    Names and paths that the user chose are escaped. Paths of the user's files are not part of it.
    """
    from huggingface_hub import ModelCardData

    assert record.facts is not None, "a finished run has facts"
    manifest = record.facts.data
    on_hub = [name for name in manifest["documents"] if manifest["source"].get("revision")]
    front = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=list(TAGS), datasets=on_hub or None
    )
    numbers = {name: metrics.get(name) for name in METRICS}
    shown = {f"`{name}`": f"{value:.4g}" for name, value in numbers.items() if isinstance(value, (int, float))}
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {escaped(record.experiment)}: {escaped(_title(record))}",
        "A small Mixture-of-Experts language model, trained for research on routing. It completes text like its "
        "training data, and is no assistant.",
        *([] if step is None else [UNFINISHED.format(step=step, steps=record.typed_config().steps)]),
        "## Model and training",
        _table("setting", "value", _settings(record, has_adapter)),
        "## Data",
        f"Tokenizer: {escaped(_last(manifest['tokenizer']['name']))}. The text has the sha256 "
        f"`{manifest['corpus_sha256']}`.",
        _table("domain", "tokens for training", _tokens(manifest["domains"])),
        _table("source of text", "license", _licenses(manifest["documents"], on_hub)),
        "No license of this model is set. Add one, as `license:` at the top of this file, that these licenses allow.",
        "## Results",
        *_results(shown, step),
        "## How to load it",
        LOADING,
        *_plugins(record),
    ]
    return "\n\n".join(parts) + "\n"


def _results(shown: dict[str, str], step: int | None) -> list[str]:
    last = "the last step" if step is None else f"step {step:,}"
    if not shown:
        return [f"The run measured nothing after {last}: its key `eval_every` decides where it does."]
    return [CAVEAT.format(last=last), _table("metric", "value", shown)]


def _title(record: RunRecord) -> str:
    """Return the name of a run without the keys whose value is a path, as data.source.paths, because it is private.

    The name has "_" for "/", so the record says what the values are.
    """
    if "=" not in record.name:
        return record.name
    known = flatten(record.config) | record.choices
    named = dict.fromkeys(part.partition("=")[0].lstrip("+") for part in record.name.split(","))
    shown = {key: str(known[key]) for key in named if key in known}
    return ", ".join(f"{key}={value}" for key, value in shown.items() if not set("/\\~") & set(value)) or "a run"


def _settings(record: RunRecord, has_adapter: bool) -> dict[str, str]:
    config, facts = record.typed_config(), record.facts
    assert facts is not None, "a finished run has facts"
    model, tokens = config.model, config.batch_size * config.grad_accum * config.data.seq_len
    weights = {loss.weight: weight for loss in LOSSES.values() if (weight := getattr(config, loss.weight))}
    merged = bool(config.adapter) and not has_adapter
    dense = f"first {model.first_k_dense_replace} dense" if model.first_k_dense_replace else "all with experts"
    precision = facts.process.get("precision", config.precision)  # what `auto` chose
    return {
        "router": "; ".join(dict.fromkeys(_call(spec) for spec, _ in run_routers.specs(config))),
        "temperature schedule": _call(config.schedule),
        "noise on the logits": f"{config.noise:g}",
        "weights of auxiliary losses": ", ".join(f"{name}={weight:g}" for name, weight in weights.items()) or "none",
        "capacity factor": "none" if config.capacity is None else f"{config.capacity:g}, drop={config.drop}",
        "routing depends on earlier tokens only": "yes" if record.causal else "no",
        "experts": _experts(model),
        "layers": f"{model.layers}, {dense}",
        "width, heads": f"{model.dim}, {model.heads}",
        "upcycled from": ", ".join(escaped(_last(parent.name)) for parent in model.parents) or "no dense model",
        "imported from": "no other model" if model.checkpoint is None else escaped(_origin(model.checkpoint)),
        "adapter": (_call(config.adapter) if config.adapter else "none") + ", merged into the weights" * merged,
        "parameters": f"{facts.parameters.total:,}, of which a token uses {facts.parameters.active:,}"
        + "; counted in training, with the adapter, which now takes no place of its own" * merged,
        "trained parameters": f"{facts.parameters.trainable:,}",
        "length of a text": f"{config.data.seq_len} tokens",
        "training": f"{config.steps:,} steps of {tokens:,} tokens, {precision}, {facts.device}",
        "seed": _seed(config),
        "moe-routing": f"{record.versions['moe-routing']}, commit {record.commit or 'unknown'}",
        "torch, transformers": f"{record.versions['torch']}, {record.versions['transformers']}",
    }


def _experts(model: ModelConfig) -> str:
    shared = f"{model.shared_experts} shared{' with a gate' if model.shared_gate else ''}"
    latent = "" if model.latent_dim is None else f", in a latent of width {model.latent_dim}"
    before = ", routers read the input of attention" if model.router_input == "attention" else ""
    rounded = "" if model.router_precision == "fp32" else f", routers in {model.router_precision}"
    others = "" if model.experts_by_layer is None else f" (other numbers by layer: {model.experts_by_layer})"
    return f"{model.num_experts}{others} of width {model.ffn} ({model.expert}){latent}, {shared}{before}{rounded}"


def _seed(config: Config) -> str:
    init, data = config.seeds
    return str(init) if init == data else f"{init} for the initial weights, {data} for the order of the text"


def _call(spec: dict[str, Any]) -> str:
    """Return a class and its settings as a call, such as TopK(k=2)."""
    settings = ", ".join(f"{name}={value}" for name, value in spec.items() if name != "_target_")
    return escaped(f"{spec['_target_'].rpartition('.')[2]}({settings})")


def _origin(path: str) -> str:
    """Return the name of the run whose saved model is at this path, or what `_last` returns if there is no run."""
    try:
        run = RunRecord.read(Path(path).parent / RunRecord.FILE)
    except RecordError:
        return _last(path)
    return f"the run {run.experiment}: {_title(run)}"


def _last(path: str) -> str:
    """Return a name on the hub as it is, and of a path only its last part, because paths may be private."""
    return Path(path).name if path.count("/") != 1 or path.startswith(("/", ".", "~")) else path


def _tokens(domains: dict[str, Any]) -> dict[str, str]:
    return {escaped(name): f"{parts['train']['tokens']:,}" for name, parts in domains.items()}


def _licenses(documents: dict[str, Any], on_hub: list[str]) -> dict[str, str]:
    """Return the license of each part of the text."""
    return {
        escaped(name if name in on_hub else Path(name).name): escaped(str(part.get("license", "unknown")))
        for name, part in documents.items()
    }


def _plugins(record: RunRecord) -> list[str]:
    """Return what to say about the packages of routers that are not part of this project."""
    return [
        f"The run used classes of the package {escaped(name)}, which is not part of moe-routing: install it, or name "
        "its folder of options in the environment variable MOE_SEARCH_PATH. "
        f"Its code had the sha256 `{plugin.sha256}` and the commit `{escaped(plugin.commit or 'unknown')}`."
        for name, plugin in record.plugins.items()
    ]


def _table(left: str, right: str, rows: dict[str, str]) -> str:
    lines = [f"| {left} | {right} |", "| :--- | :--- |"]
    lines += ["| {} | {} |".format(*(cell.replace("|", "\\|") for cell in row)) for row in rows.items()]
    return "\n".join(lines)
