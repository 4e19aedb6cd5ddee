"""The validation loss of a run by document, after the last step: documents.npz in the run folder."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from moe.checks import first_line
from moe.files import open_file, replacing

FILE = "documents.npz"


class DocumentLosses(NamedTuple):
    """Sums over the tokens with a label of each validation document. Runs with the same data have the same documents.

    A document is a source file, or a conversation. nats: summed cross-entropy. tokens: number of tokens.
    """

    nats: Float[np.ndarray, " N"]
    tokens: Float[np.ndarray, " N"]


def write_documents(folder: Path, losses: DocumentLosses) -> None:
    """Write the file, atomically."""
    with replacing(folder / FILE) as file:
        np.savez_compressed(file, **losses._asdict())


def read_documents(folder: Path) -> DocumentLosses:
    """Return the losses of a run. Raises ValueError, naming the file, if it is missing, torn or foreign."""
    path = folder / FILE
    try:
        with open_file(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            losses = DocumentLosses(*(np.asarray(file[name], dtype=np.float64) for name in DocumentLosses._fields))
        if losses.nats.ndim != 1 or losses.nats.shape != losses.tokens.shape:
            raise ValueError(f"shapes {losses.nats.shape} and {losses.tokens.shape} are no lists of documents")
        if not (np.isfinite(losses.tokens) & (losses.tokens >= 0)).all():
            raise ValueError("a number of tokens is negative or not finite")
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {FILE}") from None
    except Exception as error:  # whatever a wrong zip archive or array makes the libraries raise
        raise ValueError(f"{path}: incomplete or not losses by document ({first_line(error)})") from None
    return losses
