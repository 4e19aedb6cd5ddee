"""Tests of the typed configuration: keys that change nothing in a run are not part of its identity."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from moe.checks import ConfigError
from moe.config.keys import OFF, flatten, is_free
from moe.config.options import CONF, GROUPS, complete
from moe.config.schema import Config
from moe.launch.command_line import read_cells


@pytest.mark.parametrize("name", complete("router"))
def test_a_router_is_quiet_about_defaults_that_it_ignores(name: str) -> None:
    [cell] = read_cells([f"router={name}"]) or []
    assert cell.ignored >= {"drop"}
    off = cell.ignored & OFF.keys()
    assert {key: getattr(cell.config, key) for key in off} == {key: OFF[key] for key in off}
    assert not cell.ignored & cell.identity().keys()
    [spelled] = read_cells([f"router={name}", *(f"{key}=0" for key in off - {"drop", "capacity"})]) or []
    assert cell == spelled._replace(overrides=cell.overrides)


def test_free_keys_change_neither_the_folder_nor_the_identity(tmp_path: Path) -> None:
    plain, free = (
        (read_cells([f"out={tmp_path}", *extra]) or [])[0]
        for extra in ([], ["threads=2", "save_every=7", "logger.mode=disabled", f"data.cache={tmp_path}"])
    )
    assert plain.folder == free.folder
    assert plain.config.identity() == free.config.identity()


def test_the_keys_left_out_of_folder_names_are_the_free_keys() -> None:
    """The experiment is left out too, because it is the name of the folder above."""
    content = yaml.safe_load((CONF / "config.yaml").read_text())
    left_out = content["hydra"]["job"]["config"]["override_dirname"]["exclude_keys"]
    [cell] = read_cells([]) or []
    keys = {*GROUPS, *(field.name for field in fields(Config)), *flatten(asdict(cell.config))}
    assert sorted(left_out) == sorted(["experiment", *(key for key in keys if is_free(key))])


def test_without_the_variable_home_the_cache_is_in_the_home_directory_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A missing HOME is no error where the system knows the home directory, and one line where it does not."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    [cell] = read_cells([]) or []
    assert cell.config.data.cache == "~/.cache/moe-routing"
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(
        ConfigError, match=r"^data\.cache=~/\.cache/moe-routing: must be a path; there is no home for ~$"
    ):
        read_cells([])
