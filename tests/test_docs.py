"""The documentation does what it says: commands run, answers have the shape shown, options are those of the command."""

import importlib.util
import itertools
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from cdl_edge.machine import cuda_driver

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p.name for p in DOCS.glob("*.md"))
GUIDES = (
    *("README.md", "backbones.md", "benchmarks.md", "bundle.md", "glossary.md", "jetson.md", "methods.md"),
    *("precision.md", "results.md", "security.md", "support.md"),
)
SECTIONS = ("Options", "In and out", "Exit codes", "JSON", "What goes wrong")
QUICK = {
    "train": ("--epochs", "1", "--min-steps", "0", "--limit-per-class", "4", "--threads", "1"),
    "pretrain": ("--epochs", "1", "--batch-size", "8", "--threads", "1"),
    "export": ("--images", "4"),
    "profile": ("--runs", "40"),
}
"what the tests put behind a command: the last one of an option holds"
SECONDS = (
    "backbones.md",
    "calibrate.md",
    "export.md",
    "jetson.md",
    "pretrain.md",
    "quickstart.md",
    "sweep.md",
    "train.md",
)
"pages whose commands train, export or calibrate"


def load_make(name="make"):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()
COMMANDS = dict(make.commands())
VERBS = {name.split()[0] for name in COMMANDS}


@dataclass
class Block:
    """A fenced block of a page."""

    kind: str
    text: str
    after: str
    "kind of the block before it in the same section"

    @property
    def commands(self):
        """The `cdl-edge` lines, continued lines joined, in words."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("cdl-edge ")]


def blocks(path):
    found, before = [], ""
    for heading, kind, text in re.findall(r"^(#+ )|^```(\w+)\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S):
        if heading:
            before = ""
        else:
            found.append(Block(kind, text, before))
            before = kind
    return found


def redirected(words):
    """(the command, the file behind ">" or None)."""
    return (words[: words.index(">")], words[words.index(">") + 1]) if ">" in words else (words, None)


def verb_of(words):
    """("pack create", its arguments)."""
    for n in (2, 1):
        if " ".join(words[:n]) in COMMANDS:
            return " ".join(words[:n]), words[n:]
    return None, words


# -- what is on the pages ---------------------------------------------------------------------------------------------


def test_the_generated_parts_are_fresh():
    assert [p.name for p in make.stale()] == [], "run: python docs/make.py"


def test_every_verb_has_a_page_with_every_section():
    assert {f"{v}.md" for v in VERBS} <= set(PAGES)
    for name in set(PAGES) - set(GUIDES):
        text = (DOCS / name).read_text("utf-8")
        assert text.startswith(f"# cdl-edge {name.removesuffix('.md')}\n"), name
        assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)[: len(SECTIONS)]) == SECTIONS, name
        marks = re.findall(r"<!-- options of (.*?) -->", text)
        assert marks and {m.split()[0] for m in marks} == {name.removesuffix(".md")}


def test_a_stale_page_is_found():
    text = (DOCS / "predict.md").read_text("utf-8")
    assert make.fresh(text.replace("classes to list", "classes to print")) == text


def everything_written():
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "deploy").glob("*.md"))]


@pytest.mark.parametrize("path", everything_written(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_that_are_shown_exist(path):
    for block in blocks(path):
        for words in block.commands if block.kind in ("sh", "bash") else []:
            name, arguments = verb_of(redirected(words)[0])
            if name is None:
                assert words[0] in {p.removesuffix(".md") for p in PAGES}, words  # a page ahead of its verb
                continue
            try:
                COMMANDS[name].make_context(name, arguments)
            except click.UsageError as error:
                if not error.message.endswith("does not exist."):  # a file that the reader has
                    pytest.fail(f"{path.name}: cdl-edge {' '.join(words)}: {error.message}")


@pytest.mark.parametrize("path", everything_written(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


# -- what the pages do ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory, image_folder, photo, cli, short_options):
    """A folder as the pages have it: photos, those with new classes, a run, a bundle, a broken bundle, a text."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        classes = ("apple", "cherry", "pear", "plum")
        image_folder(folder / "photos", unsplit=dict.fromkeys(classes, 10))
        image_folder(folder / "photos-new", unsplit=dict.fromkeys((*classes, "kiwi", "lime"), 10))
        photo(folder / "photos" / "apple" / "IMG_0001.jpg", seed=1, colour=0)
        for seed, name in enumerate(("fruit", "fruit-new")):
            options = ["--learner", "coda", "--tasks", "2", "--seed", seed, *QUICK["train"], *short_options]
            assert cli("train", "--data", "folder:photos", "--out", f"runs/{name}", *options).code == 0
            assert cli("export", f"runs/{name}", "--out", f"bundles/{name}", "--images", "4").code == 0
        shutil.copytree("bundles/fruit", "device")
        shutil.copytree("bundles/fruit", "broken")
        with open("broken/prompts.bin", "rb+") as stream:
            stream.write(b"\xff\x00")
        Path("notes.txt").write_text("these are no pixels")
    return folder


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A copy of it, entered."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same_shape(shown, real, where=""):
    """Every key that is shown is there and of the same type; of a list the first is compared."""
    if isinstance(shown, dict):
        assert isinstance(real, dict), where
        for key, value in shown.items():
            assert key in real, f"{where}.{key}"
            same_shape(value, real[key], f"{where}.{key}")
    elif isinstance(shown, list):
        assert isinstance(real, list), where
        if shown and real:
            same_shape(shown[0], real[0], f"{where}[0]")
    elif shown is not None and real is not None:
        kinds = (int, float) if isinstance(shown, (int, float)) and not isinstance(shown, bool) else type(shown)
        assert isinstance(real, kinds), f"{where}: {real!r}"


