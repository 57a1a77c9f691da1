"""The commands of a device: all that run without the extra `train`. They parse, and call the function in api.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import click

from .artefacts.layout import MANIFEST, METRICS
from .cli_enrol import enrol
from .cli_options import (
    Outer,
    backend_option,
    emit,
    json_option,
    pictures_option,
    precision_option,
    say,
    threads_option,
)
from .cli_pack import pack
from .errors import InputError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--graph", default="student", show_default=True, help="student | query | prompted")
@click.option("--precision", help="fp32 | fp16 | int8 [default: what the bundle recommends, else fp32]")
@click.option("--workspace-mib", type=click.IntRange(1), help="memory the builder may use [default: 1024]")
@click.option("--level", type=click.IntRange(0, 5), help="how long to look for fast kernels [default: 3]")
@click.option(
    "--max-batch", type=click.IntRange(1), help="largest batch, if exported with --dynamic-batch [default: 8]"
)
@click.option("--unfuse-attention", is_flag=True, help="keep attention in parts, should fused kernels be wrong")
@click.option("--no-refit", is_flag=True, help="an engine that has to be built again for every update")
@click.option("--rebuild", is_flag=True, help="build even where a fitting engine is kept")
@json_option
def build(
    bundle: Path, graph: str, precision: str | None, rebuild: bool, no_refit: bool, as_json: bool, **options: Any
) -> None:
    """Build the TensorRT engine of a bundle for the GPU of this device, and prove it; predict would do it unasked."""
    from . import api

    given = {key: value for key, value in options.items() if value is not None}
    result = api.build(bundle, graph, precision, rebuild, refit=not no_refit, **given)
    emit(result, as_json, f"engine: {result['engine']} ({result['seconds']:.0f} s)")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE|FOLDER...")
@click.option("--task", type=click.IntRange(1), help="only the classes of this task compete (the first is 1)")
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="classes to list")
@click.option(
    "--policy",
    default="exact",
    show_default=True,
    help="exact | pinned | sticky: who selects the prompts: each image, --task, or an earlier image of the stream",
)
@backend_option
@precision_option
@threads_option
@json_option
def predict(
    bundle: Path,
    images: tuple[Path, ...],
    task: int | None,
    top: int,
    policy: str,
    backend: str,
    precision: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Classify images; says which prompts were selected, how sure the student is, and which task they look like.

    A folder stands for the pictures below it. One that cannot be read does not stop the others; exit code 1 then.
    """
    from . import api
    from .display import prediction_line

    index = None if task is None else task - 1
    result = api.predict(bundle, images, index, top, backend, threads, precision, policy, say)
    lines = []
    for p in result["predictions"]:
        lines.append(prediction_line(p, p["image"]))
        lines += [f"    {t['label']} ({100 * t['probability']:.1f} %)" for t in p.get("top", [])[1:]]
    lines.append(f"by {result['backend']} in {result['precision']}")
    lines += [f"{name}: {text}" for name, text in result["definitions"].items()]
    for broken in result["unreadable"]:
        say(f"left out: {broken['reason']}")
    emit(result, as_json, "\n".join(lines))
    if result["unreadable"]:
        sys.exit(1)


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--stage", default="end_to_end_ms", show_default=True, help="what to compare; a --trace file has all")
@click.option(
    "--floor",
    type=float,
    help="difference that counts at all, as a share [default: 0.02, or what the machine wandered within a run]",
)
@json_option
def compare(a: Path, b: Path, stage: str, floor: float | None, as_json: bool) -> None:
    """Is B faster than A, or is it noise? A and B: files of `profile --json` or `profile --trace`."""
    from . import api

    result = api.compare(a, b, stage=stage, floor=floor)
    low, high = result["interval"]
    lines = [
        f"{stage} p50: A {result['a']['p50_ms']:.3f} ms, B {result['b']['p50_ms']:.3f} ms",
        f"B / A {result['ratio']:.3f}, 95 % interval {low:.3f} to {high:.3f}, counts from {result['floor']:.1%}",
        f"B: {result['verdict']}",
        *(f"warning: {w}" for w in result["warnings"]),
    ]
    emit(result, as_json, "\n".join(lines))


