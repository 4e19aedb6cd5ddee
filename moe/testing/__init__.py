"""Hold a router to its contract, the docstring of `moe.routers.base.Router`: `check_router(MyRouter, k=2)`.

Each law is a function in `LAWS`. With pytest, one test for each law reads best:

    @pytest.mark.parametrize("law", moe.testing.LAWS)
    def test_my_router(law: str) -> None:
        moe.testing.check_law(law, MyRouter, k=2)
"""

from typing import Any

import torch

from moe.checks import ConfigError, check_settings, first_line, require, unknown
from moe.config.classes import locate
from moe.config.options import use
from moe.routers.base import Router
from moe.testing import decision, declared, learning, unusual  # noqa: F401 (each adds its laws)
from moe.testing.inputs import E
from moe.testing.law import LAWS

__all__ = ["LAWS", "check_law", "check_router"]


def check_router(target: type | str, /, **settings: Any) -> None:
    """Check all laws of the contract on a router.

    target: a class, or its dotted name. settings: its keyword arguments, as in its yaml file. Raises AssertionError,
    which names the law, what is wrong, and what to do, and ConfigError for settings that do not fit the class.
    """
    for law in LAWS:
        check_law(law, target, **settings)


def check_law(law: str, target: type | str, /, **settings: Any) -> None:
    """Check one law, a key of `LAWS`, like `check_router`. The random numbers of the caller stay as they are."""
    if not isinstance(law, str) or law not in LAWS:
        raise unknown("law", str(law), LAWS)
    if isinstance(target, str):
        use()  # the class may be in a folder that MOE_SEARCH_PATH names
    kind = target if isinstance(target, type) else locate(target, "router", trusted=True)
    require(issubclass(kind, Router), "target", kind.__name__, "a class that derives from moe.Router, or its name")
    settings = check_settings(settings, kind, "router", positional=2)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            LAWS[law](lambda dim: kind(dim, E, **settings))
        except ConfigError:
            raise
        except AssertionError as error:
            raise AssertionError(f"{kind.__name__} breaks the law {law}: {error}") from None
        except (Exception, SystemExit) as error:  # the router may raise anything
            what = f"it raises {type(error).__name__}: {first_line(error)}"
            raise AssertionError(f"{kind.__name__} breaks the law {law}: {what}") from error
