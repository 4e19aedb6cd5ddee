"""The training loop, top to bottom. Data order, noise, dropout, schedules and learning rate are pure functions of
(seed, step), so a resumed run needs the weights, the optimizers' state and the step number, and nothing else."""

import functools
import logging
import math
import os
import shutil
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from moe import checkpoint, metrics, process
from moe.checks import build
from moe.config import LOSS_WEIGHTS, Config
from moe.cost import count_parameters, flops_per_token, peak_memory_gb, reset_peak_memory
from moe.data import Prepared, batch, batch_indices, prepare
from moe.divergence import Diverged, blame
from moe.evaluate import evaluate
from moe.model import MoEConfig, MoEForCausalLM, MoEOutput
from moe.optim import build_optimizers, learning_rate_scale
from moe.record import EventLog
from moe.routers.base import Router
from moe.routing import Knobs, RoutingStats
from moe.schedules import Constant, Schedule
from moe.signals import Interrupted, Signals
from moe.trackers import Mirror

log = logging.getLogger(__name__)


def train(config: Config, folder: Path, *, mirror: Mirror, signals: Signals) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in `folder` if there is one; returns facts about the run.

    Leaves events.jsonl and model/ in `folder`. Raises Diverged before an optimizer step that would use a number that
    is not finite, and Interrupted, after a checkpoint, when a signal asked to stop.
    """
    settings = process.set_up(threads=config.threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision of an earlier cell in this process
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    reset_peak_memory(accelerator.device)
    data = prepare_data(config)
    schedule = build(config.schedule, "schedule")
    plain = build_model(config, vocab_size=len(data.tokenizer))
    optimizers: list[Any] = build_optimizers(plain, config.optimizer)
    routers = [layer.router for layer in plain.moe_layers]
    done, clock = _resume(folder, plain, optimizers)
    model, *optimizers = accelerator.prepare(plain, *optimizers)
    forward = torch.compile(model) if config.compile else model

    with EventLog(folder / "events.jsonl", step=done) as events:

        def record(kind: str, values: dict[str, Any]) -> dict[str, Any]:
            values = values | {"time/elapsed": clock.elapsed()}
            events.write(kind, done, values)
            mirror.log(done, values)
            return values

        def validate() -> dict[str, Any]:
            setting = knob_settings(config, schedule, done)
            values = validation(config, plain, data, temperature=setting["temperature"])
            values = record("eval", values | {"learning_rate": _current_rate(optimizers)} | setting)
            tqdm.write(_summary_line(done, config.steps, values))
            return values

        scale_learning_rates(config, optimizers, step=done)
        latest = validate() if done == 0 else {}
        bar = tqdm(range(done, config.steps), initial=done, total=config.steps, unit="step", disable=None)
        for step in bar:
            tick = time.perf_counter()
            setting = knob_settings(config, schedule, step)
            knobs = Knobs.of(**setting, device=accelerator.device)
            scale_learning_rates(config, optimizers, step=step)
            model.train()
            outputs: list[Outcome] = []
            load = None
            for micro, ids in enumerate(micro_batches(config, data, step)):
                ids = ids.to(accelerator.device)
                torch.manual_seed(random_stream(config.seed, step, micro))
                output = forward(ids, ids, knobs=knobs, capacity=config.capacity, drop=config.drop, load=load)
                accelerator.backward(total_loss(config, routers, output) / config.grad_accum)
                outputs.append(Outcome(output.loss.item(), output.aux or {}, output.stats))
                if output.stats is not None:
                    load = output.stats.offered if load is None else load + output.stats.offered
            norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip).item()
            sums = merged_stats(outputs)
            values = step_values(outputs, sums)
            if not math.isfinite(values["train/loss"] + norm):
                raise Diverged(step, blame(plain, ids, knobs))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if sums is not None:
                for index, router in enumerate(routers):
                    router.after_step(sums.layer(index))

            done = step + 1
            seconds = clock.trained(since=tick)
            values |= {"time/tokens_per_s": config.batch_size * config.grad_accum * config.data.seq_len / seconds}
            record("train", values | {"learning_rate": _current_rate(optimizers), "grad_norm": norm} | setting)
            if done % config.eval_every == 0 or done == config.steps:
                latest = validate()
            if done < config.steps and (done % config.save_every == 0 or signals.received is not None):
                checkpoint.save(folder / "checkpoints", done, _state(plain, optimizers, clock))
                if signals.received is not None:
                    raise Interrupted(signals.received, done)
            bar.set_postfix(_postfix(values | setting, latest), refresh=False)

    _save_model(plain, data, folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {
        "parameters": count_parameters(plain)._asdict(),
        "flops_per_token": flops_per_token(plain, config.data.seq_len),
        "seconds": clock.elapsed(),
        "train_seconds": clock.train_seconds,
        "peak_memory_gb": peak_memory_gb(accelerator.device),
        "device": str(accelerator.device),
        "process": settings,
        "data": data.manifest,
    }


class Clock:
    """Wall time of a run over all its resumptions, in seconds; `train_seconds` leaves evaluation and saving out."""

    def __init__(self, elapsed: float = 0.0, train_seconds: float = 0.0) -> None:
        self._began = time.monotonic() - elapsed
        self.train_seconds = train_seconds

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def trained(self, *, since: float) -> float:
        """Count a training step that began at `since` (`time.perf_counter()`); returns its seconds."""
        seconds = time.perf_counter() - since
        self.train_seconds += seconds
        return seconds


def total_loss(config: Config, routers: list[Router], output: MoEOutput) -> Tensor:
    """What is minimised: cross-entropy plus auxiliary losses, weighted and summed over layers.

    The configuration weights the losses that all routers share, each router its own, and may change its mind.
    """
    assert output.loss is not None
    weighted = []
    for name, values in (output.aux or {}).items():
        shared = getattr(config, LOSS_WEIGHTS[name]) if name in LOSS_WEIGHTS else None
        weights = [router.loss_weights[name] if shared is None else shared for router in routers]
        weighted.append((values * values.new_tensor(weights)).sum())
    return torch.stack([output.loss, *weighted]).sum()


def knob_settings(config: Config, schedule: Schedule | Constant, step: int) -> dict[str, float]:
    """Temperature and noise at optimizer step `step`; the last evaluation, at `steps`, sees the run's own settings."""
    progress = step / config.steps
    return {
        "temperature": schedule("temperature", config.temperature, progress),
        "noise": schedule("noise", config.noise, progress),
    }


