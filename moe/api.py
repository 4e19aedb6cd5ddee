"""What `import moe` offers for scripts and notebooks: train, read runs, compare settings, and look into a model.

`docs/tour.ipynb` shows the functions on small runs.
"""

import html
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe.analysis.claims import judge_planned
from moe.analysis.statistics import contrasts
from moe.checks import ConfigError, require, unknown
from moe.config.options import use
from moe.config.schema import Config
from moe.results import table
from moe.results.comparable import search_goal
from moe.results.conditions import HEADLINE, varied_factors
from moe.runs import events
from moe.runs.folder import changed_code
from moe.runs.record import MetricsRecord, RunRecord

if TYPE_CHECKING:  # these import torch, which takes seconds
    import transformers

    import moe.data.blocks
    import moe.model.causal_lm


@dataclass(frozen=True)
class Run:
    """A run folder: what was trained, and what came out. The model, its tokenizer and the data are read when asked for.

    metrics: the final metrics that are one number, or null; empty before the run is finished. history: a row for each
    evaluation, with one column for each metric of `events.jsonl`.
    """

    folder: Path
    status: str
    config: Config
    metrics: dict[str, int | float | None]
    history: pd.DataFrame

    def __repr__(self) -> str:
        values = "".join(
            f", {name}={self.metrics[name]:.4g}" for name in HEADLINE if self.metrics.get(name) is not None
        )
        return f"<Run {self.folder}: {self.status}{values}>"

    def model(self, *, trusted: bool = False) -> "moe.model.causal_lm.MoEForCausalLM":
        """Return the saved model, in evaluation mode. `trusted`: its router may be a class outside of this project.

        Raises ValueError for a model that cannot be read, as after `save_model=none`. Warns if the code of that class
        has changed since the run began.
        """
        from moe.model.causal_lm import load_model

        saved = self._saved()
        if trusted:
            use()
            for name in changed_code(RunRecord.read(self.folder / RunRecord.FILE), self.config, "router"):
                warnings.warn(f"{self.folder}: the code of {name} has changed since that run began", stacklevel=2)
        else:
            self.config.require_trust("model(trusted=True)", "router")
        return load_model(saved, trusted=trusted)

    def tokenizer(self) -> "transformers.PreTrainedTokenizerFast":
        """Return the tokenizer of the saved model. Raises ValueError if it cannot be read."""
        from moe.data.tokenizer import pretrained_tokenizer

        return pretrained_tokenizer(str(self._saved()))

    def _saved(self) -> Path:
        folder = self.folder.resolve() / "model"
        if not folder.is_dir():  # a name that is no folder would be looked up on the hub
            reason = f"it is {self.status}, with save_model={self.config.save_model}"
            raise ConfigError(f"{self.folder}: this run has no saved model; {reason}")
        return folder

    def data(self, *, trusted: bool = False) -> "moe.data.blocks.Prepared":
        """Return the blocks of training and validation text, from the cache; with `trusted`, made again if need be."""
        from moe.training.setup import prepare_data

        if trusted:
            use()
        else:
            self.config.require_trust("data(trusted=True)", "data.source")
        return prepare_data(self.config, trusted=trusted)


def load_run(folder: Path | str) -> Run:
    """Return the run in a folder that holds a run.json. Raises ValueError if it cannot be read.

    >>> run = load_run("outputs/default/base")  # the run of `python train.py`
    >>> run.status
    'finished'
    >>> bool(run.metrics["val/loss"] == run.history["val/loss"].iloc[-1])
    True
    """
    require(isinstance(folder, Path | str), "folder", folder, "a path, as text or Path")
    require(not Path(folder).is_file(), "folder", folder, "the folder of a run, and not a file in it")
    folder = Path(folder)
    record, config = RunRecord.read_typed(folder / RunRecord.FILE)
    finished = record.status == "finished"
    metrics = MetricsRecord.read(folder / MetricsRecord.FILE).scalars() if finished else {}
    path = folder / events.FILE
    evaluations = [event for event in events.read_events(path) if event["kind"] == "eval"] if path.exists() else []
    history = pd.DataFrame(evaluations).drop(columns="kind", errors="ignore")
    return Run(folder, record.status, config, metrics, history)


