"""The command line: its entry point, and the commands that need the extra `train`; cli_device.py has the others.

They parse, and call the function of their name in api.py. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from . import __version__
from .cli_device import COMMANDS
from .cli_options import (
    NOTHING_WRITTEN,
    emit,
    force_option,
    json_option,
    pictures_option,
    resumable,
    say,
    threads_option,
)
from .cli_watch import watch
from .errors import GateError, InputError, command_line
from .extras import command, extra_of
from .files import first_process
from .heartbeat import heartbeat


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cdl-edge")
def cli() -> None:
    """From a folder of photographs to a small, fast classifier on an edge device.

    \b
    train      the student (and a teacher), task by task    images  -> RUN
    sweep      many trainings and their comparison          images  -> table
    export     the student as a static graph, proven equal  RUN     -> BUNDLE
    calibrate  8 bits, without the images of earlier tasks  BUNDLE  -> BUNDLE
    predict, evaluate, profile, report, serve, watch        BUNDLE  -> answers
    enrol      a new class from ten pictures, on the device BUNDLE  -> BUNDLE
    pack       updates of a bundle, in kilobytes            BUNDLE  -> PACK -> BUNDLE

    Start with `cdl-edge quickstart`. Exit codes: 0 done, 1 failed, 2 wrong usage or bad input.
    """


def main() -> None:
    """Entry point: a user's error prints one message and exits with 2, a bug keeps its trace and exits with 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # class names are the user's: never die of a terminal without UTF-8
            stream.reconfigure(errors="backslashreplace")
    waits = sys.argv[1:2] in (["serve"], ["watch"])  # for requests, for frames: silence means nothing
    try:
        with contextlib.nullcontext() if waits else heartbeat():
            cli(prog_name="cdl-edge")
    except GateError as error:
        say(f"failed: {error}")
        sys.exit(1)
    except InputError as error:
        if not first_process():  # it says the same, and torchrun ends the others; unless the error is ours alone
            time.sleep(60)
        say(f"error: {error}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = extra_of(error)
        if extra is None:
            raise
        name = next((word for word in sys.argv[1:] if not word.startswith("-")), "this")
        click.echo(f"error: `{name}` needs {error.name}, of the extra `{extra}`: {command(extra)}", err=True)
        sys.exit(2)


def merged(config: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a JSON file, those of the command line in front of them.

    Raises: InputError for a file that is no JSON object, and for a name that the command line does not have.
    """
    stored: dict[str, Any] = {}
    if config is not None:
        try:
            stored = json.loads(config.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{config}: not JSON", got=str(error)) from error
        if not isinstance(stored, dict):
            raise InputError(f"{config}: not a JSON object", got=type(stored).__name__, expected='{"data": ...}')
        for name in ("say", "quiet"):  # of the functions in api.py, which would take them
            if name in stored:
                raise InputError(f"{config}: unknown option", got=name, fix="leave it out")
        for name in ("resume", "pictures"):
            if not isinstance(stored.get(name, False), bool):
                raise InputError(f"{config}: {name} is a switch", got=repr(stored[name]), expected="true or false")
    return {**stored, **{k: v for k, v in options.items() if v is not None}}


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("quickstart"), show_default=True, help="folder")
@click.option("--data", default="digits", show_default=True, help="image source, see `train --help`")
@threads_option
@json_option
def quickstart(out: Path, data: str, threads: int | None, as_json: bool) -> None:
    """The whole way once: train, export, calibrate, evaluate, profile, report. No network, minutes on two cores."""
    from . import api

    text: list[str] = []
    with resumable(f"nothing was finished; remove {out}, or give another --out, and start again"):
        document = api.quickstart(data, out, say, threads, text.append)
    emit(document, as_json, "\n".join(text))


@cli.command()
@click.option("--data", required=True, help="image source whose classes are learnt, see `train --help`")
@click.option(
    "--arch",
    required=True,
    help="hybrid-student | hybrid-teacher | convnet | teacher | student | teacher-plain | student-plain",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help=".safetensors file to write")
@click.option("--epochs", type=click.IntRange(1), help="passes over the images [default: 40; hybrids 5]")
@click.option("--batch-size", type=click.IntRange(1), help="images of one step [default: 256]")
@click.option(
    "--learning-rate", type=float, help="peak [default: 0.2 for convnet (SGD), 0.001 for a ViT (AdamW), hybrids 0.0005]"
)
@click.option("--trunk", help="hybrids: file with the published weights of the trunk")
@click.option("--distill-from", help="what to learn from: a convnet made by this command; hybrids: weights of lite2")
@click.option("--views", type=click.IntRange(1), help="hybrids: of each image, itself and random crops [default: 2]")
@click.option("--limit-per-class", type=click.IntRange(1), help="hybrids: training images a class [default: all]")
@click.option("--freeze-stem", is_flag=True, help="teacher: keep the convnet's stem, computed once for both")
@click.option("--seed", type=int, default=0, show_default=True, help="of initial values and batches")
@click.option("--resume", is_flag=True, help="continue from the checkpoint beside --out")
@threads_option
@json_option
def pretrain(out: Path, resume: bool, threads: int | None, as_json: bool, **options: Any) -> None:
    """Make a small backbone from an image folder; a checkpoint after every epoch."""
    from . import api

    with resumable(f"{out}: the last whole epoch is kept; go on with the same command and --resume"):
        result = api.pretrain(resume, say, threads, out=str(out), **options)
    emit(result, as_json, f"{result['out']}: {result['val_accuracy']:.2f} % on the validation images")


@cli.command()
@click.option(
    "--data",
    help="digits | folder:PATH (PATH/train/<class>/*, PATH/val/<class>/*, or PATH/<class>/* with a "
    "fifth of each class held out) | cifar100[:PATH] | imagenet-r:PATH; needed, here or in --config",
)
@click.option("--out", help="run folder to write; needed, here or in --config")
@click.option(
    "--teacher",
    help="full timm tag | hf-hub:ORG/NAME | local-dir:PATH | file:PATH.safetensors | builtin:teacher "
    "[default: builtin:teacher]",
)
@click.option("--student", help="likewise [default: builtin:student]")
@click.option("--teacher-arch", help="timm model that a file is of [default: the file or its config.json says so]")
@click.option("--student-arch", help="likewise [default: the file or its config.json says so]")
@click.option("--image-size", type=int, help="side of the images, pixels [default: each backbone's own]")
@click.option("--teacher-image-size", type=int, help="of the teacher's images [default: --image-size]")
@click.option(
    "--learner",
    help="l2p | dualprompt | coda | apt | finetune | frozen [default: frozen, without prompts; coda where an option "
    "asks for prompts]",
)
@click.option(
    "--distill",
    help="none | kd | dkd | fitnets | reviewkd | two-heads | kd-token | kdp | cdl-prompt | blockwise | m2kd "
    "[default: none, kdp with a prompt learner]",
)
@click.option(
    "--query", help="two-pass | one-pass | one-pass-patches: where pool learners get their query [default: two-pass]"
)
@click.option("--tasks", type=int, help="tasks the classes are cut into [default: 1]")
@click.option("--epochs", type=int, help="passes over a task's images, for each side [default: 20]")
@click.option("--batch-size", type=int, help="images of one step, over all processes [default: 64]")
@click.option("--learning-rate", type=float, help="Adam's peak [default: 0.005]; 0.001 with --compat")
@click.option("--seed", type=int, help="of class order, initial values, batches [default: 0]")
@click.option("--limit-per-class", type=int, help="training images a class [default: all]")
@click.option(
    "--augment", help="auto | none | crop-flip [default: auto: crop-flip for photographs where heads are learnt]"
)
@click.option("--alpha", type=float, help="share of distillation, and of the KD head [default: 0.5]")
@click.option("--tau", type=float, help="temperature [default: the distiller's, 2; dkd 4]")
@click.option("--query-regulariser", type=float, help="one-pass training: weight of the OS-Prompt term [default: 0]")
@click.option("--kd-blocks", type=int, help="blocks with KD prompts [default: 12]")
@click.option("--kd-length", type=int, help="KD rows a block, half keys, half values [default: 6]")
@click.option(
    "--head",
    help="learned | ncm | slda | ranpac | aligned: what answers; all but the first are made from class statistics "
    "after each task [default: ranpac; learned with --compat or finetune]",
)
@click.option("--random-features", type=int, help="of --head ranpac [default: 2000]")
@click.option(
    "--prompt-tasks",
    type=int,
    help="tasks in which prompts learn [default: 1 for heads from statistics, all for learned ones]",
)
@click.option(
    "--min-steps", type=int, help="steps of a task at least, in more epochs if need be [default: 200]; 0 with --compat"
)
@click.option("--kd-head", help="learner | linear | normalised: kind of the KD head [default: learner]")
@click.option("--apt-momentum", type=float, help="c, the old prompt's share in APT's merged one [default: 0.7]")
@click.option("--exemplars", type=int, help="m2kd: training images kept of each earlier class [default: 0]")
@click.option("--retrain-epochs", type=int, help="m2kd, finetune: epochs after pruning [default: 0]")
@click.option("--pruned", help="m2kd, finetune: pretrained | zero: what pruned weights become [default: pretrained]")
@click.option("--compat/--no-compat", default=None, help="behave as the authors' code does [default: no]")
@click.option("--resize-rule", help="cut | pad | squash: how a picture becomes a square [default: cut]")
@click.option("--precision", help="auto | fp32 | bf16, of training [default: auto]")
@click.option("--teachers", help="folder of trained teachers, filled and used again [default: train anew]")
@click.option("--range-images", type=int, help="images a task whose ranges are kept, for INT8; 0: none [default: 256]")
@click.option("--devices", help="auto | cpu | cuda [default: auto]; several processes: see docs/methods.md")
@click.option(
    "--extend",
    metavar="RUN",
    help="finished run to go on from: --data has its classes and new ones, --tasks (else 1) cuts the new ones, all "
    "other options are the run's [default: start anew]",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file of these options; the command line wins",
)
@click.option("--resume", is_flag=True, help="continue a stopped run to the same numbers")
@pictures_option
@threads_option
@json_option
def train(config: Path | None, resume: bool, pictures: bool | None, as_json: bool, **options: Any) -> None:
    """Train a student, and a teacher where it distils, on one task after another; write a RUN folder."""
    given = merged(config, {**options, "resume": resume or None, "pictures": pictures})
    from . import api
    from .artefacts.layout import REPORT
    from .artefacts.run_record import Metrics
    from .display import accuracy_table, baseline_line, baseline_warning, forgetting_line

    with resumable(f"{given.get('out')}: the last whole epoch is kept; go on with the same command and --resume"):
        metrics = Metrics.of(api.train(**given), "what train returned")
    out = str(metrics.config["out"])
    report = Path(out) / REPORT
    keys = ("average_accuracy", "forgetting", "matrix")
    sides = {name: {k: getattr(side, k) for k in keys} for name, side in metrics.sides.items()}
    data = {k: v for k, v in (metrics.data or {}).items() if k not in ("source", "fingerprint", "before")} or None
    found, baseline = metrics.student.average_accuracy, metrics.document.get("baseline")
    document = {
        "student": None,
        "teacher": None,
        **sides,
        "baseline": baseline,
        "seconds": metrics.seconds,
        "data": data,
    }
    document |= {"run": out, "report": str(report)}
    lines = [accuracy_table(metrics), "", baseline_line(found, baseline), forgetting_line(metrics.student), ""]
    text = "\n".join(line for line in lines if line is not None)
    if (warning := baseline_warning(found, baseline, metrics.config)) is not None and first_process():
        say(warning)
    defined = [k for k in ("average_accuracy", "forgetting", "baseline") if k in metrics.definitions]
    text += "\n" + "\n".join(f"{k}: {metrics.definitions[k]}" for k in defined)
    emit(
        document, as_json, f"{text}\n\nrun: {out}   report: {report}\nnext: {command_line('export', out)} --out BUNDLE"
    )


@cli.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="sweep folder to write, or to continue")
@click.option("--learners", help="names with commas, frozen among them [default: l2p,dualprompt,coda,apt]")
@click.option("--distillers", help="names with commas [default: none,kd,kdp]")
@click.option("--queries", help="two-pass | one-pass | one-pass-patches, several with commas [default: two-pass]")
@click.option("--heads", help="heads of train with commas [default: what train takes by itself: ranpac]")
@click.option("--seeds", help="numbers with commas; each draws its own class order [default: 0,1,2]")
@click.option("--baseline", help="distiller that the others are compared with [default: none, or the first]")
@click.option("--preset", help="paper-cifar100 | paper-imagenet-r: a published table, ours beside it")
@click.option("--teachers", help="folder of trained teachers, filled and used again [default: teachers/ in --out]")
@click.option("--parallel", type=click.IntRange(1), help="runs at a time [default: what fits]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each run [default: its share of the cores]")
@json_option
def sweep(out: Path, config: Path | None, as_json: bool, **options: Any) -> None:
    """Train every learner with every distiller and seed, or what is missing of it; one table with a paired test.

    A run that fails is listed and does not stop the others; exit code 1 then. The same command continues.
    """
    from . import api
    from .sweep.markdown import markdown

    with resumable(f"{out}: finished runs and whole epochs are kept; the same command goes on"):
        result = api.sweep(say=say, **merged(config, {"out": out, **options}))
    emit(result, as_json, f"{markdown(result)}\nreport: {out / 'report.html'}")
    if result["failed"]:
        sys.exit(1)


# What the grid does not vary is given as to train.
VARIED = ("out", "learner", "distill", "query", "head", "seed", "resume", "teachers", "extend", "pictures", "threads")
sweep.params[8:8] = [p for p in train.params if p.name not in (*VARIED, "as_json")]


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="bundle folder to write")
@click.option("--profile", default="ort", show_default=True, help="ort | trt10 | trt11 | openvino: what will run it")
@click.option("--target", default="bundle", show_default=True, help="bundle | triton (a model repository)")
@click.option("--dynamic-batch", is_flag=True, help="a graph for any batch size (slower on one image)")
@click.option(
    "--images", type=click.IntRange(1), default=500, show_default=True, help="real images for the parity gate"
)
@click.option("--data", help="where the run's images are now, if they have moved [default: where they were]")
@click.option("--statistics", is_flag=True, help="put the class statistics into the bundle (ranpac: 16 MB)")
@force_option
@json_option
def export(
    run: Path,
    out: Path,
    profile: str,
    target: str,
    dynamic_batch: bool,
    images: int,
    data: str | None,
    statistics: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Fold a run's student into static ONNX graphs, prove them equal, write a BUNDLE."""
    from . import api
    from .display import parity_line

    with resumable(NOTHING_WRITTEN):
        result = api.export(run, out, profile, dynamic_batch, images, target, data, force, say, statistics)
    if target == "triton":
        text = f"model repository: {out}\nnext: tritonserver --model-repository {out}"
    else:
        text = f"bundle: {out}\nnext: {command_line('predict', out)} IMAGE"
    emit(result, as_json, f"{parity_line(result['parity'])}\n{text}")


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="bundle folder to write")
@click.option("--data", help="image source: all classes, or those whose images are still there [default: none needed]")
@click.option("--ranges", default="auto", show_default=True, help="auto | kept | images: where ranges come from")
@click.option("--method", default="max", show_default=True, help="max | percentile | entropy | mse: choice of scales")
@click.option(
    "--smooth",
    default="auto",
    show_default=True,
    help="auto | none | 0 to 1: even out channels after LayerNorms; auto: where 8 bits fall short without it",
)
@click.option(
    "--scheme", "--flavour", "schemes", multiple=True, help="int8-x86 | int8-arm | int8-trt [default: the profile's]"
)
@click.option("--images", type=click.IntRange(1), help="training images of each task of --data [default: 64]")
@click.option(
    "--max-drop", type=click.FloatRange(0), help="points that a task, and the average, may lose; needs --data"
)
@click.option("--search/--no-search", "searching", default=True, help="leave layers in float until --max-drop is met")
@click.option(
    "--opset",
    type=click.Choice(["21", "23"]),
    callback=lambda context, option, value: value and int(value),
    help="21: ONNX Runtime 1.23 (Python 3.10) loads it too; 23: faster on newer ones "
    "[default: 21 for int8-arm and where this machine has 1.23]",
)
@click.option("--limit-per-class", type=click.IntRange(1), help="validation images a class [default: all]")
@force_option
@json_option
def calibrate(bundle: Path, out: Path, force: bool, as_json: bool, **options: Any) -> None:
    """Add INT8 graphs to a bundle, from ranges kept while learning: the images of earlier tasks are not needed."""
    from . import api
    from .display import quantisation_table

    with resumable(NOTHING_WRITTEN):
        result = api.calibrate(bundle, out, say=say, replace=force, **options)
    emit(
        result,
        as_json,
        f"{quantisation_table(result)}\nbundle: {out}\nnext: {command_line('profile', out)} --precision int8",
    )


for each in (*COMMANDS, watch):
    cli.add_command(each)


if __name__ == "__main__":
    main()