def matches(shown, real):
    """Line by line; "..." stands for anything."""
    wanted = [re.escape(line).replace(r"\.\.\.", ".*") for line in shown.strip().splitlines()]
    got = real.strip().splitlines()
    return len(got) >= len(wanted) and all(re.fullmatch(w, g) for w, g in zip(wanted, got[-len(wanted) :], strict=True))


SHOWING = [p for p in PAGES if "\n```sh\n" in (DOCS / p).read_text("utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in SECONDS else p for p in SHOWING])
def test_what_a_page_shows(page, place, cli):
    found = blocks(DOCS / page)
    if page == "jetson.md":  # the whole way, from the photographs on
        shutil.rmtree("runs")
        shutil.rmtree("bundles")
    answer = None
    for i, block in enumerate(found):
        if block.kind == "sh":
            refused = i + 1 < len(found) and found[i + 1].kind == "text" and found[i + 1].text.startswith("error:")
            for words in block.commands:
                given, target = redirected(words)
                name, _ = verb_of(given)
                if name == "build" and cuda_driver().devices:
                    pytest.skip("shows what a machine without a GPU says")
                if name == "serve":
                    pytest.importorskip("uvicorn")
                answer = cli(*given, *QUICK.get(name, ()))
                assert answer.code == (2 if refused else 0), (given, answer.err)
                if target:
                    Path(target).write_text(answer.out)
        elif block.kind == "text" and block.after == "sh" and block.text.startswith("error:"):
            assert matches(block.text, answer.err), answer.err
        elif block.kind == "json" and block.after == "sh":
            same_shape(json.loads(block.text), answer.json, page)


def words_of(line):
    """The words of a line in a shell block, without its comment."""
    return shlex.split(line, comments=True)


@pytest.mark.slow
def test_one_bundle_goes_the_whole_way_of_the_jetson_page(place, cli, monkeypatch):
    """Steps 2 to 7 as the page has them, the CPU in place of TensorRT: what is copied is what is run and updated."""
    shutil.rmtree("runs")
    shutil.rmtree("bundles")
    board = place / "board"
    board.mkdir()
    Path("dist").mkdir()
    done = []

    def run(words, folder):
        monkeypatch.chdir(folder)
        name, _ = verb_of(words)
        # The CPU has no fp16, and no 8-bit graph of TensorRT's flavour.
        given = [{"tensorrt": "onnxruntime", "fp16": "fp32", "int8": "fp32"}.get(w, w) for w in words]
        if name not in ("build", "serve", "doctor"):
            answer = cli(*given, *QUICK.get(name, ()))
            assert answer.code == 0, (given, answer.err)
        done.append(name)
        monkeypatch.chdir(place)

    on_board = False
    for line in (DOCS / "jetson.md").read_text("utf-8").split("## What installs")[0].splitlines():
        if line.startswith("## "):
            on_board = line.startswith(("## 5.", "## 6."))
        words = words_of(line) if line.startswith(("cdl-edge ", "rsync ", "scp ", "ssh ")) else []
        if words[:1] == ["cdl-edge"]:
            run(words[1:], board if on_board else place)
        elif words[:1] in (["rsync"], ["scp"]):
            assert words[-1] == "me@jetson:"
            for source in (Path(w) for w in words[1:-1] if not w.startswith("-")):
                copy = shutil.copytree if source.is_dir() else shutil.copy
                copy(source, board / source.name)
        elif words[:1] == ["ssh"]:
            run(words[3:], board)
    assert {"train", "export", "calibrate", "evaluate", "profile", "pack create", "pack install"} <= set(done)
    monkeypatch.chdir(board)
    told = cli("inspect", "fruit", "--json").json
    assert told["class_count"] == 6 and any(name.endswith("int8-trt") for name in told["graphs"])


def readme_section(title):
    return (ROOT / "README.md").read_text("utf-8").split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def shape(printed):
    """Printed lines without what differs from run to run: every number is 0, columns are one space apart."""
    lines = (
        re.sub(r"-{2,}", "--", re.sub(r"[-+]?\d[\d.]*(e-\d+)?", "0", line)) for line in printed.strip().splitlines()
    )
    return [" ".join(line.split()) for line in lines]


@pytest.mark.slow
def test_the_way_that_the_readme_shows(place, cli):
    Path("section.md").write_text(readme_section("Your own photographs"))
    shutil.rmtree("runs")
    shutil.rmtree("bundles")
    shown = blocks(Path("section.md"))
    verbs = [words[0] for block in shown if block.kind == "sh" for words in block.commands]
    assert verbs == ["train", "export", "evaluate", "predict"]
    for block, behind in itertools.pairwise(shown):
        if block.kind != "sh":
            continue
        for words in block.commands:
            # Training as the page has it: an option of prompts would ask for a teacher.
            answer = cli(*words, *(("--threads", "1") if words[0] == "train" else QUICK.get(words[0], ())))
            assert answer.code == 0, (words, answer.err)
        assert behind.kind == "text"
        # Which class the squares of the tests look like, if any, is not what a page promises.
        real = shape(re.sub("pear|cherry|plum", "apple", answer.out.replace("  looks like none of the classes", "")))
        real = [line.replace("(ranpac)", "(slda)") for line in real]  # the better one of both
        for line in shape(re.sub("pear|cherry|plum", "apple", behind.text)):
            assert any(matches(line, got) for got in real), f"{line!r} is not in {real}"


@pytest.mark.slow
def test_the_python_that_the_readme_shows(place, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme_section("From Python"), re.M | re.S)
    assert len(code.splitlines()) <= 8
    quick = code.replace("train(", "train(threads=1, quiet=True, ")
    assert quick.count("threads=1") == 1
    exec(compile(quick, "README.md", "exec"), {})
    accuracy, answer = capsys.readouterr().out.strip().splitlines()[-2:]
    assert 0 <= float(accuracy) <= 100
    assert answer.split()[0] in ("apple", "cherry", "pear", "plum") and 0 <= float(answer.split()[1]) <= 1


def test_the_first_page_is_one_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    pictures = [ROOT / target for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)]
    assert {p.name for p in pictures} >= {"way.svg", "report.png", "page.png"}
    assert [p.name for p in pictures if p.stat().st_size > 200_000] == []
    assert readme_section("Support").count("\n- ") == 5


def test_the_table_of_results_is_the_same_on_both_pages():
    def rows(path):
        part = path.read_text("utf-8").split("<!-- results", 1)[1].split("<!-- end of results -->")[0]
        return [line for line in part.splitlines() if line.startswith("|")]

    assert rows(ROOT / "README.md") == rows(DOCS / "results.md")


def test_ci_runs_commands_that_the_readme_gives():
    given = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text("utf-8")))
    run = set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci/run").read_text("utf-8"), re.MULTILINE))
    assert {"quickstart", "test"} <= run <= given
    assert given <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", ["make_picture", "make_chart"])
