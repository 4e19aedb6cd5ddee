"""Measure memory, disk and processor time of one training command, such as those of the README."""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from moe.bench.jobs import TRAIN
from moe.bench.timing import TimingTable
from moe.files import walk
from moe.launch.command_line import read_cells
from moe.training.disk import needed

PAUSE = 0.2  # seconds between two looks at the memory


class Footprint(NamedTuple):
    """What a command and the processes that it starts need.

    cpu_seconds: processor time of all that were seen. gigabytes: largest sum of their resident memory, in 10^9 bytes.
    Pages that two processes share count twice.
    """

    cpu_seconds: float
    gigabytes: float


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    with tempfile.TemporaryDirectory() as folder:
        words = [*arguments.overrides, f"out={folder}"]
        disks = [needed(cell.config) for cell in read_cells(words) or []]
        footprint = measure([*TRAIN, *words])
        kept = sum(path.stat().st_size for path in walk(Path(folder)))
    models = sum(disk.models for disk in disks)
    row = {"runs": len(disks), "CPU seconds": footprint.cpu_seconds, "peak GB": footprint.gigabytes}
    row |= {"MB on disk": kept / 1e6, "MB at most": sum(disk.models + disk.logs for disk in disks) / 1e6}
    row |= {"MB / saved models": kept / models} if models else {}
    yield TimingTable(" ".join(["train.py", *arguments.overrides]), [row])


def measure(command: Sequence[str]) -> Footprint:
    """Run a command and return what it and its children need. Raises CalledProcessError if it fails."""
    seconds: dict[int, float] = {}
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for each in _family(parent):
                try:
                    total += each.memory_info().rss
                    seconds[each.pid] = sum(each.cpu_times()[:2])
                except psutil.Error:  # it has just ended
                    continue
            peak = max(peak, total)
            time.sleep(PAUSE)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Footprint(sum(seconds.values()), peak / 1e9)


def _family(parent: psutil.Process) -> list[psutil.Process]:
    try:
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []
