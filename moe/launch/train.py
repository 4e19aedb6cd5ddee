"""The command that trains: `python train.py [-m] [key=value ...]` in a checkout, `moe train` where it is installed."""

import gc
import logging
import os
import signal
import sys
import time
from contextlib import nullcontext

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin are 20 times slower beside a busy process
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of the hub and of transformers

import hydra
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from moe.checks import ConfigError
from moe.config.options import CONF
from moe.distributed import ranks
from moe.files import LinkError
from moe.launch import command_line, search, sweep
from moe.launch.cells import job_cell
from moe.launch.revisions import pinned_by_first_rank
from moe.program import program
from moe.runs import place
from moe.runs.folder import finished
from moe.runs.place import Place
from moe.runs.record import RecordError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run_cell(composed: DictConfig) -> None:
    """Train one cell, in the process that the launcher chose for it."""
    from hydra.core.hydra_config import HydraConfig

    from moe.launch.run import run

    if "torch" not in sys.modules:  # a launcher has started this process: imports as in `main`
        gc.disable()

    settings = HydraConfig.get()
    single = str(settings.mode) == "RunMode.RUN"
    place = Place() if single else Place.of(settings.job.num + 1)
    run(pinned_by_first_rank(job_cell(composed, settings)), place)


def launch(command: command_line.Command) -> None:
    """Let Hydra train the cells of a command with the chosen launcher, or answer `--cfg` and the like."""
    sys.argv[1:] = command.arguments
    if command.cells is None:  # Hydra prints its answer
        _let_pipe_close()
    for sweeper in Plugins.instance().discover(Sweeper):  # Hydra imports its plugins a second time: other classes
        setattr(sweeper, "split_arguments", command.batches)  # noqa: B010
        setattr(sweeper, "validate_batch_is_legal", lambda *_: None)  # noqa: B010 (every cell has been composed)
    numbered = "--multirun" in command.arguments and "hydra/launcher=slurm" not in command.arguments  # of new jobs only
    cells = command.cells or []
    with place.command(len(cells), sum(not finished(cell) for cell in cells)) if numbered else nullcontext():
        run_cell()


def _let_pipe_close() -> None:
    """End this process without a message if its output goes to a command, such as `head`, that ends early."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def main(*, tables: bool = True) -> int:
    """Carry out the command in `sys.argv`, and return the exit status. tables: see `sweep.carry_out`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # libraries swallow KeyboardInterrupt; a run sets its own handler
    gc.disable()  # imports create a million objects, none of which is garbage; training enables it again
    if not ranks.is_first():
        logging.disable(logging.WARNING)
    try:
        if {"--help", "-h", command_line.LIST} & set(sys.argv[1:]):
            _let_pipe_close()
            for line in command_line.answer(sys.argv[1:]):
                print(line, flush=True)
            return 0
        command = command_line.read_command(sys.argv[1:])
        if command.search is not None:
            return search.carry_out(command.search, lambda cells, words: launch(command_line.Command(cells, words)))
        return ranks.stop(sweep.carry_out(command.cells or [], lambda: launch(command), tables=tables))
    except (ConfigError, RecordError, LinkError) as error:
        if not ranks.is_first():  # the first rank prints the same error, and the launcher then ends this rank
            time.sleep(10)
        print(f"{program(sweep.USUAL)}: {error}", file=sys.stderr)
        return 2