class ProfileCommand(Outer):
    """`profile BUNDLE`, and `profile compare A B`."""

    inner: ClassVar[dict[str, click.Command]] = {"compare": compare}


@click.command(cls=ProfileCommand, epilog="To compare two: cdl-edge profile compare A B (with its own --help).")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--runs", type=click.IntRange(1), help="timed calls [default: 1000, or as many as 10 s allow]")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="real image(s) to use in turn")
@click.option("--trace", type=click.Path(path_type=Path), help="write every sample as JSON")
@backend_option
@precision_option
@threads_option
@json_option
def profile(
    bundle: Path,
    runs: int | None,
    images: tuple[Path, ...],
    trace: Path | None,
    backend: str,
    precision: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Latency of one image a call: decode and preprocess, compute, end to end."""
    from . import api
    from .display import latency_table

    result = api.profile(bundle, backend, threads, runs, list(images) or None, trace=trace, precision=precision)
    context = result["context"]
    flags = ", ".join(result["flags"]) or "none"
    how = f"backend {result['backend']}, {context['precision']}, threads {context.get('threads')}, flags: {flags}"
    text = f"{latency_table(result)}\n{how}"
    emit(result, as_json, text)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """What a bundle holds: classes, tasks, learner, sizes, parity, accuracy."""
    from . import api

    result = api.inspect(bundle)
    shown = {k: v for k, v in result.items() if k not in ("classes", "tasks", "files")}
    lines = [f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in shown.items() if v is not None]
    lines += [f"task {i + 1}: {', '.join(names)}" for i, names in enumerate(result["tasks"])]
    emit(result, as_json, "\n".join(lines))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@backend_option
@precision_option
@json_option
def validate(bundle: Path, backend: str, precision: str | None, as_json: bool) -> None:
    """Check every hash, load the graph, run a picture through it."""
    from . import api

    result = api.validate(bundle, backend, precision)
    emit(result, as_json, f"{bundle}: valid ({'; '.join(result['checks'])})")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one")
@click.option("--queue", type=click.IntRange(0), default=32, show_default=True, help="requests that may wait")
@click.option("--runners", type=click.IntRange(1), default=1, show_default=True, help="calls at the same time")
@click.option(
    "--limit",
    "limit_s",
    type=float,
    default=10.0,
    show_default=True,
    help="seconds that a call of the engine may take, before /health says that it is stuck",
)
@click.option("--name", default="", help="model name in the Open Inference Protocol [default: the bundle's folder]")
@click.option(
    "--collect",
    type=click.Path(path_type=Path),
    help="folder to keep pictures in that get no sure answer [default: none]",
)
@click.option(
    "--watch",
    is_flag=True,
    help="put in every version that becomes current on the disk, as by `pack install` or `enrol`",
)
@click.option("--token", envvar="CDL_EDGE_TOKEN", help="who has it may install packs [default: the file's]")
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="holds the token; made where it is missing, mode 600"
)
@click.option(
    "--public-key", type=click.Path(path_type=Path), help="Ed25519 public key (PEM) that packs must be signed by"
)
@click.option("--allow-unsigned", is_flag=True, help="take packs without a signature where no key is known")
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), help="Unix socket where packs need no token")
@backend_option
@precision_option
@threads_option
def serve(bundle: Path, **options: Any) -> None:
    """Answer over HTTP: predict, batch, health, metrics, the Open Inference Protocol, and a page to look at."""
    from . import api

    api.serve(bundle, say=say, **options)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """What this machine has, what is missing, and the command that mends it."""
    from . import api

    result = api.doctor()
    lines = []
    for check in result["checks"]:
        lines.append(f"{check['status']:>5}  {check['name']}: {check['detail']}")
        if check.get("fix"):
            lines.append(f"         do: {check['fix']}")
    emit(result, as_json, "\n".join(lines))
    if any(check["status"] == "fail" for check in result["checks"]):
        sys.exit(1)


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="RUN|BUNDLE")
@click.option("--data", required=True, help="image source, see `train --help`")
@click.option("--limit-per-class", type=click.IntRange(1), help="images a class [default: all]")
@click.option(
    "--split",
    default="auto",
    show_default=True,
    help="auto | val | test | train | all: the images that count. auto: those of val/, or of test/ without one; of "
    "class folders without parts all, unless the student was trained on them: then the held-out fifth",
)
@backend_option
@precision_option
@threads_option
@json_option
def evaluate(
    source: Path,
    data: str,
    limit_per_class: int | None,
    split: str,
    backend: str,
    precision: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Accuracy per task on images that were not trained on, of a trained RUN (torch) or a BUNDLE (as deployed)."""
    from . import api

    result = api.evaluate(source, data, limit_per_class, backend, threads, precision, split, say)
    for line in result["skipped"]:
        say(f"left out: {line}")
    if (unknown := result["left_out"])["images"]:
        say(f"left out: {unknown['images']} image(s) of {unknown['classes']} class(es) that the student has not learnt")
    per_task = " ".join("-" if a is None else f"{a:.1f}" for a in result["per_task"])
    forgetting = "unknown" if result["forgetting"] is None else f"{result['forgetting']:.2f} points"
    text = f"average accuracy {result['average_accuracy']:.2f} %, forgetting {forgetting}, {result['images']} images, "
    text += f"{result['backend']} in {result['precision']}\n"
    if "baseline" in result:  # of a run
        from .display import baseline_line, baseline_warning

        text += f"{baseline_line(result['average_accuracy'], result['baseline'])}\n"
        if (warning := baseline_warning(result["average_accuracy"], result["baseline"])) is not None:
            say(warning)
    text += f"per task %: {per_task}\n" + "\n".join(f"{k}: {v}" for k, v in result["definitions"].items())
    emit(result, as_json, text)


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN|BUNDLE...")
@click.option(
    "--profile",
    "profile_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="the saved output of `profile --json`",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help=".html file to write")
@pictures_option
@json_option
def report(
    sources: tuple[Path, ...], profile_file: Path | None, out: Path, pictures: bool | None, as_json: bool
) -> None:
    """One self-contained HTML page about a run, a bundle, or both."""
    from . import api
    from .artefacts.bundle import VERSIONS

    bundles = [s for s in sources if (s / MANIFEST).is_file() or (s / VERSIONS).is_dir()]  # a store of bundles, too
    runs = [s for s in sources if s not in bundles and (s / METRICS).is_file()]
    for source in sources:
        if source not in (*bundles, *runs):
            raise InputError(
                f"{source}: neither a finished run nor a bundle", expected="metrics.json or manifest.json in it"
            )
    for found, kind in ((runs, "run"), (bundles, "bundle")):
        if len(found) > 1:
            raise InputError(
                f"a page is about one {kind}",
                got=", ".join(map(str, found)),
                expected=f"one {kind}, and what belongs to it",
                fix="write a page for each",
            )
    run, bundle = next(iter(runs), None), next(iter(bundles), None)
    measured = None
    if profile_file is not None:
        text = profile_file.read_text(encoding="utf-8", errors="replace").strip()
        try:
            measured = json.loads(text if text.startswith("{") else (text.splitlines() or [""])[-1])
        except json.JSONDecodeError as error:
            raise InputError(f"{profile_file}: not the output of `profile --json`", got=str(error)) from error
        if not isinstance(measured, dict):
            raise InputError(f"{profile_file}: not the output of `profile --json`", got=type(measured).__name__)
    path = api.report(out, run, bundle, measured, pictures is not False)
    emit({"report": str(path)}, as_json, f"report: {path}")


COMMANDS = (build, predict, evaluate, profile, inspect, validate, pack, enrol, serve, report, doctor)