def load_runs(paths: Path | str | Iterable[Path | str] = "multirun") -> pd.DataFrame:
    """Return one row for each run at or below a folder, or several: facts, factors and final metrics.

    Factors are the keys of the configuration; names of metrics contain a slash. Raises ValueError if there is no run.

    >>> load_runs("outputs")[["run", "status", "seed", "router"]].to_dict("records")
    [{'run': 'base', 'status': 'finished', 'seed': 42, 'router': 'topk'}]
    """
    folders = [paths] if isinstance(paths, Path | str) else _listed(paths)
    valid = bool(folders) and all(isinstance(folder, Path | str) for folder in folders)
    require(valid, "paths", paths, "a folder, or several")
    return table.load_runs(folders)


def _listed(value: Any) -> list[Any]:
    """Return the items of a list or the like; none of anything else."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else []


def _check_table(runs: Any) -> None:
    """Raise ConfigError unless `runs` is a table with the columns that `load_runs` gives it, and has a row."""
    valid = isinstance(runs, pd.DataFrame) and {"experiment", "status"} <= {*runs}
    shown = f"a table with the columns {', '.join(map(str, runs))}" if isinstance(runs, pd.DataFrame) else runs
    require(valid, "runs", shown, "a table of runs, such as load_runs('multirun')")


def compare(
    runs: pd.DataFrame,
    metric: str = "val/loss",
    *,
    factors: str | Iterable[str] | None = None,
    references: dict[str, Any] | None = None,
    margin: int | float | str | None = None,
) -> pd.DataFrame:
    """Compare each level of each factor with its reference level, paired by seed.

    runs: from `load_runs`, of one experiment; only finished ones count. factors: by default, all that vary. The columns
    are described at `moe.analysis.statistics.contrasts`: among them `difference` with its 95 % interval, and p after
    Holm's correction over all rows. margin: the difference that counts as none, in units of the metric or as text such
    as "1%". A comparison knows nothing of looks: its tests have the whole 5 % at each call, whenever the margin was
    chosen. Raises ConfigError for an unknown metric or factor, for several experiments, and for the runs of a search,
    whose settings were chosen by results.

    >>> runs = pd.DataFrame({"experiment": "mine", "status": "finished", "noise": [0.0, 0.0, 0.5, 0.5]})
    >>> runs = runs.assign(**{"seed": [1, 2, 1, 2], "val/loss": [4.0, 4.1, 4.2, 4.5]})
    >>> compare(runs)[["level", "reference", "difference"]].round(2).to_dict("records")
    [{'level': 0.5, 'reference': 0.0, 'difference': 0.3}]
    """
    _check_table(runs)
    finished = runs[runs["status"] == "finished"]
    if finished.empty:
        none = f"none of the {len(runs)} runs is finished" if len(runs) else "the table has no runs"
        raise ConfigError(f"{none}: runs['experiment'].unique() of the whole table lists its experiments")
    experiments = sorted(finished["experiment"].unique())
    if len(experiments) > 1:
        names = ", ".join(map(repr, experiments))
        advice = f"compare those of one, runs[runs['experiment'] == {experiments[0]!r}]"
        raise ConfigError(f"the runs are of {len(experiments)} experiments, {names}: {advice}")
    if goal := search_goal(finished):
        raise ConfigError(f"a search to {goal} chose these runs by results, so that no test on them is valid")
    metrics = [column for column in finished if "/" in column]
    if metric not in metrics:
        raise unknown("metric", str(metric), metrics)
    known = [column for column in finished if "/" not in column and column not in table.FACTS and column != "seed"]
    varied = [factor for factor in varied_factors(finished) if factor != "seed"]
    chosen = varied if factors is None else [factors] if isinstance(factors, str) else _listed(factors)
    require(factors is None or bool(chosen), "factors", factors, "the name of a factor, or several")
    require(isinstance(references or {}, dict), "references", references, "an object, such as {'router': 'topk'}")
    for factor in chosen:
        if factor not in known:
            raise unknown("factor", str(factor), known)
    return contrasts(finished, metric, list(dict.fromkeys(chosen)), references=references, margin=margin)


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row with a verdict for each claim that was planned before these runs (`claims` of an experiment).

    The claims have all of the 5 %: neither the contrasts of a report nor earlier looks at these runs take a part of it.
    `analyze.py` corrects for both, and writes the look down, so quote its verdicts.

    >>> len(judge(load_runs("outputs")))  # nobody planned a claim about this run
    0
    """
    _check_table(runs)
    return judge_planned(runs)


