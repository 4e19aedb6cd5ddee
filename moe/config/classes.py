"""Find and build the classes that settings name as `_target_`: of this project, or of somebody else."""

import inspect
import pkgutil
from typing import Any, cast

from moe.checks import ConfigError, check_settings, described, first_line, require
from moe.config.plugins import plugins

# The class from which a `_target_` must derive, by the key of the configuration that names it.
BASES = {
    "router": "moe.routers.base.Router",
    "schedule": "moe.training.schedules.Schedule",
    "data.source": "moe.data.documents.Source",
    "adapter": "moe.adapters.base.Adapter",
    "adapter.router": "moe.routers.base.Router",
}


def locate(path: object, key: str, *, trusted: bool) -> type[Any]:
    """Return the class that the `_target_` at `key` names. All such names pass through this function.

    The class must derive from the base class of `key`, see `BASES`. A name that is not `trusted`, because it comes from
    a file that a stranger may have written, must also lie in the package of that base class. This is checked before
    anything is imported. Raises ConfigError.
    """
    base_name = BASES[key]
    package, _, kind = base_name.rpartition(".")
    package = package.rpartition(".")[0]
    module = path.rpartition(".")[0] if isinstance(path, str) else ""
    where = f"{key}._target_"
    require(bool(module) and str(path).replace(".", "a").isidentifier(), where, path, f"the dotted name of a {kind}")
    advice = f"The module {module} is imported only in Python and only if you trust this file: trust_remote_code=True"
    allowed = f"a class of {package}. {advice}; see docs/security.md"
    require(trusted or module.startswith(f"{package}."), where, path, allowed)
    try:
        plugins([module.partition(".")[0]])  # so that it is clear which code is imported
    except ConfigError as error:
        raise ConfigError(f"{where}={path}: {error}") from error
    base = _imported(base_name, base_name)
    found = _imported(str(path), where)
    require(isinstance(found, type) and issubclass(found, base), where, path, f"a class that derives from {base_name}")
    return cast(type[Any], found)


def _imported(path: str, where: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return pkgutil.resolve_name(f"{module}:{name}")
    except (Exception, SystemExit) as error:  # the module may be anybody's, and raise anything
        reason = described(error) if isinstance(error, SystemExit) else first_line(error)
        raise ConfigError(f"{where}={path}: must be a class that can be imported ({reason})") from error


def parameter_defaults(path: object, key: str) -> dict[str, Any]:
    """Return the default of each parameter of the class that the `_target_` at `key` names, if it has one.

    The class is imported, so the user must have written its name. Raises ConfigError like `locate`.
    """
    parameters = inspect.signature(locate(path, key, trusted=True)).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def build(spec: Any, key: str, *args: Any, trusted: bool = False) -> Any:
    """Create an object of the class `spec["_target_"]` from `args`, and the other entries of `spec` as keywords.

    Names and types of the keywords are checked first. `key` is the place of the spec in the configuration, such as
    "router"; it decides which classes are allowed. `trusted`: the user wrote the spec, see `locate`. Raises
    ConfigError.
    """
    if not isinstance(spec, dict) or "_target_" not in spec:
        raise ConfigError(f"{key}={spec}: must name its class as {key}._target_")
    target = locate(spec["_target_"], key, trusted=trusted)
    values = {name: value for name, value in spec.items() if name != "_target_"}
    values = check_settings(values, target, key, positional=len(args))
    try:
        return target(*args, **values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(first_line(error)) from error
    except (Exception, SystemExit) as error:  # the class may be anybody's, and raise anything
        if isinstance(error, OSError) and key == "data.source":  # the caller names the argument that has the path
            raise
        reason = first_line(error) if isinstance(error, TypeError) else described(error)
        raise ConfigError(f"{key}._target_={spec['_target_']}: cannot be built: {reason}") from error
