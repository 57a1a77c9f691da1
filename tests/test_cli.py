"""The command line: what it promises to people, to scripts, and to a board with nothing installed."""

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest

from cdl_edge import api
from cdl_edge.cli import main
from cdl_edge.cli_options import say

VERBS = (
    *("quickstart", "pretrain", "train", "sweep", "export", "calibrate", "build", "evaluate", "predict"),
    *("profile", "inspect", "validate", "report", "pack", "enrol", "serve", "watch", "doctor"),
)
HEAVY = ("torch", "timm", "onnx", "onnxruntime", "sklearn", "numpy", "PIL", "safetensors", "jinja2")


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_texts():
    """{verb, or "" for all: (its help, the heavy modules that were loaded by then)}, asked of one process."""
    code = (
        "import contextlib, io, json, sys\nfrom cdl_edge.cli import main\nfound = {}\n"
        f"for verb in {['', *VERBS]!r}:\n"
        "    sys.argv = ['cdl-edge', *verb.split(), '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try: main()\n"
        "        except SystemExit as stop: assert not stop.code\n"
        f"    found[verb] = [out.getvalue(), [m for m in {HEAVY!r} if m in sys.modules]]\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("verb", ["", *VERBS], ids=lambda verb: verb or "cdl-edge")
def test_help_needs_nothing_heavy(help_texts, verb):
    text, loaded = help_texts[verb]
    assert loaded == []
    assert text.startswith(f"Usage: cdl-edge {verb}")


def test_help_is_quick():
    # The processor's time, not the clock's: the machine may be busy.
    before = os.times()
    subprocess.run([sys.executable, "-c", "from cdl_edge.cli import main; main()", "--help"], capture_output=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.4


def test_help_lists_every_verb(cli):
    for flag in ("--help", "-h"):
        text = cli(flag).out
        for verb in VERBS:
            assert re.search(rf"^  {verb} ", text, re.MULTILINE), verb
    assert "Exit codes: 0 done, 1 failed, 2" in " ".join(text.split())


def test_every_verb_is_known_here(cli):
    from cdl_edge.cli import cli as group

    assert sorted(group.commands) == sorted(VERBS)
    assert all(c.help and c.help.strip() for c in group.commands.values())


def commands():
    """Every verb, those of `pack` too: name -> click command."""
    from cdl_edge.cli import cli as group

    found = {}
    for verb, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{verb} {name}": c for name, c in inner.items()} if inner else {verb: command}
        found |= {f"{verb} {name}": c for name, c in getattr(command, "inner", {}).items()}
    return found


def test_every_option_is_explained():
    for verb, command in commands().items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{verb} --{parameter.name}"


def test_every_verb_but_serve_speaks_json():
    for verb, command in commands().items():
        assert verb == "serve" or any("--json" in p.opts for p in command.params), verb


def help_of(verb, option):
    from cdl_edge.cli import cli as group

    return next(p.help for p in group.commands[verb].params if f"--{option}" in p.opts)


def choices(text):
    """The words in front of a colon or a bracket: 'a | b | c [default: a]'."""
    return [w.strip() for w in re.split(r"[:\[]", text)[0].split("|")]


def test_help_names_exactly_what_there_is(cli):
    # A flaw that recurs even in good projects: help that has gone stale.
    from cdl_edge.train.config import AUGMENTATIONS, KD_HEADS, PRECISIONS, QUERIES, TrainConfig
    from cdl_edge.train.distill import DISTILLERS, Distiller
    from cdl_edge.train.hybrid import HYBRIDS
    from cdl_edge.train.learners import LEARNERS
    from cdl_edge.train.pretrain import ARCHITECTURES

    assert choices(help_of("train", "learner")) == list(LEARNERS)
    assert choices(help_of("train", "distill")) == list(DISTILLERS)
    assert choices(help_of("train", "query")) == list(QUERIES)
    assert choices(help_of("train", "precision")[: help_of("train", "precision").index(",")]) == list(PRECISIONS)
    assert choices(help_of("train", "augment")) == list(AUGMENTATIONS)
    assert choices(help_of("train", "kd-head")) == choices(help_of("sweep", "kd-head")) == list(KD_HEADS)
    arch = [*HYBRIDS, *ARCHITECTURES]
    assert choices(help_of("pretrain", "arch")) == arch
    cli("pretrain", "--data", "digits", "--arch", "vit", "--out", "x").assert_refused(
        "one of " + ", ".join(sorted(arch))
    )
    assert help_of("train", "tasks").endswith("[default: 1]")
    defaults = TrainConfig("digits", "x").to_json()
    for option in ("learner", "distill", "query", "epochs", "batch-size", "learning-rate", "alpha"):
        stated = re.search(r"\[default: ([^\],]+)", help_of("train", option)).group(1)
        assert stated == str(defaults[option.replace("-", "_")]).removesuffix(".0"), option
    others = sorted({f"{n} {kind.tau:g}" for n, kind in DISTILLERS.items() if kind.tau != Distiller.tau})
    assert help_of("train", "tau").endswith(f"[default: the distiller's, {'; '.join([f'{Distiller.tau:g}', *others])}]")
    assert help_of("train", "query-regulariser").endswith(f"[default: {defaults['query_regulariser']:g}]")
    for option in ("kd-blocks", "kd-length", "kd-head", "seed", "teacher", "student", "precision", "devices"):
        stated = re.search(r"\[default: ([^\],]+)", help_of("train", option)).group(1)
        assert stated == str(defaults[option.replace("-", "_")]), option


def test_every_training_option_is_on_the_command_line():
    from cdl_edge.cli import cli as group
    from cdl_edge.train.config import TrainConfig
    from cdl_edge.train.hybrid import HybridConfig
    from cdl_edge.train.pretrain import PretrainConfig

    names = {p.name for p in group.commands["train"].params}
    stored = {"decoder", "compat_schema", "token_weight"}  # rules that a run was made by: for nobody to choose
    assert (
        names - {"config", "resume", "pictures", "threads", "as_json"}
        == set(TrainConfig("digits", "x").to_json()) - stored
    )
    names = {p.name for p in group.commands["pretrain"].params}
    fields = {*PretrainConfig.__dataclass_fields__, *HybridConfig.__dataclass_fields__} - {"small_until"}
    assert names - {"resume", "threads", "as_json"} == fields


def test_version(cli):
    import cdl_edge

    assert cli("--version").out.strip() == f"cdl-edge, version {cdl_edge.__version__}"


# -- wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train", "--lerner", "coda"],
        ["train", "--tasks", "five"],
        ["predict"],
        ["export", "x"],
        ["--verbose"],
    ],
)
def test_wrong_usage_is_two(cli, arguments):
    answer = cli(*arguments)
    assert answer.code == 2 and "Error:" in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learner", "codda"], ["unknown learner", "'codda'", "did you mean 'coda'?"]),
        (["--distill", "kdpp"], ["unknown distiller", "did you mean 'kdp'?"]),
        (["--query", "one"], ["unknown query", "one-pass, one-pass-patches, two-pass"]),
        (["--data", "folder:/nowhere/at/all"], ["/nowhere/at/all: no such folder"]),
        (["--data", "digit"], ["did you mean 'digits'?"]),
        (["--tasks", "11"], ["10 classes, 11 tasks", "1 to 10 tasks"]),
        (["--tasks", "0"], ["--tasks is too small"]),
        (["--student", "builtin:pupil"], ["unknown builtin backbone"]),
        (["--teacher", "file:/nowhere"], ["/nowhere: no such file"]),
        (["--alpha", "2"], ["--alpha is out of range"]),
        (["--seed", "-1"], ["--seed is out of range"]),
        (["--kd-length", "3"], ["even --kd-length"]),
        (["--kd-head", "normal"], ["unknown KD head", "learner, linear, normalised", "did you mean 'normalised'?"]),
        (["--query-regulariser", "-1"], ["--query-regulariser is out of range"]),
        (
            ["--learner", "apt", "--distill", "cdl-prompt"],
            ["--distill cdl-prompt", "--learner apt", "l2p | dualprompt"],
        ),
        (["--learner", "finetune", "--distill", "kdp"], ["--distill kdp", "--learner finetune", "l2p | dualprompt"]),
        (["--teachers", __file__], ["not a folder", "--teachers"]),
    ],
)
def test_bad_training_input_writes_nothing(cli, tmp_path, options, words):
    cli("train", "--data", "digits", "--out", tmp_path / "run", *options).assert_refused(*words)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(cli, tmp_path):
    cli("train", "--out", tmp_path / "run").assert_refused(
        "a training option is missing", "no data", "--data folder:PATH"
    )
    cli("train", "--data", "digits").assert_refused("out")