def test_pictures_are_those_that_their_scripts_draw(name):
    script = load_make(name)
    assert script.TARGET.read_text("utf-8") == script.picture(), f"run: python docs/{name}.py"


def test_the_photographs_that_the_readme_draws(tmp_path):
    load_make("make_photos").write(tmp_path / "photos", count=2)
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg")}
    assert "photos/apple/IMG_0001.jpg" in found and "photos/cherry/IMG_0101.jpg" in found and len(found) == 8


def test_the_glossary_has_ten_words():
    rows = re.findall(r"^\| (?!word |---)([^|]+) \|", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 10 and rows == sorted(set(rows), key=rows.index)


@pytest.mark.slow
def test_every_field_of_a_manifest_is_explained(base):
    fields = json.loads((base / "bundles/fruit/manifest.json").read_text("utf-8"))
    text = (DOCS / "bundle.md").read_text("utf-8")
    assert [name for name in fields if f"`{name}`" not in text] == []
    assert [name for name in fields["files"] if f"`{name}`" not in text] == []


def test_the_comparison_can_fail():
    with pytest.raises(AssertionError, match=r"\.a\.b"):
        same_shape({"a": {"b": 1}}, {"a": {}})
    with pytest.raises(AssertionError):
        same_shape({"a": 1}, {"a": "1"})
    assert matches("error: x\n  got: ...", "progress\nerror: x\n  got: 12")
    assert not matches("error: x", "error: y")


# -- deploy/ ----------------------------------------------------------------------------------------------------------


def test_a_device_gets_what_the_package_asks_for():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    lines = (ROOT / "deploy" / "requirements.txt").read_text("utf-8").splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in listed if f'"{line}"' not in text] == []
    names = {re.split("[<>=;]", line)[0] for line in listed}
    assert {"numpy", "pillow", "onnxruntime", "uvicorn", "starlette", "cryptography"} <= names
    assert not names & {"torch", "timm", "onnx"}
