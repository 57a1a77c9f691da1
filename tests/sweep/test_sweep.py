"""A sweep as a whole, with fake cells: its folder, what it continues, refuses and reports."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from cdl_edge.data import load_dataset
from cdl_edge.errors import InputError
from cdl_edge.sweep import sweep as module
from cdl_edge.sweep.processes import hold

SPELT = ("k\u00fche", "ku\u0308he")
SMALL = {"learners": "l2p,apt", "distillers": "none,kdp", "seeds": "0,1"}


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_sweep(run_sweep, fakes, tmp_path):
    lines = []
    document = run_sweep(lines=lines, epochs=3, **SMALL)
    assert sorted(fakes.started) == sorted(
        f"{le}-{d}-{s}" for le in ("l2p", "apt") for d in ("none", "kdp") for s in (0, 1)
    )
    assert fakes.most == 2
    out = tmp_path / "sweep"
    assert json.loads((out / "sweep.json").read_text()) == document
    assert {"sweep.json", "sweep.md", "report.html", "cells/l2p-kdp-1.json", "runs/l2p-kdp-1/metrics.json"} <= files(
        out
    )
    assert not [f for f in files(out) if f.endswith(".part")]
    assert json.loads((out / "cells" / "l2p-kdp-1.json").read_text())["epochs"] == 3
    assert document["settings"]["epochs"] == 3 and document["failed"] == []
    cell = next(c for c in document["cells"] if c["name"] == "l2p-kdp-1")
    assert (cell["state"], cell["seed"], cell["seconds"]) == ("finished", 1, 12.0)
    assert cell["student"]["average_accuracy"] == pytest.approx(58.0, abs=0.5)
    row = next(r for r in document["rows"] if (r["learner"], r["distiller"]) == ("l2p", "kdp"))
    assert row["n"] == 2 and row["difference"]["average_accuracy"]["mean"] == pytest.approx(5.0, abs=0.5)
    assert {"average_accuracy", "forgetting", "incremental_accuracy", "±", "p", "p (Holm)"} <= set(
        document["definitions"]
    )
    assert "8 runs, 0 of them finished; 2 at a time with 1 thread(s) each" in lines[1]
    assert re.match(r"\[8/8\] \S+: accuracy \d+\.\d\d %, forgetting -?\d+\.\d\d points, 12 s", lines[-1])
    text = (out / "sweep.md").read_text()
    assert "8 of 8 runs finished, 0 failed; seeds 0, 1, baseline none." in text
    assert text.count(document["definitions"]["forgetting"]) == 1


@pytest.mark.slow
def test_learners_by_distillers_by_heads(run_sweep, tmp_path):
    grid = {"learners": "frozen,l2p,apt", "distillers": "none,two-heads,kd,kd-token,kdp", "heads": "learned,ranpac"}
    document = run_sweep(**grid, seeds="1")
    assert len(document["cells"]) == 2 * (1 + 5 + 5) and document["failed"] == []
    assert document["grid"]["heads"] == ["learned", "ranpac"]
    assert document["frozen"][0]["average_accuracy"]["mean"] == 58
    assert {r["head"] for r in document["rows"]} == {"learned", "ranpac"}
    lines = (tmp_path / "sweep" / "sweep.md").read_text().splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| learner"))
    assert [c.strip() for c in lines[header].split("|")[1:7]] == [
        *("learner", "distiller", "head", "n", "accuracy %", "vs frozen")
    ]
    assert lines[header + 2].startswith("| frozen baseline") and "58.00" in lines[header + 2]
    assert "Frozen baseline: head ranpac." in lines
    # The same command with one more head runs what is new.
    more = run_sweep(**{**grid, "heads": "learned,ranpac,ncm"}, seeds="1")
    assert len(more["cells"]) == 3 * (1 + 5 + 5)


@pytest.mark.slow
def test_class_orders_of_each_seed(run_sweep):
    document = run_sweep(**SMALL)
    orders = document["class_orders"]
    assert list(orders) == ["0", "1"]
    assert orders["0"] != orders["1"] and sorted(orders["0"]) == sorted(orders["1"]) == [str(d) for d in range(10)]
    assert document["notes"] == []


@pytest.mark.slow
def test_data_that_changed_in_between_are_noted(run_sweep, tmp_path):
    run_sweep(**SMALL)
    path = tmp_path / "sweep" / "runs" / "apt-kdp-1" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["classes"][0], metrics["classes"][1] = metrics["classes"][1], metrics["classes"][0]
    path.write_text(json.dumps(metrics))
    document = run_sweep(**SMALL)
    assert len(document["notes"]) == 1 and "apt-kdp-1" in document["notes"][0]
    assert "apt-kdp-1" in (tmp_path / "sweep" / "sweep.md").read_text()


@pytest.fixture
def photos(tmp_path, image_folder):
    return image_folder(tmp_path / "photos", train=dict.fromkeys("abcd", 2), val=dict.fromkeys("abcd", 1))


@pytest.mark.slow
@pytest.mark.parametrize("known_by", ["sweep.json", "metrics.json"])
def test_a_sweep_whose_pictures_have_changed_is_refused(run_sweep, fakes, tmp_path, photos, known_by):
    options = {**SMALL, "data": f"folder:{photos}"}
    record = run_sweep(**options)["data"]
    assert record["source"] == f"folder:{photos}" and len(record["fingerprint"]["sha256"]) == 64
    if known_by == "metrics.json":
        path = tmp_path / "sweep" / "runs" / "apt-kdp-1" / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "data": record}))
        (tmp_path / "sweep" / "sweep.json").unlink()
    one, two = photos / "train" / "a" / "000.png", photos / "train" / "b" / "000.png"
    one.rename(tmp_path / "x")  # exchanged: the same names and numbers of files
    two.rename(one)
    (tmp_path / "x").rename(two)
    fakes.started.clear()
    refused(lambda: run_sweep(**{**options, "seeds": "0,1,2"}), "not the images that", "other pictures of a, b")
    assert fakes.started == []


def test_a_sweep_tells_of_an_accent_that_is_written_in_the_other_way(tmp_path, image_folder):
    """It was a class that had gone and a new one of the same looks."""
    begun, now = (image_folder(tmp_path / n, train={n: 2, "b": 2}, val={n: 1, "b": 1}) for n in SPELT)
    record = load_dataset(f"folder:{begun}").record
    refused(lambda: module._check_images(tmp_path, record, load_dataset(f"folder:{now}")), "reads like the class")


@pytest.mark.slow
def test_a_sweep_whose_pictures_have_moved_goes_on(run_sweep, fakes, tmp_path, photos):
    lines = []
    run_sweep(**{**SMALL, "data": f"folder:{photos}"})
    fakes.started.clear()
    moved = photos.rename(tmp_path / "elsewhere")
    assert run_sweep(lines=lines, **{**SMALL, "data": f"folder:{moved}"})["failed"] == [] and fakes.started == []
    assert lines[0] == f"folder:{moved}: 4 classes, 8 train, 4 validation, 0 left out"


@pytest.mark.slow
def test_a_sweep_of_an_early_version_keeps_its_source(run_sweep, tmp_path, photos):
    run_sweep(**{**SMALL, "data": f"folder:{photos}"})
    path = tmp_path / "sweep" / "sweep.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "data"}))
    refused(lambda: run_sweep(**SMALL), "was started with other options", "data='digits'")
    assert run_sweep(**{**SMALL, "data": f"folder:{photos}"})["failed"] == []


@pytest.mark.slow
def test_finished_cells_are_not_run_again(run_sweep, fakes):
    first = run_sweep(**SMALL)
    fakes.started.clear()
    assert run_sweep(**SMALL) == {**first, "processes": {"parallel": 2, "threads": 1}}
    assert fakes.started == []


@pytest.mark.slow
def test_the_grid_may_grow_and_the_baseline_change(run_sweep, fakes):
    run_sweep(**SMALL)
    fakes.started.clear()
    document = run_sweep(**{**SMALL, "seeds": "0,1,2", "distillers": "none,kd,kdp", "baseline": "kdp"})
    new = {f"{le}-{d}-2" for le in ("l2p", "apt") for d in ("none", "kdp")}
    assert set(fakes.started) == new | {f"{le}-kd-{s}" for le in ("l2p", "apt") for s in (0, 1, 2)}
    assert document["grid"]["baseline"] == "kdp"


@pytest.mark.slow
def test_files_are_written_after_every_cell(run_sweep, fakes, tmp_path):
    seen = []

    def look(cell):
        document = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
        states = [c["state"] for c in document["cells"]]
        seen.append((states.count("finished"), (tmp_path / "sweep" / "report.html").is_file()))

    fakes.on_poll = look
    run_sweep(parallel=1, **SMALL)
    assert {n for n, _ in seen} == set(range(8)) and all(page for _, page in seen)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_cell_is_listed_and_run_again_next_time(run_sweep, fakes, tmp_path):
    fakes.exit_codes = {"l2p-kdp-1": 1, "apt-none-0": -9}
    lines = []
    document = run_sweep(lines=lines, **SMALL)
    assert document["failed"] == ["apt-none-0", "l2p-kdp-1"]
    states = {c["name"]: (c["state"], c["reason"]) for c in document["cells"]}
    assert states["l2p-kdp-1"] == ("failed", "exit code 1: error: no good")
    assert states["apt-none-0"] == ("failed", "killed by signal 9: error: no good")
    assert sum(s == "finished" for s, _ in states.values()) == 6
    assert "    error: no good" in lines and any("l2p-kdp-1: FAILED" in line and ".log" in line for line in lines)
    row = next(r for r in document["rows"] if (r["learner"], r["distiller"]) == ("l2p", "kdp"))
    assert row["missing"] == [1] and row["difference"]["average_accuracy"]["note"] == "one seed: no test"
    text = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "## Failed" in text and "error: no good" in text and "one seed: no test" in text
    fakes.exit_codes, fakes.started = {}, []
    assert run_sweep(**SMALL)["failed"] == []
    assert sorted(fakes.started) == ["apt-none-0", "l2p-kdp-1"]


def test_a_cell_that_ends_well_without_results_has_failed(run_sweep, fakes, tmp_path):
    fakes.writes = False
    document = run_sweep(learners="l2p", distillers="none", seeds="0")
    assert document["failed"] == ["l2p-none-0"] and document["cells"][0]["reason"] == "exit code 0"


def test_left_out_combinations_are_said_first(run_sweep, fakes):
    lines = []
    document = run_sweep(lines=lines, learners="l2p,apt", distillers="none,cdl-prompt", seeds="0")
    assert lines[1].startswith("left out: apt with cdl-prompt, two-pass, head auto: ")
    assert document["refused"][0]["distiller"] == "cdl-prompt" and "apt-cdl-prompt-0" not in fakes.started


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.slow
def test_other_options_are_refused(run_sweep, fakes, tmp_path):
    run_sweep(epochs=3, **SMALL)
    before = {p: p.read_bytes() for p in (tmp_path / "sweep").rglob("*") if p.is_file()}
    fakes.started.clear()
    refused(lambda: run_sweep(epochs=4, **SMALL), "was started with other options", "epochs=4", "epochs=3", "--out")
    refused(lambda: run_sweep(epochs=3, student="file:x", **SMALL), "other options", "backbones", "file:x")
    refused(lambda: run_sweep(**{**SMALL, "epochs": 4, "seeds": "7"}), "other options")  # also where no cell is shared
    assert fakes.started == [] and before == {p: p.read_bytes() for p in before}
    assert run_sweep(epochs=3, devices="cpu", **SMALL)["failed"] == []  # where it runs is no other sweep


@pytest.mark.slow
def test_a_run_of_other_options_is_refused(run_sweep, tmp_path):
    run_sweep(epochs=3, **SMALL)
    (tmp_path / "sweep" / "sweep.json").unlink()
    refused(lambda: run_sweep(epochs=4, **SMALL), "runs/l2p-none-0: was started with other options", "epochs=3 (now 4)")


def test_a_folder_of_something_else_is_refused(run_sweep, fakes, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "holiday.jpg").write_bytes(b"x")
    refused(lambda: run_sweep(**SMALL), "is not a sweep", "holiday.jpg")
    (tmp_path / "file").write_text("x")
    refused(lambda: run_sweep(out=tmp_path / "file", **SMALL), "is a file")
    assert fakes.started == [] and files(tmp_path / "sweep") == {"holiday.jpg"}


@pytest.mark.slow
def test_a_sweep_that_was_killed_before_its_first_table_is_continued(run_sweep, tmp_path):
    (tmp_path / "sweep" / "cells").mkdir(parents=True)
    (tmp_path / "sweep" / ".lock").touch()
    assert run_sweep(**SMALL)["failed"] == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": {"data": "digits"}}'])
def test_a_damaged_record_is_refused(run_sweep, tmp_path, text):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(text)
    refused(lambda: run_sweep(**SMALL), "sweep.json: damaged")


def test_wrong_data_is_one_message_before_anything_is_written(run_sweep, fakes, tmp_path):
    refused(lambda: run_sweep(**{**SMALL, "data": f"folder:{tmp_path}/nowhere"}), "nowhere: no such folder")
    assert not (tmp_path / "sweep").exists() and fakes.started == []


@pytest.mark.parametrize("name", ["parallel", "threads"])
@pytest.mark.parametrize("value", [0, "2", True])
def test_sizes(run_sweep, name, value):
    refused(lambda: run_sweep(**{**SMALL, name: value}), f"--{name} is out of range")


@pytest.mark.slow
def test_a_second_sweep_in_the_folder_is_refused(run_sweep, tmp_path):
    lock = hold(tmp_path / "sweep" / ".lock")
    refused(lambda: run_sweep(**SMALL), "a sweep runs there now")
    lock.close()
    assert run_sweep(**SMALL)["failed"] == []


# -- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_stops_the_cells_and_the_same_command_continues(run_sweep, fakes, tmp_path):
    lines = []

    def stop(cell):
        if cell.name == "apt-kdp-0":
            os.kill(os.getpid(), signal.SIGTERM)

    fakes.on_poll = stop
    with pytest.raises(KeyboardInterrupt):
        run_sweep(lines=lines, **SMALL)
    assert "apt-kdp-0" in fakes.stopped and fakes.running == 0
    assert "the same command continues" in lines[-1]
    document = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert "running" not in {c["state"] for c in document["cells"]}
    done = {c["name"] for c in document["cells"] if c["state"] == "finished"}
    fakes.on_poll, fakes.started = (lambda cell: None), []
    assert run_sweep(**SMALL)["failed"] == []
    assert set(fakes.started) == {c["name"] for c in document["cells"]} - done


@pytest.mark.slow
def test_a_cell_that_an_orphan_still_works_on_is_not_started(run_sweep, fakes, tmp_path):
    lock = hold(tmp_path / "sweep" / "cells" / ".l2p-kdp-0.lock")

    def release(cell):
        if len(fakes.started) == 7:
            assert "l2p-kdp-0" not in fakes.started
            lock.close()

    fakes.on_poll = release
    assert run_sweep(**SMALL)["failed"] == []
    assert fakes.started[-1] == "l2p-kdp-0" and len(fakes.started) == 8


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command(cli, fakes, tmp_path):
    arguments = (
        "sweep",
        "--data",
        "digits",
        "--out",
        tmp_path / "s",
        "--parallel",
        2,
        "--threads",
        1,
        "--seeds",
        "0,1",
    )
    arguments += ("--learners", "l2p", "--distillers", "none,kdp", "--epochs", 3)
    answer = cli(*arguments)
    assert answer.code == 0 and "| l2p " in answer.out and "| kdp " in answer.out and "[4/4]" in answer.err
    answer = cli(*arguments, "--json")
    assert answer.json == json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert answer.out.count("\n") == 1
    cli(*arguments[:-1], 4).assert_refused("was started with other options")
    cli("sweep", "--out", tmp_path / "t").assert_refused("data")
    fakes.exit_codes["l2p-none-7"] = 1
    answer = cli(*arguments, "--seeds", "7", "--json")
    assert answer.code == 1 and answer.json["failed"] == ["l2p-none-7"]
    assert answer.json["rows"][1]["n"] == 1


def test_a_file_of_options(cli, fakes, tmp_path):
    options = {
        "data": "digits",
        "learners": ["l2p", "apt"],
        "distillers": "none",
        "seeds": [5],
        "epochs": 3,
        "parallel": 1,
    }
    (tmp_path / "options.json").write_text(json.dumps({**options, "out": "ignored: the command line wins"}))
    answer = cli("sweep", "--config", tmp_path / "options.json", "--out", tmp_path / "s", "--epochs", 4, "--json")
    assert answer.json["settings"]["epochs"] == 4
    assert sorted(fakes.started) == ["apt-none-5", "l2p-none-5"]
    (tmp_path / "options.json").write_text(json.dumps({**options, "learner": "l2p"}))
    answer = cli("sweep", "--config", tmp_path / "options.json", "--out", tmp_path / "t")
    answer.assert_refused("unknown sweep option", "learners")


def test_every_option_of_train_is_one_of_sweep():
    from cdl_edge.cli import cli as group
    from cdl_edge.sweep.grid import SETTINGS

    given = {p.name for p in group.commands["sweep"].params}
    assert given >= set(SETTINGS) - {"decoder", "compat_schema", "token_weight"}
    assert len(given) == len(group.commands["sweep"].params)


@pytest.mark.slow
def test_from_python(fakes, tmp_path):
    code = "import cdl_edge, cdl_edge.sweep.processes\nfrom cdl_edge import sweep\nassert callable(sweep)\n"
    subprocess.run([sys.executable, "-c", code], check=True)
    from cdl_edge import api

    document = api.sweep(tmp_path / "s", parallel=1, say=lambda line: None, data="digits", learners="l2p", seeds=0)
    assert [r["distiller"] for r in document["rows"]] == ["none", "kd", "kdp"]
    assert document["schema"] == module.SCHEMA


def test_help_names_exactly_what_there_is():
    from cdl_edge.cli import cli as group
    from cdl_edge.sweep.grid import LISTS, SEEDS
    from cdl_edge.sweep.presets import PRESETS

    text = {p.name: p.help for p in group.commands["sweep"].params}
    for name, (_, _, default) in LISTS.items():
        assert name == "heads" or text[name].endswith(f"[default: {','.join(default)}]")
    assert text["seeds"].endswith(f"[default: {','.join(map(str, SEEDS))}]")
    assert text["preset"].partition(":")[0].split(" | ") == list(PRESETS)
