"""Save the final model of a run, and traces and models at milestones."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from moe.config.schema import Config
from moe.config.trainable import Trainable
from moe.data.chat import end_ids
from moe.distributed import ranks
from moe.distributed.sharding import full_state_dict
from moe.files import apply_umask
from moe.runs import traces
from moe.training.probe import assigned_experts
from moe.training.schedules import knob_settings
from moe.training.setup import Training


def save_model(training: Training, target: Path, step: int) -> None:
    """Write the model and its tokenizer to the folder `target`, atomically. All ranks call this together.

    Raises FileNotFoundError if the parent of `target` does not exist, because someone deleted the run folder.
    """
    weights = full_state_dict(training.model)
    if not ranks.is_first():
        return
    disable_progress_bar()  # transformers would show one while it writes a single small file
    describe(training, step)
    model = training.model
    if model.adapter is not None:
        model, weights = model.adapter.merged(model, weights)
    with _replacing(target) as folder:
        model.save_pretrained(folder, state_dict=weights)
        training.data.tokenizer.save_pretrained(folder)


def save_adapter(training: Training, target: Path) -> None:
    """Write the adapter of the model, if it has one, to the folder `target`, atomically. All ranks call this together.

    Raises FileNotFoundError as `save_model` does.
    """
    model = training.model
    if model.adapter is None:
        return
    weights = full_state_dict(model)
    if not ranks.is_first():
        return
    with _replacing(target) as folder:
        model.adapter.save(model, weights, folder, base=_base(training.config))


def _base(config: Config) -> str | None:
    """Return the folder (as an absolute path) or the hub name of the model that the adapter changes.

    None if there is no such model, or if more than the adapter trained: loading the two gives another model then.
    """
    name = config.model.checkpoint
    if name is None or config.trains != Trainable.of("adapter"):
        return None
    return str(Path(name).absolute()) if Path(name).is_dir() else name


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `target` when the `with` block ends without an error."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()  # without parents, because save_pretrained would create a deleted run folder again
    yield temporary
    apply_umask(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)


def describe(training: Training, step: int) -> None:
    """Set what a model saved after `step` optimizer steps, and its tokenizer, say about themselves.

    - The temperature and noise of that step. Without knobs, the loaded model therefore has the validation loss that the
      run logged.
    - The ids of the tokens that begin, end and pad a text. Generation ends at the end of a text and, if the tokenizer
      has a chat template, at the end of a turn.
    - The longest text for which the model has learned positions.
    """
    model, tokenizer = training.model, training.data.tokenizer
    knobs = knob_settings(training.config, training.schedule, step)
    model.config.router_temperature, model.config.router_noise = knobs["temperature"], knobs["noise"]
    ends = end_ids(tokenizer)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = ends if len(ends) > 1 else ends[0]
        settings.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings


def save_milestone(folder: Path, training: Training, step: int) -> None:
    """Write the trace after `step` optimizer steps to a run's folder. With `save_model=all`, write the model too.

    The model after the last step is not written here, because the run saves its final model anyway. All ranks call
    this together.
    """
    config = training.config
    temperature = knob_settings(config, training.schedule, step)["temperature"]
    chosen = assigned_experts(training.model, training.data, temperature=temperature)
    if chosen is not None and ranks.is_first():
        traces.write_trace(folder / "trace", step, chosen.numpy())
    if config.save_model == "all" and step < config.steps:
        (folder / "milestones").mkdir(exist_ok=True)
        save_model(training, folder / "milestones" / f"step-{step:08d}", step)
