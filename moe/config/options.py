"""The options of each config group: the yaml files in conf/."""

from pathlib import Path

# An installed package holds them in the folder moe/conf; a checkout has them beside moe/.
_PLACES = [Path(__file__).resolve().parents[level] / "conf" for level in (1, 2)]
CONF = next((place for place in _PLACES if (place / "config.yaml").exists()), _PLACES[-1])
GROUPS = ("router", "schedule", "model", "data", "optimizer", "logger", "experiment", "variant")


def options(group: str) -> dict[str, str]:
    """Return the options of a config group, each with its purpose, which is the first comment of its YAML file."""
    purposes = {}
    for path in sorted((CONF / group).glob("*.yaml")):
        lines = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith("# ") and "@package" not in line
        ]
        purposes[path.stem] = lines[0].removeprefix("# ") if lines else ""
    return purposes
