"""On a device without the libraries of the workshop: one line that names the extra, no trace."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from cdl_edge import api
from cdl_edge.errors import InputError
from cdl_edge.extras import EXTRAS, extra_of

VERBS = {
    "train": "train --data digits --out x",
    "pretrain": "pretrain --data digits --arch student --out x",
    "export": "export x --out y",
    "calibrate": "calibrate x --out y",
    "quickstart": "quickstart --out x",
}
WITHOUT = """
import sys
for name in {modules!r}:
    sys.modules[name] = None  # an import of it fails as if it were not there
from cdl_edge.cli import main
for words in {commands!r}:
    sys.argv = ["cdl-edge", *words.split()]
    try:
        main()
    except SystemExit as stop:
        print("exit", stop.code)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """verb -> (exit code, what it says on stderr) where the extra `train` is missing."""
    code = WITHOUT.format(modules=EXTRAS["train"], commands=[*VERBS.values(), "doctor", "report x --out y.html"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path_factory.mktemp("device")
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_one_line_names_the_extra(answers):
    errors = [line for line in answers.stderr.splitlines() if line.startswith("error: `")]
    assert [re.match(r"error: `(\w+)`", line)[1] for line in errors] == list(VERBS)
    for line in errors:
        assert "of the extra `train`: pip install 'cdl-edge[train]'" in line
    codes = [line for line in answers.stdout.splitlines() if line.startswith("exit")]
    assert codes[: len(VERBS)] == ["exit 2"] * len(VERBS)


def test_what_needs_no_workshop_runs(answers):
    """`doctor` answers; `report` asks for its folder, not for a library."""
    assert answers.stdout.splitlines()[-2:] == ["exit 0", "exit 2"]
    assert "x: neither a finished run nor a bundle" in answers.stderr


def test_a_module_of_no_extra_is_a_bug():
    assert extra_of(ModuleNotFoundError("No module named 'nonsense'", name="nonsense")) is None
    assert extra_of(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")) == "train"


def test_the_package_itself_is_the_runtime_alone(root):
    text = (root / "pyproject.toml").read_text()
    base = text.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    assert set(re.findall(r'"([\w-]+)[><=]', base)) == {"click", "numpy", "pillow", "onnxruntime", "jinja2"}
    assert "platform_release" not in base  # the same on every device
    for extra in EXTRAS:
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE)
    names = {"sklearn": "scikit-learn", "python_multipart": "python-multipart", "cv2": "opencv-python-headless"}
    for extra, modules in EXTRAS.items():
        listed = text.split(f"\n{extra} = [", 1)[1].split("]", 1)[0]
        assert all(f'"{names.get(m, m)}>=' in listed for m in modules), extra
    assert '"cdl-edge[train,openvino,serve,sign,watch]"' in text  # who develops has all of it


def test_no_text_installs_from_an_index_that_has_it_not(root):
    """The name is not published: the wheel or the sources, until a person publishes it."""
    rooms = ("measurement", "runtime", "server", "updates")
    pages = [*root.glob("docs/*.md"), *root.glob("deploy/*"), *(p for r in rooms for p in (root / r).rglob("*.py"))]
    for page in (p for p in pages if p.is_file()):
        text = page.read_text("utf-8")
        assert not re.search(r"pip install (--upgrade )?cdl-edge\b", text), page


def test_a_preview_without_the_servers_packages(tmp_path, monkeypatch):
    """`watch` alone needs none of them; some of those that the page needs are no names of extras."""
    monkeypatch.setitem(sys.modules, "anyio", None)
    with pytest.raises(InputError, match=r"(?s)server's packages .*anyio.*cdl-edge\[serve\]"):
        api.watch(tmp_path, tmp_path, preview=0)
