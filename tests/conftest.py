"""What every test shares: one thread, no network, and the small things to work on (images, backbones, the command)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before anything imports torch or huggingface_hub, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "cdl-edge-tests-no-hub")

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Give every test the fixtures of these files, which several folders share."""
    for name in ("tiny_bundles.py", "teachable_bundles.py", "command_lines.py"):
        path = Path(__file__).with_name(name)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if path.is_file() and spec is not None and spec.loader is not None:
            module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            config.pluginmanager.register(module, path.stem)


def choose_quick_cases(cases: list[Any]) -> None:
    """Mark as slow every case of a parametrized test that its marker `quick("id", ...)` does not name.

    So the default suite has a representative of each kind, and `make test-all` the whole grid. Raises: CollectError for
    an id that no case has, since a grid that changes would otherwise leave the default suite unnoticed.
    """
    marker = cases[0].get_closest_marker("quick")
    if marker is None:
        return
    ids = {case.callspec.id for case in cases}
    if not marker.args or set(marker.args) - ids:
        raise pytest.Collector.CollectError(
            f"{cases[0].originalname}: quick{marker.args} names no case, or one that is not in {sorted(ids)}"
        )
    for case in cases:
        if case.callspec.id not in marker.args:
            case.add_marker(pytest.mark.slow)


def bytes_saturate() -> bool:
    """Whether ONNX Runtime's 8-bit products saturate here: x86 without VNNI adds pairs of products in 16 bits."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx2" in flags and "vnni" not in flags


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would measure the processor instead of the code."""
    if item.get_closest_marker("vnni") and bytes_saturate():
        pytest.skip("8-bit products saturate on this processor")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Any:
    """All cases of a test function at once, before anything is selected."""
    made = yield
    if isinstance(made, list) and made and isinstance(made[0], pytest.Function):
        choose_quick_cases(made)
    return made


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Secrets that tests make are kept in a folder of theirs."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root, which is the package."""
    return ROOT


def write_photo(path: Path, seed: int, size: tuple[int, int] = (24, 20), colour: int | None = None) -> Path:
    """A picture of one random colour with noise; `colour` (0..2) makes that channel the brightest."""
    rng = np.random.default_rng(seed)
    base = rng.integers(20, 120, 3)
    if colour is not None:
        base[colour] = 220
    pixels = np.clip(base + rng.integers(-20, 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def photo() -> Callable[..., Path]:
    """`write_photo(path, seed, size, colour)`."""
    return write_photo


def write_folder(root: Path, **parts: dict[str, int]) -> Path:
    """write_folder(root, train={"cat": 3}, val={"cat": 1}): PNG pictures; the class decides the brightest channel."""
    for part, classes in parts.items():
        for c, (name, count) in enumerate(classes.items()):
            folder = root / part / name if part != "unsplit" else root / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                write_photo(folder / f"{i:03d}.png", seed=1000 * c + i + (part == "val") * 500_000, colour=c % 3)
    return root


@pytest.fixture(scope="session")
def image_folder() -> Callable[..., Path]:
    """`write_folder`; unsplit={...} puts the classes into the root."""
    return write_folder


@pytest.fixture(scope="session")
def slow_jpeg() -> bytes:
    """30 kB that keep a decoder busy for seconds: 36 megapixels in 64 scans, of which little is there."""
    stream = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(stream, "JPEG", progressive=True)
    whole = bytearray(stream.getvalue())
    at = whole.index(b"\xff\xc2") + 5
    whole[at : at + 4] = struct.pack(">HH", 6_000, 6_000)
    last = whole.rindex(b"\xff\xda")
    return bytes(whole[:-2] + whole[last:-2] * (64 - whole.count(b"\xff\xda")) + whole[-2:])


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """make(name="student", width=16, ...) -> "file:..." of a ViT with weights large enough to matter.

    16 x 16 pixels, 4 patches, 6 blocks: CODA's five and one more.
    """
    made: dict[tuple[Any, ...], str] = {}
    folder = tmp_path_factory.mktemp("weights")

    def make(name: str = "student", width: int = 16, depth: int = 6, heads: int = 2, seed: int = 0) -> str:
        key = (name, width, depth, heads, seed)
        if key not in made:
            import torch

            from cdl_edge.images import Preprocessing
            from cdl_edge.train.backbone import Architecture, save_backbone

            architecture = Architecture(16, 8, width, depth, heads, 3)
            generator = torch.Generator().manual_seed(seed)
            model = architecture.build()
            for key_, value in model.state_dict().items():
                noise = torch.randn(value.shape, generator=generator)
                is_scale = "norm" in key_ and key_.endswith("weight")
                value.copy_(1 + 0.3 * noise if is_scale else noise * 1.5 / width**0.5)
            path = folder / ("-".join(map(str, key)) + ".safetensors")
            preprocessing = Preprocessing(16, 18, "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
            save_backbone(path, architecture, model.eval(), preprocessing, {"trained_on": "nothing"})
            made[key] = f"file:{path}"
        return made[key]

    return make


@dataclass(frozen=True)
class Answer:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout."""
        return json.loads(self.out.strip().splitlines()[-1])

    def assert_refused(self, *words: str) -> None:
        """Exit 2, one message on stderr with these words, no trace, nothing on stdout."""
        assert self.code == 2, (self.code, self.err)
        assert "Traceback" not in self.err
        assert sum(line.lower().startswith("error:") for line in self.err.splitlines()) == 1, self.err
        for word in words:
            assert word in self.err, self.err
        assert self.out == ""


class Stream(io.TextIOWrapper):
    """A text stream in memory that main() can reconfigure."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self) -> str:
        """Everything written."""
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode()


def run_command(*arguments: object) -> Answer:
    """`cdl-edge ARGUMENTS...` in this process; an exception other than SystemExit is a bug and comes through."""
    from cdl_edge.cli import main

    out, err = Stream(), Stream()
    before = sys.argv
    sys.argv = ["cdl-edge", *map(str, arguments)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    return Answer(0 if code is None else code, out.text(), err.text())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Answer]:
    """`run_command`."""
    return run_command


@pytest.fixture(scope="session")
def short_training(tiny_vit: Callable[..., str]) -> dict[str, Any]:
    """Fields of a TrainConfig that make it short: tiny backbones, as many steps as the epochs have, few features.

    By default a task has 200 steps and RanPAC 2,000 features: a minute of one core for what these show as well.
    """
    pair = {"teacher": tiny_vit("teacher", 24), "student": tiny_vit("student", 16)}
    return {**pair, "epochs": 1, "min_steps": 0, "random_features": 64}


def as_options(settings: dict[str, Any]) -> list[str]:
    """{"batch_size": 8} -> ["--batch-size", "8"]."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="session")
def fast_options(short_training: dict[str, Any]) -> list[str]:
    """Options of a training run that takes a second: digits, two tasks, and `short_training`."""
    return as_options(
        {**short_training, "data": "digits", "tasks": 2, "epochs": 2, "limit_per_class": 6, "batch_size": 16}
    )


@pytest.fixture(scope="session")
def short_options(short_training: dict[str, Any]) -> list[str]:
    """`short_training` for the command line."""
    return as_options(short_training)