def test_config_files(cli, tmp_path, fast_options):
    path = tmp_path / "c.json"
    for content, words in [
        ("{", ["not JSON"]),
        ("[1]", ["not a JSON object", "list"]),
        ('{"lerner": "coda"}', ["unknown training option", "did you mean 'learner'?"]),
        ('{"epochs": "2"}', ["'epochs' has the wrong type"]),
        ('{"compat": "no"}', ["'compat' has the wrong type"]),
        ('{"threads": "2"}', ["--threads is out of range", "'2'"]),
        ('{"resume": "no"}', ["resume is a switch", "true or false"]),
        ('{"quiet": true}', ["unknown option", "quiet"]),
    ]:
        path.write_text(content)
        out = tmp_path / "run"
        cli("train", "--data", "digits", "--out", out, "--config", path).assert_refused(*words)
        assert not out.exists()
    path.write_bytes(b"\xff\xfe\x00")
    cli("train", "--data", "digits", "--out", "x", "--config", path).assert_refused("not JSON")


def test_a_file_holds_every_option_of_the_command(cli, tmp_path, monkeypatch):
    """threads, resume and pictures ended in a trace: they are not options of a run, but they are of `train`."""
    from cdl_edge import api
    from cdl_edge.errors import InputError

    got = {}

    def train(**given):
        got.update(given)
        raise InputError("stopped")

    monkeypatch.setattr(api, "train", train)
    path = tmp_path / "c.json"
    path.write_text('{"data": "digits", "out": "x", "threads": 1, "resume": true, "pictures": false}')
    cli("train", "--config", path).assert_refused("stopped")
    assert got == {"data": "digits", "out": "x", "threads": 1, "resume": True, "pictures": False}
    cli("train", "--config", path, "--threads", 2, "--pictures").assert_refused("stopped")
    assert (got["threads"], got["pictures"]) == (2, True)
    path.write_text('{"say": 1}')
    cli("sweep", "--config", path, "--data", "digits", "--out", "x").assert_refused("unknown option", "say")


