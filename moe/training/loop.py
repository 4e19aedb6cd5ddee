"""The training loop: set up, resume, then steps, validations, milestones and checkpoints in order."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe.config.schema import Config
from moe.distributed import ranks
from moe.model.cost import count_parameters, flops_per_token, peak_memory_gb
from moe.runs import traces
from moe.runs.collapse import Collapse
from moe.runs.evaluated import collapse_lines, in_evaluation
from moe.runs.events import RunListener
from moe.runs.place import Place
from moe.runs.signals import Interrupted, Signals
from moe.training import parallel
from moe.training.evaluate import validate
from moe.training.precision import choose
from moe.training.progress import Progress, text_lines
from moe.training.recorder import Recorder
from moe.training.saving import save_adapter, save_milestone, save_model
from moe.training.setup import Training, remarks, set_up, unigram_perplexity
from moe.training.state import Clock, resume, save_checkpoint
from moe.training.step import train_step
from moe.training.watch import can_collapse


def train(
    config: Config,
    folder: Path,
    *,
    signals: Signals,
    listeners: Sequence[RunListener] = (),
    place: Place | None = None,
) -> dict[str, Any]:
    """Train a run to the end and return facts for the run record. With `steps=0` the model is only evaluated.

    Training starts from the newest checkpoint in `folder` if there is one. `folder` must exist. This function writes
    events.jsonl, trace/, checkpoints/ and, if the configuration asks for them, model/ and milestones/ to it. The
    checkpoints stay, because they are needed until the run record says that the run is finished. place: where the run
    stands among the runs of its command. Raises Diverged before
    an optimizer step that would use a number that is not finite. Raises Interrupted if a signal asked the run to stop,
    after it has saved a checkpoint.
    """
    config, precision = choose(config, folder)
    training = set_up(config)
    unigram = unigram_perplexity(training.data)
    text = text_lines(config, training.data, unigram, remarks(config))
    text += ["precision=auto: {precision}, because {precision_reason}".format(**precision)] if precision else []
    done, clock = resume(folder, training)
    milestones, latest = traces.milestones(config.steps), dict[str, Any]()
    with (
        Recorder(folder, listeners, clock, step=done) as events,
        Progress(done=done, steps=config.steps, place=place) as progress,
    ):
        progress.read(text, unigram)
        progress.resumed(events.evaluations)
        if done == 0:
            latest = events.record("eval", done, validate(training, done, None if config.steps else folder))
            progress.evaluated(done, latest)
        if config.steps == 0:
            save_milestone(folder, training, 0)
        signals.training = True
        for step in range(done, config.steps):
            began, done = time.perf_counter(), step + 1
            evaluates = done % config.eval_every == 0 or done == config.steps
            values = train_step(training, step, measure_updates=evaluates)
            tokens = config.batch_size * config.grad_accum * config.data.seq_len
            values["time/tokens_per_s"] = tokens / clock.add_step(began=began)
            events.record("train", done, values)
            if evaluates:
                last = folder if done == config.steps else None
                latest = events.record("eval", done, validate(training, done, last))
                progress.evaluated(done, latest)
            if done in milestones:
                save_milestone(folder, training, done)
            # Ranks receive a signal at different times, but must stop after the same step.
            stop = ranks.all_reduce_max(signals.received or 0)
            if done < config.steps and (done % config.save_every == 0 or stop):
                events.secure()
                save_checkpoint(folder, training, done, clock)
                if stop:
                    raise Interrupted(stop, done)
            progress.trained(values)
        collapses = _collapses(training, latest)
        progress.ended(collapse_lines(latest, collapses, steps=config.steps, warmup=config.optimizer.warmup))
    if config.save_model != "none":
        save_model(training, folder / "model", config.steps)
    save_adapter(training, folder / "adapter")
    known = facts(training, clock, latest)
    known |= {"process": known["process"] | precision, "unigram_perplexity": unigram}
    return known | {"collapses": [each._asdict() for each in collapses]}


def facts(training: Training, clock: Clock, latest: dict[str, Any]) -> dict[str, Any]:
    """Return the facts about a finished run for its run record that the trained objects tell.

    latest: the values of the last evaluation. Its number of active experts per token determines the FLOPs.
    """
    config, model, device = training.config, training.model, training.accelerator.device
    active = [latest[f"routing/active_experts/layer{index:02d}"] for index in range(len(training.routers))]
    return {
        "parameters": count_parameters(model)._asdict(),
        "flops_per_token": flops_per_token(model, config.data.seq_len, active=active),
        "seconds": clock.elapsed(),
        "train_seconds": clock.train_seconds,
        "peak_memory_gb": peak_memory_gb(device),
        "device": str(device),
        "process": training.process | ({} if training.graphs is None else training.graphs.used()),
        "ranks": {"number": ranks.world_size(), "layout": parallel.layout(expert_parallel=config.expert_parallel)},
        "experts_kernel": model.experts_kernel(torch.bfloat16 if config.precision == "bf16" else torch.float32),
        "loss_kernel": model.loss_kernel(),
        "data": training.data.manifest,
    }


def _collapses(training: Training, latest: dict[str, Any]) -> list[Collapse]:
    """Return the layers whose routing collapsed in training; without training, those of the evaluation."""
    if training.config.steps:
        return training.watch.findings()
    return [each for each in in_evaluation(latest) if can_collapse(training.routers[each.layer])]
