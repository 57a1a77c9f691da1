"""The program in C++ sees the pixels that Python sees, and gives its answers."""

import io
import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdl_edge.images import Preprocessing
from cdl_edge.runtime import load
from cdl_edge.runtime.predict import predict

SOURCE = Path(__file__).parent.parent / "examples" / "cpp"
pytestmark = pytest.mark.slow


def runtime_folder(folder):
    """A folder with include/ and lib/ of ONNX Runtime: headers as they are installed here, the library of the wheel.

    ONNXRUNTIME_ROOT names an unpacked release, or a folder where headers alone are (the wheel has none).
    """
    given = os.environ.get("ONNXRUNTIME_ROOT", "")
    places = [Path(given, "include")] if given else []
    places += [Path(p, "include") for p in ("/usr", "/usr/local")]
    headers = [h for p in places for h in (p, p / "onnxruntime") if (h / "onnxruntime_cxx_api.h").is_file()]
    if not headers:
        pytest.skip("no headers of ONNX Runtime: apt-get install libonnxruntime-dev, or set ONNXRUNTIME_ROOT")
    capi = Path(find_spec("onnxruntime").submodule_search_locations[0]) / "capi"
    (library,) = [*capi.glob("libonnxruntime.so.[0-9]*")][:1] or pytest.skip("the wheel has no shared library here")
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(headers[0])
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "lib" / name).symlink_to(library)
    return folder


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """classify, built without a warning."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here: apt-get install cmake g++")
    folder = tmp_path_factory.mktemp("cpp")
    root = runtime_folder(folder / "onnxruntime")
    configured = subprocess.run(
        ["cmake", "-S", SOURCE, "-B", folder / "build", f"-DONNXRUNTIME_ROOT={root}", "-DCMAKE_CXX_FLAGS=-Werror"],
        capture_output=True,
        text=True,
    )
    for package, words in {
        "nlohmann-json3-dev": "JSON_INCLUDE",
        "libjpeg-dev": "Could NOT find JPEG",
        "zlib1g-dev": "Could NOT find ZLIB",
    }.items():
        if configured.returncode and words in configured.stderr:
            pytest.skip(f"a library is missing: apt-get install {package}")
    assert configured.returncode == 0, configured.stderr
    built = subprocess.run(["cmake", "--build", folder / "build"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "build" / "classify"


def run(program, *words):
    return subprocess.run([program, *map(str, words)], capture_output=True)


def jpegs(folder):
    """Photographs as cameras and programs write them: sizes, subsampling, grey, progressive, turned."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    kinds = [
        *(((w, h), {}) for w, h in ((500, 375), (375, 500), (64, 64), (17, 23), (1023, 767), (2000, 300), (3, 900))),
        *(((900, 611), {"subsampling": s, "quality": 60}) for s in (0, 1, 2)),
        ((901, 613), {"progressive": True}),
        *(((333, 222), {"orientation": o}) for o in range(1, 9)),
        ((333, 222), {"orientation": 6, "byteorder": ">"}),
        ((410, 300), {"mode": "L"}),
        ((300, 200), {"xmp": 8}),
    ]
    for i, ((width, height), how) in enumerate(kinds):
        coarse = rng.integers(0, 256, (max(1, height // 6), max(1, width // 6), 3), dtype=np.uint8)
        picture = (
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(how.pop("mode", "RGB"))
        )
        if "orientation" in how:
            exif = Image.Exif()
            exif.endian = how.pop("byteorder", "<")
            exif[0x010F], exif[0x0112] = "a camera", how.pop("orientation")
            how["exif"] = exif
        if "xmp" in how:
            how["xmp"] = f'<x tiff:Orientation="{how["xmp"]}"/>'.encode()
        picture.save(folder / f"{i:02d}.jpg", **how)
    return sorted(folder.iterdir())


RULES = [
    ("cut", "bicubic", 32, 32),
    ("cut", "bilinear", 32, 37),
    ("cut", "nearest", 32, 36),
    ("pad", "bicubic", 48, 48),
    ("pad", "bilinear", 33, 33),
    ("squash", "bicubic", 32, 32),
    ("squash", "bilinear", 40, 40),
    ("cut", "bicubic", 224, 256),
]


@pytest.fixture
def bundle_of(tmp_path, make_bundle):
    """make(Preprocessing) -> a tiny bundle with a self-test that decodes so."""

    def make(preprocessing, name="bundle", compressed=True, wrong=0.0, **changes):
        side = preprocessing.size
        shape = {"input": {"name": "images", "shape": [1, side, side, 3], "dtype": "uint8"}}
        shape["input"]["preprocessing"] = preprocessing.to_json()
        plain = make_bundle(f"{name}-plain", {"side": side}, **shape, **changes)
        images = np.random.default_rng(1).integers(0, 256, (5, side, side, 3), dtype=np.uint8)
        with load(plain) as runner:
            logits = runner.infer(images) + np.float32(wrong)
        stored = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(stored, images=images, logits=logits)
        files = {n: (plain.path / n).read_bytes() for n in plain.manifest.files} | {"selftest.npz": stored.getvalue()}
        document = {**json.loads((plain.path / "manifest.json").read_text()), "selftest": "selftest.npz"}
        from cdl_edge.artefacts.bundle import write_bundle

        return write_bundle(tmp_path / name, document, files)

    return make


@pytest.mark.parametrize(("rule", "interpolation", "size", "resize"), RULES)
def test_the_pixels_are_those_of_python(rule, interpolation, size, resize, program, bundle_of, tmp_path):
    preprocessing = Preprocessing(size, resize, interpolation, resize_rule=rule)
    bundle = bundle_of(preprocessing)
    files = jpegs(tmp_path / "photos")
    done = run(program, bundle.path, "--pixels", *files)
    assert done.returncode == 0, done.stderr
    got = np.frombuffer(done.stdout, np.uint8).reshape(len(files), size, size, 3)
    wanted = np.stack([preprocessing.read(f) for f in files])
    off = {f.name: int(np.abs(g.astype(int) - w).max()) for f, g, w in zip(files, got, wanted, strict=True)}
    assert set(off.values()) == {0}, off


def test_a_damaged_file_is_refused_as_python_refuses_it(program, bundle_of, tmp_path):
    bundle = bundle_of(Preprocessing(32, 32))
    (photo, *_) = jpegs(tmp_path / "photos")
    whole = photo.read_bytes()
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    for file in (cut, text, tmp_path / "missing.jpg"):
        done = run(program, bundle.path, file)
        assert done.returncode == 2 and done.stdout == b""
        assert done.stderr.decode().splitlines()[-1].startswith(f"error: {file}: ")


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", ["top-k", "weighted"])
def test_the_answers_are_those_of_python(kind, compressed, program, bundle_of, tmp_path):
    bundle = bundle_of(Preprocessing(64, 72), compressed=compressed, selection={"kind": kind, "k": 2, "blocks": [0, 1]})
    files = jpegs(tmp_path / "photos")
    done = run(program, bundle.path, "--json", *files)
    assert done.returncode == 0, done.stderr
    with load(bundle) as runner:
        wanted = predict(runner, files)["predictions"]
        logits = runner.infer(np.stack([bundle.preprocessing.read(f) for f in files]))
    for line, prediction, expected in zip(done.stdout.splitlines(), wanted, logits, strict=True):
        answer = json.loads(line)
        assert np.abs(np.array(answer["logits"]) - expected).max() <= 1e-4
        assert answer["prompts"] == prediction["prompts"]["selected"]
        assert (answer["label"], answer["index"]) == (prediction["label"], prediction["index"])
        assert abs(answer["probability"] - prediction["probability"]) < 1e-5
    shown = run(program, bundle.path, files[0]).stdout.decode()
    selected = str(wanted[0]["prompts"]["selected"]).replace(" ", "")
    assert shown == f"{files[0]}: {wanted[0]['label']} ({100 * wanted[0]['probability']:.3g} %)  prompts {selected}\n"


def test_a_trained_bundle_proves_itself(program, cli, image_folder, short_options, tmp_path):
    """CODA on a ViT, exported as everybody does it: every picture of its self-test within 1e-4, and photographs too."""
    image_folder(tmp_path / "photos", unsplit=dict.fromkeys(("apple", "cherry", "pear", "plum"), 6))
    options = ["--learner", "coda", "--tasks", "2", "--threads", "1", *short_options, "--out", tmp_path / "run"]
    assert cli("train", "--data", f"folder:{tmp_path}/photos", *options).code == 0
    assert cli("export", tmp_path / "run", "--out", tmp_path / "bundle", "--images", "4").code == 0
    files = jpegs(tmp_path / "jpegs")
    done = run(program, tmp_path / "bundle", "--json", *files)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.split()[-1]) <= 1e-4
    with load(tmp_path / "bundle") as runner:
        logits = runner.infer(np.stack([runner.bundle.preprocessing.read(f) for f in files]))
        selected = [p["prompts"]["selected"] for p in predict(runner, files)["predictions"]]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert np.abs(np.array([a["logits"] for a in answers]) - logits).max() <= 1e-4
    assert [a["prompts"] for a in answers] == selected


def test_a_machine_that_computes_otherwise_is_told(program, bundle_of, tmp_path):
    bundle = bundle_of(Preprocessing(32, 32), wrong=0.01)
    done = run(program, bundle.path, *jpegs(tmp_path / "photos"))
    assert done.returncode == 1 and done.stdout == b""
    assert "5 pictures" in done.stderr.decode() and "failed:" in done.stderr.decode()


def test_bad_input_is_one_line(program, bundle_of, tmp_path):
    old = bundle_of(Preprocessing(32, 32, decoder=1))
    for words, told in {
        (): "usage",
        (tmp_path / "nothing",): "nothing",
        (old.path,): "decoder rule 1",
    }.items():
        done = run(program, *words)
        assert done.returncode == 2 and done.stdout == b""
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("error: ") and told in line
