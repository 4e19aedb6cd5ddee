"""Study the experts of finished runs, write the results as JSON, and compare the seeds of a sweep."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moe.analysis.bootstrap import bootstrap
from moe.checks import parse
from moe.data.blocks import DIGESTS, Prepared
from moe.data.tokenizer import pretrained_tokenizer
from moe.files import sha256, write_text
from moe.launch.option_files import default_of
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Knobs
from moe.runs import traces
from moe.runs.record import FORMAT, RunRecord, SpecializationRecord, StudySettings
from moe.specialization import information, stability
from moe.specialization.experts_per_token import loss_by_k
from moe.specialization.geometry import expert_outputs, projections, similarities
from moe.specialization.knockout import knockouts
from moe.specialization.landscape import landscape
from moe.specialization.next_layer import next_layer
from moe.specialization.observation import (
    Observation,
    documents_of_blocks,
    experts_of_layers,
    next_token_nats,
    observe,
    reason_not_studied,
    text_blocks,
    validation_blocks,
)
from moe.specialization.page import text_page, token_page
from moe.specialization.regret import route_regret
from moe.specialization.saliency import against_knockouts, saliency
from moe.specialization.vocabulary import keywords
from moe.training.setup import model_of_run, observed, prepare_data

STUDY_FORMAT = 4  # Increase it whenever the same model gives different numbers.
LANDSCAPE_BLOCKS = 8
OWN_TEXT = "own_text.html"
NO_NEXT_TOKEN = -1  # Label of a token that predicts nothing, because its text ends there.


def study(folder: Path, *, blocks_wanted: int, samples: int, trusted: bool = False) -> bool:
    """Write `specialization.json` and `tokens.html` into the folder of a finished run.

    samples: tokens of each layer for which other experts are tried. 0: none, and no expert is knocked out either, which
        takes most of the time if there are many experts.

    Unless the run is `trusted`, no code runs that its files name, and its data are read from the cache alone.

    Returns False, and writes nothing, if they are up to date. Raises ValueError if the run is not finished, or if its
    data can no longer be prepared as they were.
    """
    record, config = RunRecord.read_typed(folder / RunRecord.FILE)
    if record.status != "finished" or record.facts is None:
        raise ValueError(f"{folder}: the run is {record.status}, not finished")
    weights = folder / "model" / "model.safetensors"
    digest = sha256(weights) if weights.exists() or not observed(config) else str(config.model.checkpoint_digest)
    settings = StudySettings(STUDY_FORMAT, digest, blocks_wanted=blocks_wanted, samples=samples)
    path = folder / SpecializationRecord.FILE
    if path.exists() and SpecializationRecord.read(path).settings == settings:
        return False
    if not trusted:
        config.require_trust("--trust", "router", "data.source")
    began = time.monotonic()
    data = prepare_data(config, trusted=trusted)
    for name, was in _digests(record.facts.data).items():
        if data.digests[name] != was:
            raise ValueError(f"{folder}: its data has changed ({name} is {data.digests[name]}, was {was})")
    model = model_of_run(folder, config, trusted=trusted)
    probes, document = validation_blocks(data, blocks_wanted), documents_of_blocks(data, blocks_wanted)
    knobs = Knobs.of(temperature=model.config.router_temperature, device=model.device)
    reason, measured = reason_not_studied(model, probes), None
    val_loss = validation_loss(model, data, knobs)
    if reason is None:
        seen = observe(model, probes, knobs)
        content: dict[str, Any] = routing_statistics(seen, data.domains, document=document)
        content |= {"keywords": keywords(seen, data.tokenizer)}
        content |= {"knockout": None, "regret": []}
        if samples:
            content |= {"knockout": knockouts(model, seen, knobs, document=document)}
            content |= {"regret": route_regret(model, seen, knobs, document=document, samples=samples)}
        content |= {"loss_by_k": loss_by_k(model, probes, knobs, document=document)}
        some_blocks = slice(None, None, max(1, len(probes.ids) // LANDSCAPE_BLOCKS))
        content |= {"landscape": landscape(model, probes.take(some_blocks), knobs)}
        content |= {"saliency": against_knockouts(saliency(model, probes, knobs), content["knockout"])}
        content |= {"next_layer": next_layer(model, seen, knobs, document=document)}
        vectors = expert_outputs(model, probes, knobs)
        embedding = projections([of_layer.numpy() for of_layer in vectors])
        content |= {"embedding": embedding, "similarity": similarities(model, vectors)}
        experts = experts_of_layers(model)
        read = [stability.cut(trace, experts) for trace in traces.read_traces(folder / "trace")]
        content |= {"saturation": stability.saturation(read), "churn": stability.churn(read), "seed_agreement": []}
        measured = content
        page = token_page(seen, data.tokenizer, domains=data.domains, title=_title(record))
        write_text(folder / SpecializationRecord.PAGE, page)
    found = {"step": config.steps, "val_loss": val_loss, "reason": reason, "measured": measured}
    found |= {"format": FORMAT, "settings": settings._asdict(), "seconds": time.monotonic() - began}
    parse(SpecializationRecord, to_json(found)).write(path)
    return True


def write_own_text(folder: Path, text: str, *, trusted: bool = False) -> Path:
    """Write a page with a text of one's own, colored by the experts of a finished run, into its folder.

    It replaces the last page of this kind. Raises ValueError as `text_page` does.
    """
    record, config = RunRecord.read_typed(folder / RunRecord.FILE)
    if not trusted:
        config.require_trust("--trust", "router")
    model = model_of_run(folder, config, trusted=trusted)
    saved = folder / "model"
    tokenizer = pretrained_tokenizer(str(saved.resolve()) if saved.is_dir() else config.data.tokenizer)
    page = text_page(model, tokenizer, text_blocks(model, tokenizer, text), title=_title(record))
    write_text(folder / OWN_TEXT, page)
    return folder / OWN_TEXT


def _title(record: RunRecord) -> str:
    """Return the name of a run, or of the model that it only evaluated."""
    config = record.typed_config()
    return Path(config.model.checkpoint).name if observed(config) and config.model.checkpoint else record.name


def validation_loss(model: MoEForCausalLM, data: Prepared, knobs: Knobs) -> dict[str, Any]:
    """Return `val/loss`, in nats per token of all validation blocks, with its `bootstrap` interval over documents.

    The interval tells how much the loss of this run depends on the sample of validation text. It says nothing about
    other seeds. The batches differ from those of `moe.training.evaluate`, which matters if a router looks at the whole
    batch.
    """
    nats = next_token_nats(model, validation_blocks(data, len(data.val)), knobs).cpu().double().numpy()
    tokens = (~np.isnan(nats)).sum(1).astype(float)
    found = bootstrap(np.nanmean(nats, axis=1), documents_of_blocks(data, len(data.val)), weight=tokens)
    return found | {"blocks": len(nats), "tokens": int(tokens.sum())}


def routing_statistics(
    observed: Observation, domains: tuple[str, ...], *, document: Int[np.ndarray, " B"]
) -> dict[str, Any]:
    """Return, by layer, the statistics of the choices alone: by domain, token id and position, and pairs of experts."""
    rng = np.random.default_rng(0)
    next_ids = np.roll(observed.ids, -1, axis=1)
    next_ids[:, -1] = NO_NEXT_TOKEN
    if observed.blocks.position_ids is not None:  # The last token of a conversation does not predict the next one.
        next_ids[:, :-1][observed.blocks.position_ids[:, 1:].numpy() == 0] = NO_NEXT_TOKEN
    variants = {"input": observed.ids, "next": next_ids, "predicted": observed.predicted}
    shares = [information.expert_shares(chosen) for chosen in observed.chosen]
    by_token = np.repeat(observed.domain, observed.ids.shape[1])
    return {
        "tokens": observed.ids.size,
        "blocks": len(observed.ids),
        "documents": len(np.unique(document)),
        "domains": domains,
        "experts_per_token": [chosen.sum(-1).mean() for chosen in observed.chosen],
        "load": [share.sum(0) / share.sum() for share in shares],
        "given_domain": [
            information.conditional_probabilities(information.sum_by_label(by_token, s, size=len(domains)))
            for s in shares
        ],
        "domain": [
            information.domain_dependence(chosen, observed.domain, document, rng=rng) for chosen in observed.chosen
        ],
        "vocabulary": {
            name: [information.vocabulary_dependence(chosen, ids.ravel(), rng=rng) for chosen in observed.chosen]
            for name, ids in variants.items()
        },
        "given_position": [
            information.probabilities_by_position(chosen, observed.ids.shape[1]) for chosen in observed.chosen
        ],
        "coactivation": [information.coactivation(chosen) for chosen in observed.chosen],
        "coactivation_chance": [information.coactivation_chance(chosen) for chosen in observed.chosen],
    }


def compare_seeds(folders: list[Path]) -> None:
    """Compare the routing of runs that differ in the seed alone, and add the agreement to the results of each run.

    The last traces are compared. Runs must have the same data and traces of the same shape.
    """
    rng = np.random.default_rng(0)
    runs = {folder: RunRecord.read(folder / RunRecord.FILE) for folder in folders}
    last = {folder: read[-1] for folder in folders if (read := traces.read_traces(folder / "trace"))}
    for folder in folders:
        others = [
            other
            for other in last
            if other != folder and folder in last and _differ_in_seed_only(runs[folder], runs[other])
        ]
        others = [other for other in others if last[other].chosen.shape == last[folder].chosen.shape]
        record = SpecializationRecord.read(folder / SpecializationRecord.FILE)
        if record.measured is None:
            continue
        experts = [len(load) for load in record.measured["load"]]
        record.measured["seed_agreement"] = [
            {
                "seed": runs[other].typed_config().seed,
                "folder": other.name,
                "layers": to_json(
                    stability.seed_agreement(
                        *(stability.cut(last[each], experts).chosen for each in (folder, other)), rng=rng
                    )
                ),
            }
            for other in others
        ]
        record.write(folder / SpecializationRecord.FILE)


def _differ_in_seed_only(a: RunRecord, b: RunRecord) -> bool:
    """Return whether two runs differ in the seed alone and were trained on the same blocks.

    A key that one of them lacks has its default, because that run was recorded before the key existed.
    """
    if a.facts is None or b.facts is None or _digests(a.facts.data) != _digests(b.facts.data):
        return False
    keys = a.identity.keys() | b.identity.keys()
    one, other = (
        {key: run.identity[key] if key in run.identity else default_of(key, run.choices) for key in keys}
        for run in (a, b)
    )
    return {key for key in keys if one[key] != other[key]} <= {"seed"} <= keys


def _digests(manifest: dict[str, Any]) -> dict[str, str | None]:
    """Return what `Prepared.digests` does, for a recorded manifest. Names and layout of the files may have changed."""
    return {name: manifest.get(name) for name in DIGESTS}


def to_json(value: Any) -> Any:
    """Convert arrays to lists and numbers to Python numbers with six significant digits; NaN and infinity to None."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
