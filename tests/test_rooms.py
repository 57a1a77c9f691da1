"""Who may import whom, and what no file may do: ARCHITECTURE.md as a test."""

import ast
import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import cdl_edge

ROOT = Path(__file__).parent.parent
DEVICE = ("runtime", "updates", "server", "streams", "measurement")
"rooms that a device installs: they never see torch"
ROOMS = ("artefacts", "calibrate", "export", "report", "sweep", "train", *DEVICE)
SOURCES = sorted(
    p.relative_to(ROOT).as_posix()
    for p in [*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))]
)
BASE = (
    "arrays.py",
    "cores.py",
    "extras.py",
    "class_statistics.py",
    "errors.py",
    "decoder.py",
    "decoders.py",
    "heads.py",
    "log.py",
    "images.py",
    "jetson.py",
    "machine.py",
    "files.py",
    "heartbeat.py",
    "data.py",
    "scored.py",
    "folders.py",
    "splits.py",
    "ranges.py",
    "packing.py",
)
"what every room stands on"
SERVER = {"anyio", "httptools", "python_multipart", "starlette", "uvicorn"}
HEAVY = {"torch", "timm", "onnx", "onnxruntime", "sklearn", "safetensors", "torchvision", "tensorrt", "openvino"}

MAY_IMPORT = {
    "artefacts": {"artefacts"},
    "train": {"train", "artefacts"},
    "runtime": {"runtime", "artefacts"},
    "updates": {"updates", "runtime", "artefacts"},
    "server": {"server", "updates", "runtime", "artefacts"},
    "streams": {"streams", "runtime", "artefacts"},
    "measurement": {"measurement", "runtime", "artefacts"},
    "calibrate": {"calibrate", "runtime", "artefacts"},
    "export": {"export", "train", "measurement", "runtime", "artefacts"},
    "report": {"report", "artefacts"},
    "sweep": {"sweep", "train", "report", "artefacts"},
}
"room -> rooms it may import; everybody may import the root's modules but those that call rooms"
LARGEST = 0.25
"share of the product that a room may have"
CALLERS = {"api", "api_packs", "cli", "cli_device", "cli_enrol", "cli_pack", "cli_watch", "quickstart"}
"root modules that call rooms: for no room to import"


@functools.cache
def text_of(source):
    return (ROOT / source).read_text()


@functools.cache
def tree_of(source):
    """The syntax of a file; a dozen tests look at all of them."""
    return ast.parse(text_of(source))


@functools.cache
def imports(source):
    """(level 0: top-level package, or module path below cdl_edge) of every import in a file, also inside functions."""
    outside, inside = set(), set()
    parts = source.split("/")[:-1]
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - (node.level - 1)]
            assert len(parts) >= node.level - 1, f"{source}: imports from above the package"
            path = base + ((node.module or "").split(".") if node.module else [])
            if path:
                inside.add("/".join(path))
            else:  # from . import x
                inside |= {alias.name for alias in node.names}
    return outside, inside


def room_of(module):
    return module.split("/")[0] if module.split("/")[0] in ROOMS else None


def test_the_sources_were_found():
    assert {*BASE, "cli.py", "train/loop.py", "train/learners/coda.py", "runtime/backends/onnxruntime.py"} <= {*SOURCES}


@pytest.mark.parametrize("source", SOURCES)
def test_inside_the_package_imports_are_relative(source):
    # `import runtime` works from the root under a wrong name, and makes every class twice.
    outside, _ = imports(source)
    if source == "__init__.py":
        outside -= {"cdl_edge"}  # pytest imports it under the name of the folder
    siblings = {p.stem for p in ROOT.glob("*.py")} | set(ROOMS) | {"cdl_edge", "tests", "benchmarks"}
    assert outside & siblings == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_it_may(room):
    for source in SOURCES:
        if source.startswith(f"{room}/"):
            _, inside = imports(source)
            rooms = {r for r in map(room_of, inside) if r}
            assert rooms <= MAY_IMPORT[room], f"{source} imports {rooms - MAY_IMPORT[room]}"
            roots = {m.split("/")[0] for m in inside if room_of(m) is None}
            assert not roots & CALLERS, f"{source} imports {roots & CALLERS}"


def test_no_room_imports_one_that_imports_it():
    def reached(room, seen=()):
        return {r for other in MAY_IMPORT[room] - {room, *seen} for r in {other, *reached(other, (*seen, room))}}

    assert [room for room in ROOMS if room in reached(room)] == []


def test_no_room_is_half_the_house():
    lines = {source: len((ROOT / source).read_text("utf-8").splitlines()) for source in SOURCES}
    for room in ROOMS:
        share = sum(n for source, n in lines.items() if source.startswith(f"{room}/")) / sum(lines.values())
        assert share <= LARGEST, f"{room}: {share:.0%} of the product"


@pytest.mark.parametrize("source", [*BASE, "display.py", "__init__.py"])
def test_the_ground_floor_imports_no_room(source):
    outside, inside = imports(source)
    records = {"artefacts"} if source == "display.py" else set()  # it says what is in them
    assert {m.split("/")[0] for m in inside} - records <= {
        "arrays",
        "class_statistics",
        "cores",
        "folders",
        "heartbeat",
        "splits",
        "errors",
        "extras",
        "decoder",
        "images",
        "files",
        "data",
        "display",
        "machine",
    }
    allowed = {"sklearn"} if source == "data.py" else set()  # digits, inside the function that needs them
    assert outside & HEAVY <= allowed


