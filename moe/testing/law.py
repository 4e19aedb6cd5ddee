"""What a law is: a function that raises AssertionError for a router that breaks it."""

from collections.abc import Callable

from moe.routers.base import Router

Make = Callable[[int], Router]  # returns a new router for hidden states of the given width

LAWS: dict[str, Callable[[Make], None]] = {}


def law(check: Callable[[Make], None]) -> Callable[[Make], None]:
    """Add a function to `LAWS`, under its name."""
    LAWS[check.__name__] = check
    return check


def hold(ok: object, advice: str) -> None:
    """Raise AssertionError with the advice unless `ok`."""
    if not ok:
        raise AssertionError(advice)
