"""The training loop, top to bottom. Data order, noise, dropout, schedules and learning rate are pure functions of
(seed, step), so a resumed run needs the weights, the optimizers' state and the step number, and nothing else."""

import logging
import math
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from moe.checks import build
from moe.config.schema import Config
from moe.data.blocks import Prepared
from moe.distributed import ranks, sharding
from moe.model.cost import count_parameters, flops_per_token, peak_memory_gb, reset_peak_memory
from moe.model.decoder import MoEForCausalLM
from moe.model.parts import parts
from moe.routing.decision import Knobs
from moe.runs import checkpoint, traces
from moe.runs.events import EventLog
from moe.runs.signals import Interrupted, Signals
from moe.runs.wandb_mirror import Mirror
from moe.training import gradients, parallel, process
from moe.training.divergence import Diverged, blame
from moe.training.evaluate import evaluate
from moe.training.objective import Outcome, merged_stats, step_values, total_loss
from moe.training.optim import build_optimizers
from moe.training.probe import choices
from moe.training.setup import (
    build_model,
    knob_settings,
    label_weights,
    micro_batches,
    prepare_data,
    random_stream,
    scale_learning_rates,
    token_counts,
)

log = logging.getLogger(__name__)


def train(config: Config, folder: Path, *, mirror: Mirror, signals: Signals) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in `folder` if there is one; returns facts about the run.

    Leaves events.jsonl, trace/, model/ and, if asked to, milestones/ in `folder`. Raises Diverged before an optimizer
    step that would use a number that is not finite, and Interrupted, after a checkpoint, when a signal asked to stop.
    """
    settings = process.set_up(threads=config.threads, matmul_precision=config.matmul_precision)
    AcceleratorState._reset_state()  # the precision of an earlier cell in this process
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    reset_peak_memory(accelerator.device)
    data = prepare_data(config)
    schedule = build(config.schedule, "schedule")
    plain = build_model(config, vocab_size=len(data.tokenizer))
    model = parallel.spread(plain, accelerator, expert_parallel=config.expert_parallel)
    optimizers = build_optimizers(plain, config.optimizer)
    routers = [layer.router for layer in plain.moe_layers]
    counts = token_counts(data)
    for router in routers:
        router.before_training(counts)
    done, clock = _resume(folder, plain, optimizers, data)
    pulled, milestones = parts(plain), traces.milestones(config.steps)
    same_draws: dict[str, Any] = {"fallback_random": True}  # noise and dropout as without compilation
    forward = torch.compile(model, options=same_draws) if config.compile else model
    layer_settings: dict[str, Any] = {"capacity": config.capacity, "drop": config.drop}
    layer_settings["orthogonality"] = config.output_orthogonality > 0

    with EventLog(folder / "events.jsonl", step=done) if ranks.is_first() else nullcontext() as events:

        def record(kind: str, values: dict[str, Any]) -> dict[str, Any]:
            values = values | {"time/elapsed": clock.elapsed()}
            if events is not None:
                events.write(kind, done, values)
                mirror.log(done, values)
            return values

        def validate() -> dict[str, Any]:
            setting = knob_settings(config, schedule, done)
            values = validation(config, plain, data, temperature=setting["temperature"])
            values = record("eval", values | {"learning_rate": _current_rate(optimizers)} | setting)
            if ranks.is_first():
                tqdm.write(_summary_line(done, config.steps, values))
            return values

        scale_learning_rates(config, optimizers, step=done)
        latest = validate() if done == 0 else {}
        signals.training = True
        bar = tqdm(
            range(done, config.steps),
            initial=done,
            total=config.steps,
            unit="step",
            disable=None if ranks.is_first() else True,
        )
        for step in bar:
            tick = time.perf_counter()
            setting = knob_settings(config, schedule, step)
            knobs = Knobs.of(**setting, device=accelerator.device)
            scale_learning_rates(config, optimizers, step=step)
            model.train()
            outputs: list[Outcome] = []
            load = None
            batches = micro_batches(config, data, step)
            weights, own = label_weights(batches), [router.loss_weights for router in routers]
            ours = range(ranks.rank(), config.grad_accum, ranks.world_size())  # ranks take the micro-batches in turn
            for micro in ours:
                blocks = batches[micro].to(accelerator.device)
                torch.manual_seed(random_stream(config.seed, step, micro))
                inputs = {"input_ids": blocks.ids, "labels": blocks.labels, "position_ids": blocks.position_ids}
                with nullcontext() if micro == ours[-1] else accelerator.no_sync(model):
                    output = forward(**inputs, **layer_settings, knobs=knobs, load=load)
                    accelerator.backward(total_loss(config, own, output, weight=weights[micro]) / len(ours))
                aux = {name: values.detach() for name, values in (output.aux or {}).items()}
                outputs.append(Outcome(output.loss.detach() * weights[micro], aux, output.stats))
                if output.stats is not None and micro != ours[-1]:
                    [offered] = ranks.total([output.stats.offered])
                    load = offered if load is None else load + offered
                del output  # with its logits, before the next ones are made
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms = gradients.gradient_norms(pulled) | {"grad_norm": (norm := sharding.norm(grads))}
            sums = merged_stats(outputs)
            values = step_values(outputs, sums)
            values |= dict(zip(norms, torch.stack([n.to(norm.device) for n in norms.values()]).tolist(), strict=True))
            if not math.isfinite(values["train/loss"] + values["grad_norm"]):
                raise Diverged(step, blame(plain, blocks.ids, knobs, position_ids=blocks.position_ids))
            # a norm that is not finite would spread to all gradients, so only now
            torch._foreach_mul_(
                list(map(sharding.local, grads)), (config.optimizer.clip / (norm + 1e-6)).clamp(max=1.0)
            )
            done = step + 1
            evaluates = done % config.eval_every == 0 or done == config.steps
            before = {name: [p.detach().clone() for p in params] for name, params in pulled.items() if evaluates}
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if evaluates:
                values |= gradients.relative_updates(pulled, before)
            if sums is not None:
                for index, router in enumerate(routers):
                    router.after_step(sums.layer(index))

            seconds = clock.trained(since=tick)
            values |= {"time/tokens_per_s": config.batch_size * config.grad_accum * config.data.seq_len / seconds}
            record("train", values | {"learning_rate": _current_rate(optimizers)} | setting)
            if evaluates:
                latest = validate()
            if done in milestones:
                chosen = choices(plain, data, temperature=knob_settings(config, schedule, done)["temperature"])
                if chosen is not None and ranks.is_first():
                    traces.write_trace(folder / "trace", done, chosen)
                if config.save_milestones and done < config.steps:
                    (folder / "milestones").mkdir(exist_ok=True)
                    _save_model(plain, data, folder / "milestones" / f"step-{done:08d}")
            stop = ranks.maximum(signals.received or 0)
            if done < config.steps and (done % config.save_every == 0 or stop):
                state = parallel.state(plain, optimizers) | clock.state() | {"data": data.digests}
                if ranks.is_first():
                    checkpoint.save(folder / "checkpoints", done, state)
                if stop:
                    raise Interrupted(stop, done)
            bar.set_postfix(_postfix(values | setting, latest), refresh=False)

    _save_model(plain, data, folder / "model")
    if ranks.is_first():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    active = [latest[f"routing/active_experts/layer{index:02d}"] for index in range(len(routers))]
    return {
        "parameters": count_parameters(plain)._asdict(),
        "flops_per_token": flops_per_token(plain, config.data.seq_len, active=active),
        "seconds": clock.elapsed(),
        "train_seconds": clock.train_seconds,
        "peak_memory_gb": peak_memory_gb(accelerator.device),
        "device": str(accelerator.device),
        "process": settings,
        "ranks": {"number": ranks.world_size(), "layout": parallel.layout(expert_parallel=config.expert_parallel)},
        "experts_kernel": plain.experts_kernel(torch.bfloat16 if config.precision == "bf16" else torch.float32),
        "data": data.manifest,
    }


class Clock:
    """Wall time of a run over all its resumptions, in seconds; `train_seconds` leaves evaluation and saving out."""

    def __init__(self, elapsed: float = 0.0, train_seconds: float = 0.0) -> None:
        self._began = time.monotonic() - elapsed
        self.train_seconds = train_seconds

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def state(self) -> dict[str, float]:
        return {"elapsed": self.elapsed(), "train_seconds": self.train_seconds}

    def trained(self, *, since: float) -> float:
        """Count a training step that began at `since` (`time.perf_counter()`); returns its seconds."""
        seconds = time.perf_counter() - since
        self.train_seconds += seconds
        return seconds


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
        for decile, rate in enumerate(limited.get("routing/drop_rate_by_position", [])):
            values[f"val_capacity/drop_rate/decile{decile}"] = rate
    return values


def _current_rate(optimizers: list[Any]) -> float:
    return optimizers[0].param_groups[0]["lr"]


def _resume(folder: Path, model: MoEForCausalLM, optimizers: list[Any], data: Prepared) -> tuple[int, Clock]:
    """Load the newest good checkpoint, if any: (optimizer steps done, clock); ValueError if it saw other text."""
    loaded = checkpoint.load(folder / "checkpoints")
    if loaded is None:
        return 0, Clock()
    done, state = loaded
    if state["data"] != data.digests:
        raise ValueError(
            f"{folder}: up to step {done} it was trained on other text or tokens than data.* gives now; "
            "restore them, or choose another out=DIR"
        )
    parallel.load_state(model, optimizers, state)
    log.info("%s: resumed after step %d", folder, done)
    return done, Clock(state["elapsed"], state["train_seconds"])


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


def _save_model(model: MoEForCausalLM, data: Prepared, target: Path) -> None:
    """Write model and tokenizer to `target`, in the run folder or a folder there, atomically."""
    weights = sharding.full_state(model)
    if not ranks.is_first():
        return
    disable_progress_bar()  # of writing one small file
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()  # an error if someone deleted the run folder; the next line would make it anew
    model.save_pretrained(temporary, state_dict=weights)
    data.tokenizer.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
