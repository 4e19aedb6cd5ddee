"""The command `moe`: `python -m moe` lists its subcommands."""

import atexit
import gc
import os
import pkgutil
import sys

from moe.program import ended

# Each subcommand: the module whose `main` carries it out, and what it does.
COMMANDS = {
    "train": ("moe.launch.train", "train one model, or with -m one for each combination of several values"),
    "plan": ("moe.planning.__main__", "say how many seeds the claims of an experiment need, and what they cost"),
    "analyze": ("moe.analysis.__main__", "write tables, statistics, figures and a report over runs"),
    "observe": ("moe.observe", "measure the routing of a model of the transformers library"),
    "specialize": ("moe.specialization.__main__", "measure on finished runs how the experts differ"),
    "export": ("moe.foreign.export_command", "write the model of a run for plain transformers and for servers"),
    "dashboard": ("moe.dashboard", "write a W&B workspace for an experiment"),
    "bench": ("moe.bench.__main__", "measure the speed and the error rates of this project"),
}


def carry_out(command: str) -> int:
    """Carry out a subcommand with the words in `sys.argv`, and return the exit status.

    Imports create a million objects, none of which is garbage. So Python does not search these for garbage, neither
    during the imports nor when the process ends.
    """

    def imported() -> int:
        gc.disable()
        atexit.register(gc.freeze)
        main = pkgutil.resolve_name(f"{COMMANDS[command][0]}:main")
        gc.enable()
        return int(main() or 0)

    return imported() if command == "train" else ended(imported, f"moe {command}")  # a run has its own end by a signal


def _typed() -> str:
    """Return how the user called this module."""
    return "python -m moe" if os.path.basename(sys.argv[0]) == "__main__.py" else "moe"


def main() -> int:
    """Carry out the subcommand in `sys.argv`, and return the exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.argv = [f"{_typed()} {name}", *sys.argv[2:]]
        return carry_out(name)
    if name not in ("", "-h", "--help"):
        from moe.checks import unknown

        print(f"{_typed()}: {unknown('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    width = max(map(len, COMMANDS))
    print("Research on Mixture-of-Experts routing: change one setting, train a grid, test the differences.\n")
    print("\n".join(f"  moe {command:<{width}}  {purpose}" for command, (_, purpose) in COMMANDS.items()))
    print("\nmoe COMMAND --help says what a command takes. `moe` is the same as `python -m moe`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
