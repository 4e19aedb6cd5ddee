"""Save everything that a resume needs in a checkpoint, and resume from it."""

import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.distributed import ranks
from moe.distributed.sharding import full_state_dict, full_tensors, shard_like
from moe.runs import checkpoint, events
from moe.training.setup import Training

log = logging.getLogger(__name__)


class Clock:
    """Wall-clock time in seconds that a run was active after its set-up, added over all its sessions.

    The time between two sessions is not counted. If a session was killed, its time after the last checkpoint is not
    counted either.
    `train_seconds` is the time of training steps alone, without evaluation and saving.
    """

    def __init__(self, elapsed: float = 0.0, train_seconds: float = 0.0) -> None:
        self._began = time.monotonic() - elapsed
        self.train_seconds = train_seconds

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def add_step(self, *, began: float) -> float:
        """Add the seconds since `began` (a value of `time.perf_counter()`) to `train_seconds`, and return them."""
        seconds = time.perf_counter() - began
        self.train_seconds += seconds
        return seconds


class TrainState(NamedTuple):
    """The contents of a checkpoint: everything that a resume needs.

    Random states, the data order, schedules and learning rates are not here because they are pure functions of the
    configuration and the step. If you add a field, `capture` and `resume` fail until they handle it.

    step: optimizer steps done.
    model: the model's state, in full tensors, so that a run can resume with another number or layout of ranks.
    optimizers: the state of each optimizer, also in full tensors.
    elapsed, train_seconds: see `Clock`.
    data: checksums of the text and of the tokenizer.
    watch: the state of `LoadWatch`.
    flops: the FLOPs of the steps done, see `TrainingFlops`.
    precision: fp32 or bf16, which `precision=auto` chose for the whole run.
    """

    step: int
    model: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    elapsed: float
    train_seconds: float
    data: dict[str, Any]
    watch: dict[str, Any]
    flops: float
    precision: str


def capture(training: Training, step: int, clock: Clock) -> TrainState:
    """Return the state of a run after `step` optimizer steps. All ranks call this together."""
    return TrainState(
        step=step,
        model=full_state_dict(training.model),
        optimizers=[full_tensors(optimizer.state_dict()) for optimizer in training.optimizers],
        elapsed=clock.elapsed(),
        train_seconds=clock.train_seconds,
        data=training.data.digests,
        watch=training.watch.state(),
        flops=training.flops.total,
        precision=training.config.precision,
    )


def save_checkpoint(folder: Path, training: Training, step: int, clock: Clock) -> None:
    """Write the state of a run after `step` optimizer steps to `folder/checkpoints`. All ranks call this together."""
    state = capture(training, step, clock)
    if ranks.is_first():
        checkpoint.save(folder / "checkpoints", step, state._asdict())


def resume(folder: Path, training: Training) -> tuple[int, Clock]:
    """Load the newest intact checkpoint in `folder/checkpoints`; return the number of steps done and the clock.

    Without a checkpoint, return 0 and a new clock. Raises ConfigError if the checkpoint does not have exactly the
    fields of `TrainState`, if the text, the tokenizer or the precision has changed since, or if an event is missing.
    """
    loaded = checkpoint.load(folder / "checkpoints")
    if loaded is None:
        return 0, Clock()
    saved_step, fields = loaded
    if differing := fields.keys() ^ set(TrainState._fields):
        raise ConfigError(
            f"{folder}: the checkpoint of step {saved_step} was written by another version of this program "
            f"(different fields: {', '.join(sorted(differing))}); resume with that version, or choose another out=DIR"
        )
    step, model, optimizers, elapsed, train_seconds, data, watch, flops, precision = TrainState(**fields)
    if data != training.data.digests:
        raise ConfigError(
            f"{folder}: the text or the tokenizer of data.* has changed since step {step}; "
            "restore the old data, or choose another out=DIR"
        )
    if precision != training.config.precision:
        raise ConfigError(
            f"{folder}: trained with precision={precision} until step {step}, not {training.config.precision}; "
            f"restore {folder.parent / 'precision.json'}, or choose another out=DIR"
        )
    if lost := events.lost_event(folder / events.FILE, step, eval_every=training.config.eval_every):
        raise ConfigError(
            f"{folder / events.FILE}: the {lost} is missing, but the checkpoint is that of step {step}; "
            "restore the file, or delete the folder to train the run again"
        )
    current = training.model.state_dict()
    training.model.load_state_dict({name: shard_like(value, current[name]) for name, value in model.items()})
    for optimizer, saved in zip(training.optimizers, optimizers, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = {number: _sharded(values, parameters[number]) for number, values in saved["state"].items()}
        optimizer.load_state_dict({**saved, "state": states})
    training.watch.load(watch)
    training.flops.total = flops
    log.info("%s: resumed after step %d", folder, step)
    return step, Clock(elapsed, train_seconds)


def _sharded(values: dict[str, Any], p: nn.Parameter) -> dict[str, Any]:
    """Return an optimizer's state of parameter `p`. Tensors with the shape of `p` are sharded like `p`."""
    return {name: shard_like(v, p) if torch.is_tensor(v) and v.shape == p.shape else v for name, v in values.items()}
