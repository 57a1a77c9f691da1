"""The default suite and the whole one: what `quick` leaves out is slow, and `make test-all` leaves nothing out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GRID = """
import pytest

@pytest.mark.quick("a-y", "b-x")
@pytest.mark.parametrize("letter", ["x", "y"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_grid(name, letter):
    pass

def test_plain():
    pass
"""
CASES = [f"test_grid[{name}-{letter}]" for letter in "xy" for name in "ab"]


def collected(folder, *options):
    """(tests that pytest would run, all that it printed), of the files in a folder with this project's conftest.py."""
    shutil.copy(Path(__file__).parent / "conftest.py", folder)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--import-mode=importlib", "--rootdir", folder]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder)
    return re.findall(r"::(\S+)$", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.slow
def test_only_the_named_cases_of_a_grid_are_in_the_default_suite(tmp_path):
    (tmp_path / "test_it.py").write_text(GRID)
    assert sorted(collected(tmp_path, "-m", "not slow")[0]) == ["test_grid[a-y]", "test_grid[b-x]", "test_plain"]
    assert sorted(collected(tmp_path, "-m", "")[0]) == sorted([*CASES, "test_plain"])


@pytest.mark.slow
def test_a_case_that_is_not_there_is_an_error(tmp_path):
    (tmp_path / "test_it.py").write_text(GRID.replace('"b-x"', '"b-z"'))
    found, text = collected(tmp_path)
    assert found == [] and "test_grid: quick('a-y', 'b-z')" in text


def test_every_target_selects_what_it_says(root):
    makefile = (root / "Makefile").read_text("utf-8")
    recipes = dict(re.findall(r"^([\w-]+):.*\n\t(.*)$", makefile, re.MULTILINE))
    assert recipes["test"] == "$(PYTEST)" and recipes["test-all"] == '$(PYTEST) -m ""'
    assert '"-m", "not slow"' in (root / "pyproject.toml").read_text("utf-8")
    script = (root / ".ci" / "run").read_text("utf-8")
    steps = re.findall(r"^(?:timeout .*)?make (\S+)(?: \|\| \{)?$", script, re.MULTILINE)
    assert steps == ["check", "test", "quickstart", "test-all"]
