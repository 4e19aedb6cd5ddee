"""The records that runs and sweeps leave as JSON: run.json, metrics.json, sweep.json and specialization.json.

Each file has one class, which writes it and reads it. Reading checks every field, so that code which holds a record
never meets a missing key or a wrong type. This module does not import torch, so that a command line is checked fast.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from moe.checks import first_line, parse
from moe.config.cell import Grid
from moe.config.claim import ClaimConfig
from moe.config.classes import parameter_defaults
from moe.config.keys import flatten, is_free
from moe.config.options import CLASSES
from moe.config.plugins import Plugin
from moe.config.schema import Config, defaults
from moe.files import read_text, write_json
from moe.runs.collapse import Collapse
from moe.runs.measured import Measured, ValidationLoss, check_shapes

FORMAT = 10  # of all these files; raise it whenever a field is added, removed or changes its meaning
READ = (7, 8, 9, FORMAT)  # formats that can be read; in format 7, runs have no unigram perplexity

R = TypeVar("R", bound="Record")
Status = Literal["running", "interrupted", "failed", "finished"]


class RecordError(ValueError):
    """A record cannot be read. The message is one line: the file, what is wrong, and what to do."""


class Machine(NamedTuple):
    """Operating system, processor, number of CPUs, names of the GPUs that the run could use, and their driver.

    null: unknown, or no GPU.
    """

    system: str
    processor: str | None
    cpus: int | None
    gpus: list[str]
    driver: str | None


class Parameters(NamedTuple):
    """Number of parameters: all of them, those that one token uses, and those that training changes."""

    total: int
    active: int
    trainable: int


class Ranks(NamedTuple):
    """Number of processes that trained the run, and how they shared the model."""

    number: int
    layout: str


class RunFacts(NamedTuple):
    """Facts that are known only after a run has been trained. The training loop returns them.

    flops_per_token: of a forward pass. seconds: time that the run was active after set-up, added over all its sessions;
    train_seconds: without evaluation and saving. peak_memory_gb: in 1e9 bytes, null if unknown. process: thread and
    memory settings. experts_kernel: null for a model without experts. loss_kernel: how the loss over the
    vocabulary is computed. data: the manifest of the data, see `moe.data.blocks.Prepared`. collapses: layers whose
    routing collapsed, or did so for a while, see `moe.runs.collapse`. unigram_perplexity: the validation perplexity of
    a model that knows only how often each token occurs in the training text; null if recorded before format 8.
    """

    parameters: Parameters
    flops_per_token: int
    seconds: float
    train_seconds: float
    peak_memory_gb: float | None
    device: str
    process: dict[str, Any]
    ranks: Ranks
    experts_kernel: str | None
    loss_kernel: str
    data: dict[str, Any]
    collapses: list[Collapse]
    unigram_perplexity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON file with a format number. Subclasses add the fields and say what to do about a bad file."""

    FILE: ClassVar[str]
    ADVICE: ClassVar[str]

    format: int = FORMAT

    @classmethod
    def read(cls: type[R], path: Path) -> R:
        """Read the record at `path`. Raises RecordError for a missing, torn or foreign file, or another format."""
        try:
            content = _load(path)
            if isinstance(content, dict):
                if content.get("format") not in READ:
                    raise ValueError(f"written by another version of this project: {_number(content)}, here {FORMAT}")
                content = cls.in_present_layout(content | {"format": FORMAT})
            return parse(cls, content)
        except FileNotFoundError:
            raise RecordError(f"{path.parent}: no {path.name}") from None
        except OSError as error:
            raise RecordError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise RecordError(f"{path}: {first_line(error)}; {cls.ADVICE}") from None

    @classmethod
    def in_present_layout(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a file, changed to the present layout if it has an earlier one that can be read."""
        return content

    def write(self, path: Path) -> None:
        """Write the record to `path`, atomically."""
        write_json(path, {field.name: _plain(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """run.json: the configuration of a run, its status, and facts about it.

    error: the first line of what ended the run, if it failed or was interrupted. started: when the run began, such as
    2026-11-26T18:30:00+00:00; a resume keeps it. choices: the option chosen from each
    config group. causal: whether the routing of a token depends on no later token. config: the whole configuration.
    identity: the part of it that decides what the run computes, flat. versions: of Python and of libraries. commit: of
    this project, null if unknown. plugins: packages outside of this project whose classes the run uses. facts: null
    until the run is finished.
    """

    FILE = "run.json"
    ADVICE = "delete the folder or choose another out=DIR"

    status: Status
    error: str | None
    experiment: str
    name: str
    started: str
    choices: dict[str, str | None]
    causal: bool
    config: dict[str, Any]
    identity: dict[str, Any]
    versions: dict[str, str]
    machine: Machine
    commit: str | None
    plugins: dict[str, Plugin]
    facts: RunFacts | None

    @classmethod
    def in_present_layout(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return the content without those keys of the identity that have become free since the run was recorded."""
        if not isinstance(identity := content.get("identity"), dict):
            return content
        return content | {"identity": {key: value for key, value in identity.items() if not is_free(key)}}

    def __post_init__(self) -> None:
        if self.status == "finished" and self.facts is None:
            raise ValueError("facts is None: must be an object, because status is finished")
        if type(seed := self.config.get("seed")) is not int:
            raise ValueError(f"config.seed={seed!r:.40}: must be a whole number")
        for number, claim in enumerate(self.claims()):
            claim.check(f"config.claims[{number}]")

    @classmethod
    def read_typed(cls, path: Path) -> tuple["RunRecord", Config]:
        """Return the record at `path` and its configuration. Raises RecordError if one of them cannot be read."""
        record = cls.read(path)
        try:
            return record, record.typed_config()
        except ValueError as error:
            raise RecordError(f"{path}: {first_line(error)}; {cls.ADVICE}") from None

    @property
    def diverged(self) -> bool:
        """Whether the run failed because a loss or gradient was not finite."""
        return self.status == "failed" and str(self.error).startswith("Diverged")

    @property
    def ended(self) -> bool:
        """Whether the run will not go on, because it is finished or diverged."""
        return self.status == "finished" or self.diverged

    def typed_config(self) -> Config:
        """Return the configuration; a key from after the run has its default. Raises ValueError that names the key."""
        return parse(Config, self.config, "config")

    def values_of(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the value of each of these flat settings with which the run was trained, if it is known.

        A key that the record lacks had its default, because it is newer or the run ignores it. That of a key of a
        class, such as a router, is the default of the class, which is imported to ask for it.
        """
        known = {**defaults(), **flatten(self.config), **self.identity}
        for node in CLASSES:
            target = settings.get(f"{node}._target_")
            missing = any(key.startswith(f"{node}.") for key in settings.keys() - known.keys())
            if missing and target == self.identity.get(f"{node}._target_"):
                known = flatten(parameter_defaults(target, node), f"{node}.") | known
        return {key: known[key] for key in settings if key in known}

    def claims(self) -> list[ClaimConfig]:
        """Return the planned claims. They can be read, because this is checked when the record is made."""
        claims = self.config.get("claims", [])
        if not isinstance(claims, list):
            raise ValueError(f"config.claims={claims!r:.80}: must be a list")
        return [parse(ClaimConfig, claim, f"config.claims[{number}]") for number, claim in enumerate(claims)]


@dataclass(frozen=True, kw_only=True)
class MetricsRecord(Record):
    """metrics.json: the final metrics of a finished run, and its series with one entry per evaluation.

    A metric that the run does not have is null; one with a value for each layer and expert is a list of lists. Every
    run has the metrics `EVERY_RUN`.
    """

    FILE = "metrics.json"
    ADVICE = "delete the folder or choose another out=DIR"
    EVERY_RUN = ("val/loss", "val/perplexity", "val/accuracy")

    final_metrics: dict[str, int | float | list[Any] | None]
    history: dict[str, list[Any]]

    def __post_init__(self) -> None:
        if wrong := [name for name in self.final_metrics if "/" not in name]:
            raise ValueError(f"final_metrics.{wrong[0]}: the name of a metric must contain a slash")
        for name in self.EVERY_RUN:
            if not isinstance(value := self.final_metrics.get(name), int | float):
                raise ValueError(f"final_metrics.{name} is {value!r:.40}: must be a number, as in every finished run")

    def scalars(self) -> dict[str, int | float | None]:
        """Return the final metrics that are one number, or null."""
        return {name: value for name, value in self.final_metrics.items() if not isinstance(value, list)}


@dataclass(frozen=True, kw_only=True)
class SweepRecord(Record):
    """sweep.json: every cell that the sweep should have, by folder name, each with its factors and their levels.

    grids: the cells that are analyzed together. Several grids may share a cell.
    """

    FILE = "sweep.json"
    ADVICE = "delete this file; it only lists the cells that the sweep should have"

    cells: dict[str, dict[str, Any]]
    grids: list[Grid]

    @classmethod
    def in_present_layout(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return grids that say how levels were typed and what was replaced. Before, nothing was known of that."""
        if not isinstance(grids := content.get("grids"), list):
            return content
        unknown: dict[str, Any] = {"typed": {}, "replaced": {}}
        return content | {"grids": [unknown | grid if isinstance(grid, dict) else grid for grid in grids]}

    def __post_init__(self) -> None:
        for name in self.cells:
            if name in ("", ".", "..") or set(name) & {"/", "\\"} or not name.isprintable():
                raise ValueError(f"cells.{name!r:.80}: must be the name of a folder beside this file")
        for number, grid in enumerate(self.grids):
            if not grid.name.isprintable() or not grid.name:
                raise ValueError(f"grids[{number}].name={grid.name!r:.80}: must be a printable text")
        listed = {name for grid in self.grids for name in grid.cells}
        if unlisted := sorted(listed ^ self.cells.keys()):
            raise ValueError(f"{unlisted[0]!r:.80}: must be in cells, and in the cells of a grid")

    def grid_with(self, *cells: str) -> Grid | None:
        """Return the smallest grid that has all of these cells; None if no grid has them."""
        having = [grid for grid in self.grids if set(cells) <= set(grid.cells)]
        return min(having, key=lambda grid: len(grid.cells), default=None)

    def extended_by(self, new: Grid, given: set[str]) -> Grid | None:
        """Return the grid that the cells of a command belong to, which gave these keys; None if it is a new grid.

        Such a grid has the same factors, fixed settings and search. It may have more factors, if the command gives one
        level of each of them.
        """

        def is_part_of(old: Grid) -> bool:
            constant = set(old.factors) - set(new.factors)
            fixed = {key: value for key, value in new.fixed.items() if key not in constant}
            same = fixed == old.fixed and new.search == old.search
            return set(new.factors) <= set(old.factors) and constant <= given and same

        return min(filter(is_part_of, self.grids), key=lambda old: len(old.factors), default=None)

    def joined(self, new: Grid, cells: dict[str, dict[str, Any]], given: set[str]) -> "SweepRecord":
        """Return the record with another grid, or with more cells in the grid that it extends.

        cells: their settings. given: the keys that the command gives.
        """
        old = self.extended_by(new, given)
        if old is None:
            return SweepRecord(cells=self.cells | cells, grids=[*self.grids, new])
        both = {
            factor: list(dict.fromkeys([*words, *(new.typed.get(factor) or [new.fixed[factor]])]))
            for factor, words in old.typed.items()
            if factor in new.typed or "${" in str(new.fixed.get(factor))
        }
        merged = old._replace(cells=list(dict.fromkeys([*old.cells, *new.cells])), typed=both)
        return SweepRecord(cells=self.cells | cells, grids=[merged if grid is old else grid for grid in self.grids])


@dataclass(frozen=True, kw_only=True)
class CommandsRecord(Record):
    """commands.json: how the newest command named what changes no result of a sweep's runs.

    words: for each grid, by its name, the overrides of keys such as save_model and logger.mode. folders: for each grid,
    the folders outside of this project that held its options.
    """

    FILE = "commands.json"
    ADVICE = "delete this file; reports then print commands without what it names"

    words: dict[str, list[str]]
    folders: dict[str, list[str]]


class StudySettings(NamedTuple):
    """What a study depends on: format of the study, model, and options of the command."""

    format: int
    model_sha256: str
    blocks_wanted: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class SpecializationRecord(Record):
    """specialization.json: what `python -m moe.specialization` measured on a run.

    reason: why the experts could not be measured. measured: null if there is such a reason. seconds: time that the
    study took.
    """

    FILE = "specialization.json"
    PAGE = "tokens.html"  # text in which each token has the color of its expert, beside FILE
    ADVICE = "delete the file and measure the run again"

    settings: StudySettings
    step: int
    seconds: float
    val_loss: ValidationLoss
    reason: str | None
    measured: Measured | None

    def __post_init__(self) -> None:
        if (self.measured is None) != (self.reason is not None):
            raise ValueError("either measured or reason must be null")
        if self.measured is not None:
            check_shapes(self.measured)

    @classmethod
    def page(cls, folder: Path) -> Path | None:
        """Return the page with colored text in a run folder, or None if there is none."""
        path = folder / cls.PAGE
        return path if path.is_file() else None


def _load(path: Path) -> Any:
    """Return the content of a JSON file. Raises ValueError if it is incomplete or not JSON, OSError if unreadable."""
    try:
        text = read_text(path)
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair could never be printed
    except (ValueError, RecursionError) as error:
        raise ValueError(f"incomplete or not JSON ({first_line(error)})") from None
    return content


def _number(content: dict[str, Any]) -> str:
    return f"format {content['format']!r:.20}" if "format" in content else "no format number"


def _plain(value: Any) -> Any:
    """Return a NamedTuple, and those in it, as dicts."""
    items = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(items, list):
        return list(map(_plain, items))
    return {name: _plain(item) for name, item in items.items()} if isinstance(items, dict) else items