def train(*overrides: str) -> list[Run]:
    """Train one run, or with "-m" a grid or a search, as `moe train` does with the same words, and return the runs.

    Training runs in a process of its own and prints as usual; finished runs are not trained again. Raises ConfigError
    with the message of the command if a run did not finish.
    """
    from moe.launch.command_line import read_command

    for word in overrides:
        trains = isinstance(word, str) and (not word.startswith("-") or word in ("-m", "--multirun"))
        require(trains, "overrides", word, 'texts such as "noise=0.1", and "-m" for a grid')
    words = [word.strip() for word in overrides]  # a shell would leave out spaces and line breaks around them, too
    asked = read_command(words)
    status = subprocess.run([sys.executable, "-m", "moe", "train", *words]).returncode
    if status:
        raise ConfigError(f"moe train {shlex.join(words)}: ended with status {status}; see what it printed")
    return [load_run(folder) for folder in asked.run_folders()]


def route(
    model: "moe.model.causal_lm.MoEForCausalLM", tokenizer: "transformers.PreTrainedTokenizerFast", text: str
) -> pd.DataFrame:
    """Return which experts each token of a text asks for: a row for each token, layer and expert.

    Columns: position and token (its text); layer; expert; weight: the gate weight; probability: of this expert in the
    router's distribution, NaN for a router without one. In a chain of routers, `iteration` counts them; else it is 0.
    Raises ValueError for a text that is empty or longer than the model reads at once, and for a model whose experts do
    not work on single tokens.

    >>> run = load_run("outputs/default/base")
    >>> table = route(run.model(), run.tokenizer(), "The quick brown fox")
    >>> weights = table.groupby(["position", "layer"])["weight"].sum()
    >>> weights.round(3).unique()  # the weights of a token's experts sum to 1
    array([1.])
    """
    import torch

    from moe.specialization.observation import reason_not_studied, text_blocks

    block, *more = text_blocks(model, tokenizer, text)
    if more:
        count, longest = sum(part.ids.numel() for part in (block, *more)), model.config.max_position_embeddings
        raise ConfigError(f"text has {count} tokens: must have at most {longest}, the length of this model")
    if reason := reason_not_studied(model, block):
        raise ValueError(reason)
    with torch.no_grad(), _evaluated(model):
        layers = model(**block.to(model.device).inputs).routing
    tokens = [tokenizer.decode([token]) for token in block.ids[0].tolist()]
    parts = []
    for layer, chain in enumerate(layers):
        for iteration, routing in enumerate(chain):
            at = routing.token, routing.expert
            known = routing.probs is not None
            parts.append(
                pd.DataFrame(
                    {
                        "position": routing.token.tolist(),
                        "token": [tokens[position] for position in routing.token.tolist()],
                        "layer": layer,
                        "iteration": iteration,
                        "expert": routing.expert.tolist(),
                        "weight": routing.weight.tolist(),
                        "probability": routing.probs[at].tolist() if known else float("nan"),
                    }
                )
            )
    order = ["position", "layer", "iteration", "weight"]
    return pd.concat(parts).sort_values(order, ascending=[True, True, True, False], ignore_index=True)


class Page(str):
    """An HTML page. A notebook shows it in a frame; `page.save("tokens.html")` writes it to a file."""

    def __repr__(self) -> str:
        return f"<HTML page of {len(self):,} characters; .save(path) writes it>"

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self)}" width="100%" height="560" style="border: 0"></iframe>'

    def save(self, path: Path | str) -> None:
        """Write the page to a file."""
        Path(path).write_text(self, encoding="utf-8")


def show(
    model: "moe.model.causal_lm.MoEForCausalLM", tokenizer: "transformers.PreTrainedTokenizerFast", text: str
) -> Page:
    """Return a page on which each token of a text has the color of its heaviest expert, in the layer that one selects.

    The model reads a long text in parts of its own length. Raises ValueError for an empty text, and for a model whose
    experts do not work on single tokens.

    >>> run = load_run("outputs/default/base")
    >>> page = show(run.model(), run.tokenizer(), "The quick brown fox")
    >>> page.splitlines()[0]
    '<!doctype html>'
    """
    from moe.specialization.observation import text_blocks
    from moe.specialization.page import text_page

    blocks = text_blocks(model, tokenizer, text)
    with _evaluated(model):
        return Page(text_page(model, tokenizer, blocks, title="Experts of each token"))


@contextmanager
def _evaluated(model: "moe.model.causal_lm.MoEForCausalLM") -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