def validation(config: Config, model: MoEForCausalLM, data: Prepared, *, temperature: float) -> dict[str, Any]:
    """The validation metrics, dropless; with a capacity factor also what the limit costs, as `val_capacity/...`."""
    settings: dict[str, Any] = {
        "domains": data.domains,
        "batch_size": config.batch_size,
        "temperature": temperature,
    }
    values = evaluate(model, data.val, **settings)
    if config.capacity is not None:
        limited = evaluate(model, data.val, capacity=config.capacity, drop=config.drop, **settings)
        for name in ("val/loss", "val/perplexity", "routing/drop_rate", "routing/unrouted_rate"):
            values[f"val_capacity/{name.split('/')[1]}"] = limited.get(name)
    return values


class Outcome(NamedTuple):
    """What is kept of a micro-batch: mean cross-entropy, aux {name: (L)}, routing sums."""

    loss: float
    aux: dict[str, Tensor]
    stats: RoutingStats | None


def merged_stats(outputs: list[Outcome]) -> RoutingStats | None:
    """The routing sums (L, ...) over all micro-batches of a step; None without MoE layers."""
    stats = [output.stats for output in outputs if output.stats is not None]
    return functools.reduce(RoutingStats.merge, stats) if stats else None


def step_values(outputs: list[Outcome], sums: RoutingStats | None) -> dict[str, Any]:
    """Of one optimizer step: mean losses, unweighted (aux: mean over layers), and the routing metrics of all tokens."""
    values: dict[str, Any] = {"train/loss": fmean(output.loss for output in outputs)}
    for name in outputs[0].aux:
        values[f"train/{name}"] = fmean(output.aux[name].mean().item() for output in outputs)
    if sums is not None:
        values |= {f"train/{name}": value for name, value in metrics.summarize(sums, per_layer=False).items()}
    return values


