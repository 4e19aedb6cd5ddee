"""A figure with its name and caption, or the reason why it could not be drawn."""

from typing import NamedTuple

from matplotlib.figure import Figure


class Drawing(NamedTuple):
    """A figure of the report. `figure` is None if it could not be drawn; `reason` then says why.

    `name` is the stem of the file that the figure is saved as. `caption` says in words what the figure shows.
    """

    name: str
    caption: str
    figure: Figure | None
    reason: str = ""


def drawing(name: str, caption: str, result: Figure | str) -> Drawing:
    """Return a `Drawing` from the result of a figure function: a figure, or the reason why there is none.

    The caption gets a capital letter, because it may begin with the label of a metric.
    """
    caption = caption[:1].upper() + caption[1:]
    return Drawing(name, caption, result) if isinstance(result, Figure) else Drawing(name, caption, None, result)
