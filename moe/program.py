"""The name by which the user called a command, and its end by a signal: one line and the usual exit status."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Never

SCRIPTS = ("train.py", "analyze.py")


class Stopped(KeyboardInterrupt):
    """A signal ends the command. Like KeyboardInterrupt it is not an Exception, so that no code goes on after it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


def program(usual: str) -> str:
    """Return a command as the user typed it, such as "moe plan" or "python -m moe plan".

    usual: the name of a command that was started in no such way.
    """
    name = os.path.basename(sys.argv[0])
    return name if name in SCRIPTS or name.startswith(("moe ", "python -m moe ")) else usual


def train_command() -> str:
    """Return how one trains from the present folder: with the file of a checkout, or with the installed package."""
    return "python train.py" if os.path.isfile("train.py") else "python -m moe train"


def ended(main: Callable[[], int | None], usual: str) -> int:
    """Carry out a command, and return its exit status. SIGTERM and Ctrl-C end it with one line; a second one at once.

    usual: see `program`.
    """

    def stop(number: int, frame: FrameType | None) -> Never:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in a job that a shell has put into the background
            signal.signal(number, stop)
    try:
        return int(main() or 0)
    except Stopped as stopped:
        print(f"{program(usual)}: {stopped}", file=sys.stderr)
        return stopped.exit_status
