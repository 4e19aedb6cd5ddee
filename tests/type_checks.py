"""Check types and shapes in the tests as `jaxtyping.jaxtyped` does, in a fraction of its time.

For each call, jaxtyped binds the arguments to the signature and checks them twice. That is a quarter of the time of the
tests, although most functions have no shapes in their annotations, and the shapes of this project name no arguments.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType
from typing import Any, ForwardRef, get_args

import jaxtyping

original = jaxtyping.jaxtyped


def jaxtyped(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """Decorate a function or a dataclass as `jaxtyping.jaxtyped` does; without one, return a decorator.

    A function without shapes is checked by the type checker alone. Names that are not defined yet, generators and
    dataclasses are left to jaxtyping.
    """
    if function is None:
        return partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(function) and not dataclasses.is_dataclass(function):
        return function
    parts = [*parts_of(getattr(function, "__annotations__", {}).values())]
    undefined = any(isinstance(part, str | ForwardRef) for part in parts)
    if undefined or not isinstance(function, FunctionType) or inspect.isgeneratorfunction(function):
        return original(function, typechecker=typechecker)
    checked = typechecker(function)
    if not any(inspect.isclass(part) and issubclass(part, jaxtyping.AbstractArray) for part in parts):
        return checked

    @wraps(function)
    def in_own_context(*args: Any, **kwargs: Any) -> Any:
        with original("context"):
            return checked(*args, **kwargs)

    return in_own_context


def parts_of(annotations: Any) -> Any:
    """Yield all parts of annotations: of `list[int]`, `list[int]` and `int`. The texts in `Literal` count too."""
    for each in annotations:
        yield each
        yield from parts_of(each if isinstance(each, list) else get_args(each))
