"""Read from the Hugging Face Hub: which commit is the newest, and the first rows of a data set at one commit.

The libraries of the hub would repeat a failed request for ten minutes and print two lines for each attempt. Here they
give up after half a minute to three minutes, and the log has one line.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from moe.checks import ConfigError, first_line, not_on_hub

log = logging.getLogger(__name__)

TRIES = 2  # of the library `datasets`; in each, `huggingface_hub` repeats a request for about 25 seconds
COMMIT = re.compile("[0-9a-f]{40}")
RETRYING = ("huggingface_hub.utils._http", "datasets.utils.file_utils")  # loggers that write a line for each attempt


@cache
def commit(name: str, revision: str | None, *, kind: str, key: str) -> str:
    """Return the commit that a branch, tag or commit names in a repository of the hub; None means its newest commit.

    kind: "dataset" or "model". key: of the configuration, for messages. Without a connection, a model that was loaded
    before has the commit of its local copy. Within one process, the answer stays the same. Raises ConfigError if the
    hub does not answer, or has no such repository or revision.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=20).sha
    except Exception as error:  # of huggingface_hub, of its HTTP library, or of the operating system
        possible = kind == "model" and not isinstance(error, HFValidationError)  # not a path such as /a/b=1
        known = possible and try_to_load_from_cache(name, "tokenizer_config.json", revision=revision)
        if isinstance(known, str):
            return Path(known).parent.name
        advice = f"; give {key.rpartition('.')[0]}.revision=COMMIT to use prepared data" if kind == "dataset" else ""
        raise ConfigError(f"{key}={name}: no such folder, and {not_on_hub(error)}{advice}") from error
    if found is None:
        raise ConfigError(f"{key}={name}: the hub does not tell the commit")
    return found


def rows(
    path: str, name: str | None, split: str, revision: str | None, columns: Sequence[str], count: int
) -> Iterator[dict[str, Any]]:
    """Yield the first `count` rows of a data set on the hub at one commit, with at least `columns`.

    From parquet files only those columns and not much more than those rows are fetched. The connection is closed when
    the generator ends or is closed. Raises ValueError, with one line, if the hub cannot be read.
    """
    with _patient(path):
        stream = iter(_stream(path, name, split, revision, columns))
        with closing(stream):
            yield from islice(stream, count)


def _stream(path: str, name: str | None, split: str, revision: str | None, columns: Sequence[str]) -> Any:
    import pyarrow
    from datasets import load_dataset_builder
    from pyarrow.dataset import ParquetFragmentScanOptions

    builder = load_dataset_builder(path, name, revision=revision)
    stream = builder.as_streaming_dataset(split=split)
    if hasattr(builder.config, "fragment_scan_options") and set(columns) <= set(stream.features or ()):
        small = pyarrow.CacheOptions(hole_size_limit=8192, range_size_limit=1 << 20, lazy=True, prefetch_limit=0)
        builder.config.columns = list(columns)
        builder.config.batch_size = 64
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False, cache_options=small)
        stream = builder.as_streaming_dataset(split=split)
    return stream


@contextmanager
def _patient(path: str) -> Iterator[None]:
    """Bound the retries of the libraries, replace their lines by one, and turn their errors into one line."""
    import datasets.config

    said = ""

    def first_only(record: logging.LogRecord) -> bool:
        nonlocal said
        if not said:
            said = first_line(record.msg)
            log.warning("%s: the hub does not answer (%s); trying again for up to three minutes", path, said)
        return False

    names = ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES")
    before = {name: getattr(datasets.config, name) for name in names}
    try:
        for name in names:
            setattr(datasets.config, name, TRIES)
        for logger in RETRYING:
            logging.getLogger(logger).addFilter(first_only)
        yield
    except Exception as error:  # of datasets, huggingface_hub, pyarrow, the HTTP library, or the operating system
        why = first_line(error) + (f", after: {said}" if said else "")
        raise ValueError(
            f"data.source.path={path}: cannot be read from the hub ({why}); the same command tries again"
        ) from error
    finally:
        for logger in RETRYING:
            logging.getLogger(logger).removeFilter(first_only)
        for name, value in before.items():
            setattr(datasets.config, name, value)
