"""Train one model, or a grid of them: `python train.py [-m] [key=value ...]`, see `--help`."""

import gc
import logging
import os
import signal
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall 20-fold beside another busy process

import hydra
from omegaconf import DictConfig

from moe.config.schema import Cell
from moe.distributed import ranks
from moe.launch import command_line, sweep


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run_cell(composed: DictConfig) -> None:
    """One cell, wherever the launcher put it."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from moe.launch.run import run

    settings = HydraConfig.get()
    choices = command_line.group_choices(settings)
    experiment = str(choices.pop("experiment"))
    run(Cell(command_line.typed(composed), Path(settings.runtime.output_dir), experiment, choices))


def main() -> int:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(command_line.help_text())
        return 0
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run handles it: libraries swallow KeyboardInterrupt
    gc.disable()  # until there is something to train: importing makes a million objects, and all of them stay
    if not ranks.is_first():
        logging.disable(logging.WARNING)
    try:
        cells = command_line.read_cells(sys.argv[1:])
        return sweep.carry_out(cells or [], run_cell)
    except command_line.ConfigError as error:
        if not ranks.is_first():  # the first says the same, and its end is ours; unless it is wrong here alone
            time.sleep(10)
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