def test_a_device_needs_numpy_pillow_and_one_engine_only():
    for source in SOURCES:
        if source.split("/")[0] in ("artefacts", *DEVICE):
            outside, _ = imports(source)
            foreign = {n for n in outside if n not in sys.stdlib_module_names}
            if source.startswith("server/"):  # the extra `serve`; no engine, and nothing imports it unasked
                assert foreign <= {"numpy", "PIL", *SERVER}, f"{source} imports {foreign}"
                continue
            engines = {"onnxruntime", "openvino"} if source == "measurement/doctor.py" else {"onnxruntime"}
            allowed = {
                "runtime/backends/openvino.py": {"openvino"},
                "updates/signature.py": {"cryptography"},
                "streams/video.py": {"cv2"},
            }.get(source, engines)
            assert foreign <= {"numpy", "PIL", *allowed}, f"{source} imports {foreign}"


def test_onnxruntime_is_imported_only_where_a_session_is_made():
    for source in SOURCES:
        tree = tree_of(source)
        for node in tree.body:  # module level
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            heavy = {n.split(".")[0] for n in names} & {"onnxruntime", "openvino", "sklearn", "cv2"}
            assert not heavy or source == "calibrate/cpu_session.py", source  # that file is a session


def test_only_the_server_imports_a_server():
    for source in SOURCES:
        outside, inside = imports(source)
        if not source.startswith("server/"):
            assert not outside & SERVER, source
            callers = ("api.py", "cli.py", "cli_device.py", "cli_watch.py")
            assert not any(m.startswith("server") for m in inside) or source in callers, source


def test_nothing_is_pickled():
    for source in SOURCES:
        outside, _ = imports(source)
        assert not outside & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}, source
        for node in ast.walk(tree_of(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name not in ("torch.load", "torch.save", "numpy.load"), f"{source}: {name}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, source
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
                assert "allow_pickle" in {k.arg for k in node.keywords}, f"{source}: np.load without allow_pickle=False"


@pytest.mark.slow
def test_no_error_is_swallowed():
    for source in SOURCES:
        for node in ast.walk(tree_of(source)):
            if isinstance(node, ast.ExceptHandler):
                names = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                broad = {n.id for n in names if isinstance(n, ast.Name)} & {"Exception", "BaseException"}
                assert node.type is not None, f"{source}:{node.lineno}: bare except"
                raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                assert not broad or raises, f"{source}:{node.lineno}: except {broad}"


def test_every_room_and_module_says_what_it_is():
    for source in SOURCES:
        text = text_of(source)
        assert not text.strip() or ast.get_docstring(tree_of(source)), f"{source}: no docstring"


def test_every_string_explains_the_name_above_it():
    def after_no_name(statements):
        for above, below in itertools.pairwise(statements):
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
            if isinstance(text, str) and not isinstance(above, ast.Assign | ast.AnnAssign):
                yield below.lineno

    lost = [
        f"{source}:{line}"
        for source in SOURCES
        for node in ast.walk(tree_of(source))
        if isinstance(getattr(node, "body", None), list)
        for line in after_no_name(node.body)
    ]
    assert lost == []


def test_no_file_is_a_drawer():
    for source in SOURCES:
        stem = Path(source).stem
        assert stem not in ("utils", "util", "helpers", "misc", "common"), source
        lines = len(text_of(source).splitlines())
        assert lines <= 500, f"{source}: {lines} lines"


def project_file():
    """The tables of pyproject.toml that matter here (Python 3.10 has no tomllib)."""
    text = (ROOT / "pyproject.toml").read_text()
    packages = text.split("packages = [", 1)[1].split("]", 1)[0]
    return text, [line.strip().strip('",') for line in packages.splitlines() if line.strip()]


def test_every_package_is_listed():
    # An editable install hides a missing one; the wheel would lack it.
    _, listed = project_file()
    there = ["cdl_edge"] + [
        "cdl_edge." + ".".join(p.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for p in (ROOT / room).rglob("__init__.py")
    ]
    weights = "cdl_edge.train.weights"  # data alone: setuptools warns of a folder that is in no package
    assert sorted(listed) == sorted([*there, weights])
    for room in ROOMS:
        for folder in {p.parent for p in (ROOT / room).rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), folder


def test_the_types_of_every_benchmark_are_checked():
    text, _ = project_file()
    listed = text.split("modules = [", 1)[1].split("]", 1)[0]
    assert {name.strip(' "') for name in listed.split(",")} == {p.stem for p in (ROOT / "benchmarks").glob("*.py")}


def test_what_is_not_python_travels_too():
    text, _ = project_file()
    templates = ("report/page.html.j2", "report/sweep.html.j2", "report/style.css.j2")
    names = ("head.html", "page.html", "page.css", "page.js", "teach.js", "preview.html", "preview.js")
    pages = tuple(f"server/{name}" for name in names)
    for path in ("py.typed", *templates, *pages):
        assert (ROOT / path).is_file() and f'"{Path(path).name}"' in text
    for name in ("teacher", "student"):
        assert (ROOT / "train" / "weights" / f"{name}.safetensors").is_file()
    assert '"cdl_edge.train.weights" = ["*.safetensors", "*.json"]' in text


def test_the_pair_that_is_shipped_is_small():
    folder = ROOT / "train" / "weights"
    assert sum((folder / f"{name}.safetensors").stat().st_size for name in ("teacher", "student")) < 24_000_000
    assert sum(p.stat().st_size for p in folder.iterdir()) < 26_000_000


def test_one_version():
    text, _ = project_file()
    assert f'version = "{cdl_edge.__version__}"' in text


def test_tests_are_no_package():
    # Every root .py is packed; with tests/__init__.py the tests would shadow the rooms they mirror.
    assert not (ROOT / "conftest.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_rooms_are_not_importable_under_a_second_name():
    wrong = "[m for m in sys.modules if m in ('runtime', 'errors', 'cli')]"
    code = f"import cdl_edge.cli, cdl_edge.runtime, sys; print({wrong})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
