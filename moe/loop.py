"""The training loop, top to bottom. Data order, noise, dropout, schedules and learning rate are pure functions of
(seed, step), so a resumed run needs the weights, the optimizers' state and the step number, and nothing else."""

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from tqdm import tqdm

from moe import checkpoint, metrics
from moe.checks import build
from moe.config import Config
from moe.cost import count_parameters, flops_per_token, peak_memory_gb, reset_peak_memory
from moe.data import Prepared, batch, batch_indices, prepare
from moe.divergence import Diverged, blame
from moe.evaluate import evaluate
from moe.model import MoEConfig, MoEForCausalLM, MoEOutput
from moe.optim import build_optimizers, learning_rate_scale
from moe.record import EventLog
from moe.routing import Knobs
from moe.signals import Interrupted, Signals
from moe.trackers import Mirror


def train(config: Config, folder: Path, *, mirror: Mirror, signals: Signals) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in `folder` if there is one; returns facts about the run.

    Leaves events.jsonl and model/ in `folder`. Raises Diverged before an optimizer step that would use a number that
    is not finite, and Interrupted, after a checkpoint, when a signal asked to stop.
    """
    torch.set_num_threads(config.threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision of an earlier cell in this process
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    device = accelerator.device
    reset_peak_memory(device)
    data = prepare_data(config)
    model = build_model(config, vocab_size=len(data.tokenizer))
    optimizers = build_optimizers(
        model,
        muon_lr=config.optimizer.muon_lr,
        adamw_lr=config.optimizer.adamw_lr,
        momentum=config.optimizer.momentum,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        weight_decay=config.optimizer.weight_decay,
    )
    start, elapsed, train_seconds = 0, 0.0, 0.0
    if (loaded := checkpoint.load(folder / "checkpoints")) is not None:
        start, state = loaded
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        elapsed, train_seconds = state["elapsed"], state["train_seconds"]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    forward = torch.compile(model) if config.compile else model
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if loaded is not None:
        peaks = state["peaks"]
    schedule = build(config.schedule, "schedule")
    weights = {"load_balance": config.lb, "router_z": config.z}
    began = time.perf_counter() - elapsed

    def knobs_at(step: int) -> dict[str, float]:
        progress = step / config.steps
        settings = {"temperature": config.temperature, "noise": config.noise}
        return {name: schedule(name, setting, progress) for name, setting in settings.items()}

    def save(step: int) -> None:
        state = {
            "model": accelerator.unwrap_model(model).state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "peaks": peaks,
            "elapsed": time.perf_counter() - began,
            "train_seconds": train_seconds,
        }
        checkpoint.save(folder / "checkpoints", step, state)

    def validate(step: int) -> dict[str, Any]:
        setting = knobs_at(step)
        values = evaluate(
            accelerator.unwrap_model(model),
            data.val,
            domains=data.domains,
            batch_size=config.batch_size,
            temperature=setting["temperature"],
        )
        last = max(0, step - 1)
        values |= {"temperature": setting["temperature"], "learning_rate": peaks[0][0] * rate(last)}
        values["time/elapsed"] = time.perf_counter() - began
        record("eval", step, values)
        tqdm.write(_eval_line(step, config.steps, values))
        return values

    def rate(step: int) -> float:
        warmup, floor = config.optimizer.warmup, config.optimizer.floor
        return learning_rate_scale(step, steps=config.steps, warmup=warmup, floor=floor)

    def record(kind: str, step: int, values: dict[str, Any]) -> None:
        events.write(kind, step, values)
        mirror.log(step, values)

    with EventLog(folder / "events.jsonl", step=start) as events:
        latest = validate(0) if start == 0 else {}
        bar = tqdm(range(start, config.steps), initial=start, total=config.steps, unit="step", disable=None)
        for step in bar:
            tick = time.perf_counter()
            model.train()
            setting = knobs_at(step)
            knobs = Knobs.of(**setting, device=device)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group, lr in zip(optimizer.param_groups, peak, strict=True):
                    group["lr"] = lr * rate(step)
            outputs: list[MoEOutput] = []
            for micro, ids in enumerate(micro_batches(config, data, step)):
                torch.manual_seed(random_stream(config.seed, step, micro))
                output = forward(ids.to(device), ids.to(device), knobs=knobs, capacity=config.capacity)
                total = output.loss + sum(weights[name] * aux.sum() for name, aux in (output.aux or {}).items())
                accelerator.backward(total / config.grad_accum)
                outputs.append(MoEOutput(loss=output.loss.detach(), aux=output.aux, stats=output.stats))
            norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            values = _means(outputs)
            if not math.isfinite(values["train/loss"] + norm.item()):
                raise Diverged(step, blame(accelerator.unwrap_model(model), ids.to(device), knobs))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            seconds = time.perf_counter() - tick
            train_seconds += seconds
            values |= setting | {"learning_rate": optimizers[0].param_groups[0]["lr"], "grad_norm": norm.item()}
            values["time/tokens_per_s"] = config.batch_size * config.grad_accum * config_seq(config) / seconds
            values["time/elapsed"] = time.perf_counter() - began
            done = step + 1
            record("train", done, values)
            if done % config.eval_every == 0 or done == config.steps:
                latest = validate(done)
            if done % config.save_every == 0 and done < config.steps:
                save(done)
            if signals.received is not None and done < config.steps:
                save(done)
                raise Interrupted(signals.received, done)
            bar.set_postfix(_postfix(values, latest), refresh=False)

    final = accelerator.unwrap_model(model)
    _save_model(final, data, folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {
        "parameters": count_parameters(final)._asdict(),
        "flops_per_token": flops_per_token(final, config.data.seq_len),
        "seconds": time.perf_counter() - began,
        "train_seconds": train_seconds,
        "peak_memory_gb": peak_memory_gb(device),
        "device": str(device),
        "data": data.manifest,
    }


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
    return MoEForCausalLM(
        MoEConfig.of(config.model, config.router, vocab_size=vocab_size, seq_len=config.data.seq_len)
    )


def random_stream(seed: int, step: int, micro: int) -> int:
    """The seed of everything random (noise, dropout) in one micro-batch."""
    return int(np.random.SeedSequence((seed, step, micro)).generate_state(1, np.uint64)[0] >> 1)


def micro_batches(config: Config, data: Prepared, step: int) -> list[Tensor]:
    """The token ids of optimizer step `step`, cut into micro-batches: (batch_size, S) each."""
    size = config.batch_size * config.grad_accum
    indices = batch_indices(len(data.train), size, seed=config.seed, step=step)
    ids, _ = batch(data.train, indices)
    return list(ids.split(config.batch_size))


def _means(outputs: list[MoEOutput]) -> dict[str, Any]:
    """Losses of one optimizer step, unweighted, aux as the mean over layers; and the routing metrics of its tokens."""
    values: dict[str, Any] = {"train/loss": torch.stack([o.loss for o in outputs]).mean().item()}
    for name in outputs[0].aux or {}:
        values[f"train/{name}"] = torch.stack([o.aux[name].detach().mean() for o in outputs if o.aux]).mean().item()
    stats = outputs[0].stats
    for output in outputs[1:]:
        stats = stats.merge(output.stats) if stats is not None and output.stats is not None else None
    if stats is not None:
        routing = metrics.summarize(stats)
        values |= {f"train/{name}": value for name, value in routing.items() if name.count("/") == 1}
    return values


def config_seq(config: Config) -> int:
    return config.data.seq_len


def _postfix(values: dict[str, Any], latest: dict[str, Any]) -> dict[str, str]:
    shown = {"loss": f"{values['train/loss']:.3f}"}
    if latest:
        shown["val ppl"] = f"{latest['val/perplexity']:.1f}"
    if "train/routing/load_cv" in values:
        shown["load CV"] = f"{values['train/routing/load_cv']:.2f}"
    return shown | {"T": f"{values['temperature']:.2f}", "tok/s": f"{values['time/tokens_per_s']:,.0f}"}


def _eval_line(step: int, steps: int, values: dict[str, Any]) -> str:
    line = f"step {step:>5}/{steps}  val loss {values['val/loss']:.4f}  perplexity {values['val/perplexity']:.2f}"
    if "routing/load_cv" in values:
        line += f"  load CV {values['routing/load_cv']:.3f}"
    return f"{line}  {values['time/elapsed']:.0f} s"


def _save_model(model: MoEForCausalLM, data: Prepared, folder: Path) -> None:
    temporary = folder / ".tmp-model"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    data.tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder / "model", ignore_errors=True)
    os.rename(temporary, folder / "model")
