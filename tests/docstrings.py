"""Run the examples in docstrings."""

import doctest
from types import ModuleType


def run_examples(module: ModuleType) -> list[str]:
    """Run the examples in the docstrings of a module and its functions; return the names of those that have some.

    `doctest.testmod` would not find functions that jaxtyping has wrapped, as it wraps all of them in tests.
    """
    runner, seen = doctest.DocTestRunner(), []
    own = {name: thing for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__}
    for name, thing in {"module": module, **own}.items():
        if ">>> " in (thing.__doc__ or ""):
            test = doctest.DocTestParser().get_doctest(thing.__doc__, dict(vars(module)), name, module.__file__, 0)
            failures: list[str] = []
            runner.run(test, out=failures.append)
            assert not failures, "".join(failures)
            seen.append(name)
    return seen