def scale_learning_rates(config: Config, optimizers: list[Any], *, step: int) -> None:
    """Set every group's learning rate to what its peak and the curve say at optimizer step `step`."""
    curve = config.optimizer
    scale = learning_rate_scale(step, steps=config.steps, warmup=curve.warmup, floor=curve.floor)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group["initial_lr"]


def _current_rate(optimizers: list[Any]) -> float:
    return optimizers[0].param_groups[0]["lr"]


def _state(model: MoEForCausalLM, optimizers: list[Any], clock: Clock) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "elapsed": clock.elapsed(),
        "train_seconds": clock.train_seconds,
    }


def _resume(folder: Path, model: MoEForCausalLM, optimizers: list[Any]) -> tuple[int, Clock]:
    """Load the newest good checkpoint, if any: (optimizer steps done, clock)."""
    loaded = checkpoint.load(folder / "checkpoints")
    if loaded is None:
        return 0, Clock()
    done, state = loaded
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    log.info("%s: resumed after step %d", folder, done)
    return done, Clock(state["elapsed"], state["train_seconds"])


def prepare_data(config: Config) -> Prepared:
    """The prepared data of a configuration, from the cache when it is there."""
    settings = config.data
    return prepare(
        build(settings.source, "data.source"),
        tokenizer=settings.tokenizer,
        vocab_size=settings.vocab_size,
        seq_len=settings.seq_len,
        val_percent=settings.val_percent,
        max_val_blocks=settings.max_val_blocks,
        cache=settings.cache,
    )


def build_model(config: Config, *, vocab_size: int) -> MoEForCausalLM:
    """The freshly initialised model of a configuration: a pure function of it and its seed."""
    torch.manual_seed(config.seed)
    return MoEForCausalLM(MoEConfig.of(config.model, config.router, vocab_size=vocab_size, seq_len=config.data.seq_len))


def random_stream(seed: int, step: int, micro: int) -> int:
    """The seed of everything random (noise, dropout) in one micro-batch."""
    return int(np.random.SeedSequence((seed, step, micro)).generate_state(1, np.uint64)[0] >> 1)


def micro_batches(config: Config, data: Prepared, step: int) -> list[Tensor]:
    """The token ids of optimizer step `step`, cut into micro-batches: (batch_size, S) each."""
    size = config.batch_size * config.grad_accum
    indices = batch_indices(len(data.train), size, seed=config.seed, step=step)
    ids, _ = batch(data.train, indices)
    return list(ids.split(config.batch_size))


def _postfix(values: dict[str, Any], latest: dict[str, Any]) -> dict[str, str]:
    shown = {"loss": f"{values['train/loss']:.3f}"}
    if latest:
        shown["val ppl"] = f"{latest['val/perplexity']:.1f}"
    if "train/routing/load_cv" in values:
        shown["load CV"] = f"{values['train/routing/load_cv']:.2f}"
    return shown | {"T": f"{values['temperature']:.2f}", "tok/s": f"{values['time/tokens_per_s']:,.0f}"}


def _summary_line(step: int, steps: int, values: dict[str, Any]) -> str:
    line = f"step {step:>5}/{steps}  val loss {values['val/loss']:.4f}  perplexity {values['val/perplexity']:.2f}"
    if "routing/load_cv" in values:
        line += f"  load CV {values['routing/load_cv']:.3f}"
    return f"{line}  {values['time/elapsed']:.0f} s"


def _save_model(model: MoEForCausalLM, data: Prepared, folder: Path) -> None:
    disable_progress_bar()  # of writing one small file
    temporary = folder / ".tmp-model"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    data.tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder / "model", ignore_errors=True)
    os.rename(temporary, folder / "model")
