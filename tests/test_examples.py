"""Every example runs, on tiny data, and does what its docstring says."""

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory, image_folder, cli, short_options):
    """photos, and two bundles with one backbone: of a run and of a later one."""
    folder = tmp_path_factory.mktemp("examples")
    image_folder(folder / "photos", unsplit=dict.fromkeys(("apple", "cherry", "pear", "plum"), 6))
    for seed, name in enumerate(("fruit", "fruit-new")):
        options = ["--learner", "coda", "--tasks", "2", "--seed", seed, "--threads", "1", *short_options]
        options += ["--out", folder / name]
        assert cli("train", "--data", f"folder:{folder}/photos", *options).code == 0
        assert cli("export", folder / name, "--out", folder / "bundles" / name, "--images", "4").code == 0
    return folder


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_short_and_told(path):
    text = path.read_text("utf-8")
    told = ast.get_docstring(ast.parse(text))
    assert f"    python examples/{path.name} " in told
    assert len(text.splitlines()) < 60
    assert path.stem in Path(__file__).read_text("utf-8")


@pytest.mark.slow
def test_classify_folder_needs_no_torch(place):
    (place / "photos" / "broken.jpg").write_bytes(b"no picture")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); import classify_folder as example\n"
        f"assert example.main({str(place / 'bundles/fruit')!r}, {str(place / 'photos')!r}) == 24\n"
        "assert not {'torch', 'onnx', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (place / "photos" / "broken.jpg").unlink()
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 24 and {len(row) for row in rows} == {4}
    assert {row[1] for row in rows} <= {"apple", "cherry", "pear", "plum"}
    assert "broken.jpg: not a readable image" in done.stderr
    assert "24 of 25 pictures" in done.stderr


@pytest.mark.slow
def test_video_stream(place, capsys):
    cost = load("video_stream").main(str(place / "bundles/fruit"), str(place / "photos"), "60")
    assert list(cost) == ["exact", "pinned", "sticky"]
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "{'query': 60}, 100.0 % as exact" in lines["exact"]
    assert "{'pinned': 60}" in lines["pinned"]
    assert "'reused'" in lines["sticky"] and "100.0 % as exact" in lines["sticky"]


@pytest.mark.slow
def test_train_and_export(tmp_path, capsys):
    run, bundle = str(tmp_path / "run"), str(tmp_path / "bundle")
    assert load("train_and_export").main(run, bundle, "1", limit=8, images=20) < 1e-4
    assert "average accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_update_device(place, tmp_path, capsys):
    device = tmp_path / "device"
    shutil.copytree(place / "bundles/fruit", device)
    before, updated, after = load("update_device").main(
        str(place / "bundles/fruit"), str(place / "bundles/fruit-new"), str(device)
    )
    assert before == after != updated
    assert f"* {updated}" in capsys.readouterr().out


@pytest.mark.slow
def test_int8(place, tmp_path, capsys):
    off = load("int8").main(str(place / "bundles/fruit"), str(tmp_path / "int8"), "2")
    assert off["fp32"] < 1e-4 < off["int8"] < 0.2
    assert "recommended" in capsys.readouterr().out
