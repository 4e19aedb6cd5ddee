"""Read offline W&B runs back, with W&B's own command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def wandb_records(run: Path) -> list[dict[str, Any]]:
    """Return the records of a .wandb file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
