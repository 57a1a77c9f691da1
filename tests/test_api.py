"""The commands as functions, in a process of their own: what is imported before must not matter."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import sys, json
from cdl_edge import doctor, evaluate, export, inspect, predict, profile, train, validate
import cdl_edge
out, short = sys.argv[1], json.loads(sys.argv[2])
digits = dict(data="digits", learner="apt", distill="none", tasks=2, quiet=True, **short)
metrics = train(out=out + "/run", limit_per_class=5, **digits)
export(out + "/run", out + "/bundle", images=10)
import cdl_edge.train.loop, cdl_edge.export.export_bundle  # the names stay those of the functions
assert cdl_edge.train is train and cdl_edge.export is export
torch_side, graph_side = evaluate(out + "/run", "digits"), evaluate(out + "/bundle", "digits")
assert abs(torch_side["average_accuracy"] - graph_side["average_accuracy"]) < 1e-6
assert torch_side["backend"] == "torch"
assert validate(out + "/bundle")["valid"]
assert profile(out + "/bundle", runs=5, warmup=1)["end_to_end_ms"]["n"] == 5
from cdl_edge import create_pack, install_pack, rollback, versions
train(out=out + "/run2", limit_per_class=6, seed=1, **digits)
export(out + "/run2", out + "/bundle2", images=10)
create_pack(out + "/bundle", out + "/bundle2", out + "/new.pack")
installed = install_pack(out + "/new.pack", out + "/bundle")
assert [v["version"] for v in versions(out + "/bundle") if v["current"]] == [installed["version"]]
assert rollback(out + "/bundle")["version"] == installed["previous"]
print(json.dumps({"classes": inspect(out + "/bundle")["class_count"]}))
"""


@pytest.mark.slow
def test_commands_from_python(tmp_path, short_training):
    arguments = [str(tmp_path), json.dumps(short_training)]
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1]) == {"classes": 10}
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_runs_on_a_device_is_imported_without_anything_heavy():
    code = (
        "import sys\n"
        "from cdl_edge import create_pack, doctor, evaluate, inspect, install_pack, predict, profile, validate\n"
        "heavy = {'torch', 'timm', 'onnx', 'onnxruntime', 'openvino', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_engine_sends_nothing_home(make_bundle, tmp_path):
    """ONNX Runtime from 1.29 on reports every model unless it is told before it is imported."""
    code = f"from cdl_edge.runtime import load; load({str(make_bundle().path)!r}, 'onnxruntime', threads=1).close()"
    silent = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")  # what would keep it quiet by itself
    surroundings = {k: v for k, v in os.environ.items() if k not in silent} | {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    subprocess.run([sys.executable, "-c", code], env=surroundings, check=True, timeout=120)
    assert list((tmp_path / "home").rglob("*")) == []


@pytest.mark.slow
def test_a_function_keeps_its_name_whatever_is_imported():
    """Five packages have the name of a command: importing one must not put it where the function is."""
    code = ""
    for module in ("calibrate.schemes", "export.profiles", "report.words", "sweep.presets", "train.options"):
        name, _, inner = module.partition(".")
        code += f"import cdl_edge.{module}\nfrom cdl_edge import {name}, api\nfrom cdl_edge.{name} import {inner}\n"
        code += f"assert {name} is api.{name} is cdl_edge.{name}, {name}\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_command_is_a_function_of_its_own_name():
    import cdl_edge
    from cdl_edge import api
    from cdl_edge.cli import cli

    named = {"pack create": "create_pack", "pack install": "install_pack", "pack rollback": "rollback"}
    named |= {"pack push": "push_pack", "pack pull": "pull_packs"}
    commands = {*cli.commands} - {"pack"} | {*named}
    functions = {named.get(command, command) for command in commands} | {"versions", "trusted_keys", "compare"}
    functions |= {"enrolments", "remove_enrolment", "rename_enrolment", "export_enrolments"}
    assert all(callable(getattr(api, name)) for name in functions)
    assert {*cdl_edge.__all__} == functions - {"quickstart"}
    assert all(getattr(cdl_edge, name) is getattr(api, name) for name in cdl_edge.__all__)


def test_options_have_the_types_of_the_config():
    from typing import get_type_hints

    from cdl_edge.sweep.grid import LISTS, SETTINGS
    from cdl_edge.train.config import TrainConfig
    from cdl_edge.train.options import SweepOptions, TrainOptions

    assert get_type_hints(TrainOptions) == get_type_hints(TrainConfig)
    assert {*get_type_hints(SweepOptions)} == {*SETTINGS, *LISTS, "seeds", "baseline", "preset"}


SCRIPT = """
from cdl_edge import export, predict, train

metrics = train(data="folder:photos", out="run", learner="apt", tasks=2, limit_per_class=50, alpha=0.5)
accuracy: float = metrics["student"]["average_accuracy"]
bundle: str = export("run", "bundle", images=10)["bundle"]
answers = predict(bundle, ["photo.jpg"], top=3)
for answer in answers["predictions"]:
    print(answer["label"], answer["probability"], accuracy)
"""


@pytest.mark.slow
def test_a_script_of_a_user_passes_a_strict_type_checker(tmp_path, root):
    """And the same with two mistakes in it does not: an option of another type, an option that there is not."""
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(SCRIPT.replace("tasks=2", "tasks='2'").replace("top=3", "tip=3"))
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "right.py", "wrong.py"]
    environment = {**os.environ, "MYPYPATH": str(root / ".pkg")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 2 and all(line.startswith("wrong.py") for line in errors), done.stdout
    assert '"tasks"' in errors[0] and '"tip"' in errors[1]


def test_unknown_name_is_an_attribute_error():
    import cdl_edge

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cdl_edge.trian  # noqa: B018


def test_the_earlier_name_of_quantisation_schemes(monkeypatch):
    from cdl_edge import api
    from cdl_edge.calibrate import calibrate_bundle
    from cdl_edge.cli import cli

    seen = []
    monkeypatch.setattr(calibrate_bundle, "calibrate", lambda *given: seen.append(given) or {})
    api.calibrate("bundle", "out", flavours=["int8-arm"])
    api.calibrate("bundle", "out", schemes=["int8-arm"])
    assert seen[0] == seen[1] and ["int8-arm"] in seen[0]
    option = next(p for p in cli.commands["calibrate"].params if p.name == "schemes")
    assert option.opts == ["--scheme", "--flavour"]
