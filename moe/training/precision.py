"""Choose what `precision=auto` stands for: the faster of fp32 and bf16, by a measurement on this machine."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from moe import files
from moe.checks import ConfigError, first_line, parse
from moe.config.schema import Config
from moe.distributed import ranks
from moe.runs.folder import locked
from moe.training import process
from moe.training.setup import build_model, prepare_data

FILE = "precision.json"
BUDGET = 1.0  # seconds of measured passes, after one pass of each kind that warms up
MARGIN = 1.1  # bf16 is chosen if fp32 takes this many times as long, because fp32 is more exact
TOKENS = 4096  # largest number of tokens in a measured pass


class Choice(NamedTuple):
    """A precision, and the measured ratio of seconds, fp32 / bf16, for which it was chosen."""

    precision: Literal["fp32", "bf16"]
    ratio: float

    def reason(self) -> str:
        took = f"a pass of the first run in this folder took {self.ratio:.2f} times as long in fp32 as in bf16"
        return f"{took}; bf16 is chosen from {MARGIN} on"


def choose(config: Config, folder: Path) -> tuple[Config, dict[str, str]]:
    """Return the configuration of a run without `precision=auto`, and why, for its run record.

    The first run of a sweep measures, and writes its choice beside the run folders. The other runs of the sweep and
    every resume take it from there, so that they all compute in the same precision, on whatever machine. Raises
    ConfigError if that file cannot be used.
    """
    if config.precision != "auto":
        return config, {}
    choice = ranks.broadcast(_decide(config, folder.parent / FILE) if ranks.is_first() else None)
    chosen = replace(config, precision=choice.precision)
    return chosen, {"precision": choice.precision, "precision_reason": choice.reason()}


def _decide(config: Config, path: Path) -> Choice:
    """Return the choice in `path`, or make it while other runs of the sweep wait."""
    while True:
        with locked(path.with_suffix(".lock")) as owner:
            if owner is None:
                choice = _stored(path) or _measure(config)
                files.write_json(path, choice._asdict())
                return choice
        time.sleep(0.1)


def _stored(path: Path) -> Choice | None:
    try:
        return parse(Choice, json.loads(files.read_text(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be used ({first_line(error)}); choose precision=fp32 or bf16, or another out=DIR"
        ) from error


def _measure(config: Config) -> Choice:
    """Time forward and backward passes of the model in fp32 and bf16, in turns, and compare the fastest of each."""
    process.configure(threads=config.threads, matmul_precision=config.matmul_precision)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = build_model(config, vocab_size=len(prepare_data(config).tokenizer))
    nn.Module.to(model, device)
    rows = max(1, min(config.batch_size, TOKENS // config.data.seq_len))
    ids = torch.randint(0, model.config.vocab_size, (rows, config.data.seq_len), device=device)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    began = time.perf_counter()
    for number in range(50):
        for dtype, values in seconds.items():
            start = _now(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            values.append(_now(device) - start)
        if number == 0:
            began = time.perf_counter()
        elif time.perf_counter() - began > BUDGET:
            break
    fp32, bf16 = (min(values[1:]) for values in seconds.values())
    return Choice("bf16" if fp32 > MARGIN * bf16 else "fp32", fp32 / bf16)


def _now(device: torch.device) -> float:
    """Return a time in seconds, to take differences of: of this process alone if one thread of a CPU works."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()
