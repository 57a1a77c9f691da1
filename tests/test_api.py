"""The verbs from Python, in a process of their own: what is imported before must not matter."""

import json
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
import cdl_edge.train.loop  # sets the attribute cdl_edge.train: the verb has to survive it
assert callable(cdl_edge.train) and callable(cdl_edge.export)
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
report = cdl_edge.__getattr__("evaluate") is evaluate
print(json.dumps({"classes": inspect(out + "/bundle")["class_count"], "same": report}))
"""


@pytest.mark.slow
def test_verbs_from_python(tmp_path, short_training):
    arguments = [str(tmp_path), json.dumps(short_training)]
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1]) == {"classes": 10, "same": True}
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


def test_unknown_name_is_an_attribute_error():
    import cdl_edge

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cdl_edge.trian  # noqa: B018