@pytest.mark.slow
def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(cli, tmp_path, fast_options):
    # Trap 11: YAML values silently overridden by command-line defaults.
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"epochs": 1, "learner": "apt", "seed": 3, "compat": True, "distill": "none"}))
    out = tmp_path / "run"
    answer = cli("train", *fast_options, "--config", path, "--seed", 4, "--no-compat", "--out", out, "--json")
    assert answer.code == 0, answer.err
    stored = json.loads((out / "config.json").read_text())
    assert (stored["learner"], stored["seed"], stored["compat"], stored["epochs"]) == ("apt", 4, False, 2)
    assert stored["alpha"] == 0.5


def test_quickstart_takes_fewer_classes_than_its_tasks(cli, tmp_path, image_folder, monkeypatch):
    """It asked for 5 tasks of 4 classes, and told who has no such option to give fewer --tasks."""
    from cdl_edge.errors import InputError
    from cdl_edge.train import loop

    got = []

    def train(config):
        got.append(config.tasks)
        raise InputError("stopped")

    monkeypatch.setattr(loop, "train", train)
    root = image_folder(tmp_path / "photos", unsplit={"a": 3, "b": 3})
    cli("quickstart", "--data", f"folder:{root}", "--out", tmp_path / "out").assert_refused("stopped")
    assert got == [2]


@pytest.mark.parametrize("name", ["photos", "letter"])
def test_quickstart_leaves_what_is_there_alone(cli, tmp_path, name):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a").write_text("x")
    (tmp_path / "letter").write_text("x")
    cli("quickstart", "--out", tmp_path / name).assert_refused("is not empty")
    assert contents(tmp_path) == {"photos/a": b"x", "letter": b"x"}


def test_pretrain_refuses(cli, tmp_path):
    out = tmp_path / "w.safetensors"
    cli("pretrain", "--data", "digits", "--arch", "studnet", "--out", out).assert_refused("did you mean 'student'?")
    cli("pretrain", "--data", "folder:/nowhere", "--arch", "student", "--out", out).assert_refused("no such folder")
    assert list(tmp_path.iterdir()) == []


# -- several processes, see also train/test_distributed.py ------------------------------------------------------------


@pytest.mark.parametrize(("rank", "world", "talks"), [("0", "2", True), ("1", "2", False), ("1", "1", True)])
def test_of_several_processes_one_answers(cli, monkeypatch, rank, world, talks):
    # A scheduler may number processes that have nothing to do with each other: RANK alone says nothing.
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert (cli("doctor", "--json").out != "") == talks


