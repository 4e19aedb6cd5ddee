"""Research on Mixture-of-Experts routing: change one setting, train small models over a grid, test the differences.

The names in `__all__` are what scripts and notebooks need; `moe.api` explains them. They are imported when they are
first used, because torch takes seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.api import Page, Run, compare, judge, load_run, load_runs, route, show, train
    from moe.routers.base import Router

__all__ = ["Page", "Router", "Run", "compare", "judge", "load_run", "load_runs", "route", "show", "train"]


def __getattr__(name: str) -> Any:
    from pkgutil import resolve_name

    if name not in __all__:
        raise AttributeError(f"module 'moe' has no attribute '{name}'")
    return resolve_name(f"moe.routers.base:{name}" if name == "Router" else f"moe.api:{name}")


def __dir__() -> list[str]:
    return __all__
