"""Everything about the experts of one finished run, as plain JSON, and the seeds of a sweep beside each other."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from moe.config.schema import Config, DataConfig
from moe.data.blocks import Prepared
from moe.files import sha256, write_json, write_text
from moe.model.decoder import MoEForCausalLM
from moe.routing.decision import Knobs
from moe.runs import traces
from moe.specialization import information, stability
from moe.specialization.geometry import expert_outputs, projections
from moe.specialization.knockout import bootstrap, knockouts
from moe.specialization.landscape import landscape
from moe.specialization.observation import Observation, blocks, documents, next_token_nats, observe, refusal
from moe.specialization.page import page
from moe.specialization.regret import route_regret
from moe.specialization.vocabulary import keywords
from moe.training.setup import prepare_data

FORMAT = 2  # raise it whenever the same model gives other numbers
FILE = "specialization.json"
LANDSCAPE_BLOCKS = 8


def study(folder: Path, *, blocks_wanted: int, samples: int) -> bool:
    """Write `specialization.json` and `tokens.html` into a finished run's folder; False if they are up to date.

    ValueError for a run that is not finished, or whose data can no longer be made as it was.
    """
    record = json.loads((folder / "run.json").read_text())
    if record["status"] != "finished":
        raise ValueError(f"{folder}: the run is {record['status']}, not finished")
    asked = {
        "format": FORMAT,
        "model_sha256": sha256(folder / "model" / "model.safetensors"),
        "blocks_wanted": blocks_wanted,
        "samples": samples,
    }
    path = folder / FILE
    if path.exists() and json.loads(path.read_text())["asked"] == asked:
        return False
    began = time.monotonic()
    data = prepare_data(Config(data=DataConfig(**record["config"]["data"])))
    if _trained_on(data.manifest) != _trained_on(record["data"]):
        raise ValueError(f"{folder}: its data is another now ({data.manifest['key']}, was {record['data']['key']})")
    disable_progress_bar()  # of loading one small file
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    probes, document = blocks(data, blocks_wanted), documents(data, blocks_wanted)
    knobs = Knobs.of(temperature=model.config.router_temperature, device=model.device)
    content: dict[str, Any] = {"asked": asked, "step": record["config"]["steps"], "reason": refusal(model, probes)}
    content |= {"val_loss": validation_loss(model, data, knobs)}
    if content["reason"] is None:
        seen = observe(model, probes, knobs)
        content |= counted(seen, data.domains, document=document)
        content |= {"keywords": keywords(seen, data.tokenizer)}
        content |= {"knockout": knockouts(model, seen, knobs, document=document)}
        content |= {"regret": route_regret(model, seen, knobs, document=document, samples=samples)}
        few = slice(None, None, max(1, len(probes.ids) // LANDSCAPE_BLOCKS))
        content |= {"landscape": landscape(model, probes.take(few), knobs)}
        content |= {"embedding": projections(expert_outputs(model, probes, knobs).numpy())}
        read = traces.read_traces(folder / "trace")
        content |= {"saturation": stability.saturation(read), "churn": stability.churn(read)}
        write_text(folder / "tokens.html", page(seen, data.tokenizer, domains=data.domains, title=record["name"]))
    content["seconds"] = time.monotonic() - began
    write_json(path, plain(content))
    return True


def validation_loss(model: MoEForCausalLM, data: Prepared, knobs: Knobs) -> dict[str, Any]:
    """`val/loss`, nats per token of all validation blocks, with its interval over documents (`bootstrap`).

    It says how far this run's loss depends on the text that happens to be validated on, and nothing of other seeds.
    A router that looks at the whole batch sees other batches here than in `moe.training.evaluate`.
    """
    nats = next_token_nats(model, blocks(data, len(data.val)), knobs).cpu().double().numpy()
    tokens = (~np.isnan(nats)).sum(1).astype(float)
    found = bootstrap(np.nanmean(nats, axis=1), documents(data, len(data.val)), weight=tokens)
    return found | {"blocks": len(nats), "tokens": int(tokens.sum())}


def counted(seen: Observation, domains: tuple[str, ...], *, document: Int[np.ndarray, "B"]) -> dict[str, Any]:
    """What follows from the choices alone, by layer: domains, vocabulary, position, pairs of experts."""
    rng = np.random.default_rng(0)
    following = np.roll(seen.ids, -1, axis=1)
    following[:, -1] = -1  # the last token of a block predicts nothing
    if seen.blocks.position_ids is not None:  # and that of a conversation nothing of the next
        following[:, :-1][seen.blocks.position_ids[:, 1:].numpy() == 0] = -1
    variants = {"input": seen.ids, "next": following, "predicted": seen.predicted}
    share = information.shares(seen.chosen)
    k = seen.chosen.sum(-1).mean(-1)
    by_token = np.repeat(seen.domain, seen.ids.shape[1])
    return {
        "tokens": seen.ids.size,
        "blocks": len(seen.ids),
        "documents": len(np.unique(document)),
        "domains": domains,
        "experts_per_token": k,
        "load": share.sum(1) / share.sum((1, 2))[:, None],
        "given_domain": [information.given(information.counts(by_token, s, size=len(domains))) for s in share],
        "domain": [information.domain_dependence(chosen, seen.domain, document, rng=rng) for chosen in seen.chosen],
        "vocabulary": {
            name: [information.vocabulary_dependence(chosen, ids.ravel(), rng=rng) for chosen in seen.chosen]
            for name, ids in variants.items()
        },
        "given_position": [information.by_position(chosen, seen.ids.shape[1]) for chosen in seen.chosen],
        "coactivation": [information.coactivation(chosen) for chosen in seen.chosen],
        "coactivation_chance": (k - 1) / max(1, seen.chosen.shape[-1] - 1),
    }


def compare_seeds(folders: list[Path]) -> None:
    """Write into each studied run how its routing agrees with that of the runs that differ from it in the seed alone.

    Only runs on the same data with traces of the same shape are compared, at their last traces.
    """
    rng = np.random.default_rng(0)
    runs = {folder: json.loads((folder / "run.json").read_text()) for folder in folders}
    last = {folder: read[-1].chosen for folder in folders if (read := traces.read_traces(folder / "trace"))}
    for folder in folders:
        others = [other for other in last if other != folder and folder in last and _kin(runs[folder], runs[other])]
        others = [other for other in others if last[other].shape == last[folder].shape]
        content = json.loads((folder / FILE).read_text())
        content["seed_agreement"] = [
            {
                "seed": runs[other]["config"]["seed"],
                "folder": other.name,
                "layers": stability.agreement(last[folder], last[other], rng=rng),
            }
            for other in others
        ]
        write_json(folder / FILE, plain(content))


def _kin(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two runs differ in their seed only, on the same blocks."""
    same = {key for key in a["identity"] | b["identity"] if a["identity"].get(key) == b["identity"].get(key)}
    alike = _trained_on(a["data"]) == _trained_on(b["data"])
    return alike and set(a["identity"]) | set(b["identity"]) == same | {"seed"}


def _trained_on(manifest: dict[str, Any]) -> dict[str, str]:
    """Checksums without those of the validation files: they changed when blocks got a document, while no token did."""
    return {path: digest for path, digest in manifest["files"].items() if not path.startswith("val/")}


def plain(value: Any) -> Any:
    """Arrays as lists, numbers as Python's own with six significant digits, what is not finite as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