@pytest.mark.parametrize(("rank", "reports"), [("0", 1), ("1", 0)])
def test_of_several_processes_one_writes_the_report(tmp_path, monkeypatch, rank, reports):
    from cdl_edge import api
    from cdl_edge.report import model_page as page
    from cdl_edge.train import loop

    written = []
    monkeypatch.setattr(loop, "train", lambda *_, **__: {"config": {"out": str(tmp_path)}})
    monkeypatch.setattr(page, "write_report", lambda path, run, pictures: written.append(path))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    api.train(data="digits", out=str(tmp_path))
    assert len(written) == reports


def test_an_error_of_all_is_said_by_the_first(cli, monkeypatch):
    slept = []
    monkeypatch.setattr("cdl_edge.cli.time.sleep", slept.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        cli("train", "--data", "digits", "--out", "x", "--alpha", "2").assert_refused("--alpha")
    assert slept == [60]  # in which torchrun ends it; an error of its own comes out after all


def test_a_gate_that_is_not_passed_is_a_failure_not_wrong_usage(cli, monkeypatch):
    """Parity, accuracy in 8 bits and the self-test alike: exit code 1, a message, no trace."""
    from cdl_edge import api
    from cdl_edge.errors import GateError

    def fails():
        raise GateError("the self-test fails", got="other answers", expected="the student's")

    monkeypatch.setattr(api, "doctor", fails)
    answer = cli("doctor")
    assert answer.code == 1 and "failed: the self-test fails" in answer.err and "Traceback" not in answer.err


@pytest.mark.slow
def test_a_bug_keeps_its_trace(monkeypatch):
    code = (
        "import sys, cdl_edge.measurement.doctor as d\nfrom cdl_edge.cli import main\n"
        "def broken(): raise ZeroDivisionError('a bug')\n"
        "d.doctor = broken\nsys.argv = ['cdl-edge', 'doctor']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


@pytest.mark.slow
def test_the_process_ends_with_two_and_one_message(tmp_path):
    # Once in a process of its own, as a shell sees it.
    code = "from cdl_edge.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path / "nowhere")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_escape_sequences_do_not_reach_the_terminal(capsys):
    from cdl_edge.cli_options import emit, say
    from cdl_edge.display import printable

    name = "cat\x1b[2J\x9b31m\u202e größe 猫"
    emit({}, False, f"{name}\nnext\tline")
    say(name)
    out, err = capsys.readouterr()
    assert out == "cat\\x1b[2J\\x9b31m\\u202e größe 猫\nnext\tline\n"
    assert err == out.split("\n")[0] + "\n"
    assert printable("") == ""


@pytest.mark.parametrize(("verb", "words"), [("train", "--resume"), ("pretrain", "--resume"), ("sweep", "goes on")])
def test_ctrl_c_says_how_to_go_on(cli, monkeypatch, tmp_path, verb, words):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cdl_edge.api.{verb}", stopped)
    options = {"pretrain": ("--arch", "student")}.get(verb, ())
    answer = cli(verb, "--data", "digits", "--out", tmp_path / "out", *options)
    assert answer.code == 1 and "Aborted" not in answer.err and "Traceback" not in answer.err
    assert "stopped: " in answer.err and words in answer.err and str(tmp_path / "out") in answer.err


@pytest.mark.parametrize("verb", ["export", "calibrate"])
def test_ctrl_c_where_nothing_is_kept(cli, monkeypatch, tmp_path, verb):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cdl_edge.api.{verb}", stopped)
    answer = cli(verb, tmp_path / "in", "--out", tmp_path / "out")
    assert answer.code == 1 and "Aborted" not in answer.err
    assert "stopped: nothing was written; start the same command again" in answer.err


# -- where its words go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [("doctor",), ("doctor", "--json"), ("watch", "0", "b"), ("watch", "0", "b", "--json")]
)
def test_an_answer_to_a_full_disk(monkeypatch, capsys, words):
    """`... > answers.json` on a full disk is no bug of ours: one message, no trace."""
    answer = {"image": "a.png", "label": "a", "probability": 1.0, "confidence": 1.0, "unknown": False, "task": 0}
    answer |= {"prompts": {"selected": []}}
    monkeypatch.setattr(api, "watch", lambda *_, **__: (a for a in [answer]))
    monkeypatch.setattr(api, "doctor", lambda: {"checks": [], "ok": True})
    monkeypatch.setattr(sys, "argv", ["cdl-edge", *words])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            main()
        with contextlib.suppress(OSError):
            full.close()
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "cannot be written to standard output" in said and "No space left" in said


def test_progress_to_a_full_disk_ends_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        say("1 image(s), 0 left out")
        with contextlib.suppress(OSError):
            full.close()
