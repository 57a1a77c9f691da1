"""The commands of the command line as functions: `from cdl_edge import train, export, predict, ...`.

Each imports what it needs when it is called (`serve` is the server's own). All raise InputError for bad input, and
GateError where a gate is not passed. The command line calls these and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .api_packs import create_pack as create_pack
from .api_packs import install_pack as install_pack
from .api_packs import pull_packs as pull_packs
from .api_packs import push_pack as push_pack
from .api_packs import rollback as rollback
from .api_packs import trusted_keys as trusted_keys
from .api_packs import versions as versions
from .log import told
from .server import serve as serve

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from .train.options import SweepOptions, TrainOptions


def _silent(line: str) -> None:
    """Say nothing: what progress goes to that nobody asked for."""


def limit_threads(threads: int | None) -> None:
    """CPU threads of torch; None: OMP_NUM_THREADS, or the cores that are free. Raises: InputError."""
    import torch

    from .cores import default_threads
    from .errors import InputError

    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError("--threads is out of range", got=repr(threads), expected="a number of 1 or more")
    torch.set_num_threads(threads or default_threads())


def quickstart(
    data: str = "digits",
    out: Path | str = "quickstart",
    say: Callable[[str], None] = print,
    threads: int | None = None,
    show: Callable[[str], None] = _silent,
) -> dict[str, Any]:
    """The whole way once: train, export, calibrate, evaluate, profile, report.

    threads: see limit_threads. show: gets the results as text.
    """
    from .quickstart import quickstart as run

    limit_threads(threads)
    with told(say):
        document, text = run(data, Path(out))
    show(text)
    return document


def pretrain(
    resume: bool = False,
    say: Callable[[str], None] = print,
    threads: int | None = None,
    *,
    data: str,
    arch: str,
    out: str,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    trunk: str | None = None,
    distill_from: str | None = None,
    views: int | None = None,
    limit_per_class: int | None = None,
    freeze_stem: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Make a small backbone, see train.pretrain.PretrainConfig, for hybrids train.hybrid.HybridConfig; None: default.

    threads: see limit_threads.
    """
    from .errors import InputError, choose
    from .train.hybrid import HYBRIDS, HybridConfig, pretrain_hybrid
    from .train.pretrain import ARCHITECTURES, PretrainConfig
    from .train.pretrain import pretrain as run

    given = {
        "data": data,
        "arch": arch,
        "out": out,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "trunk": trunk,
        "distill_from": distill_from,
        "views": views,
        "limit_per_class": limit_per_class,
        "freeze_stem": freeze_stem,
        "seed": seed,
    }
    options: dict[str, Any] = {k: v for k, v in given.items() if v is not None and v is not False}
    choose("architecture", arch, [*ARCHITECTURES, *HYBRIDS])
    config: Any = HybridConfig if arch in HYBRIDS else PretrainConfig
    known = config.__dataclass_fields__
    if odd := [k for k in options if k not in known]:
        raise InputError(
            f"--{odd[0].replace('_', '-')} does not belong to --arch {arch}",
            expected=", ".join(f"--{k.replace('_', '-')}" for k in known),
        )
    if missing := [k for k, f in known.items() if k not in options and f.default is MISSING]:
        raise InputError(f"pretrain --arch {arch}: an option is missing", got="nothing", expected=missing[0])
    limit_threads(threads)
    with told(say):
        return dict((pretrain_hybrid if config is HybridConfig else run)(config(**options), resume))


def train(
    resume: bool = False,
    quiet: bool = False,
    threads: int | None = None,
    pictures: bool = True,
    **options: Unpack[TrainOptions],
) -> dict[str, Any]:
    """Train teacher and student on one task after another and write a RUN folder with its report.

    options: the fields of train.config.TrainConfig, `data` and `out` at least; with `extend` those not given are that
    run's. threads: of the CPU; None: as many as the run began with if it is resumed, else see limit_threads.
    pictures: show some validation pictures in the report. Returns: the contents of metrics.json.
    """
    from .artefacts.layout import REPORT
    from .files import first_process
    from .report.model_page import write_report
    from .train.config import TrainConfig
    from .train.extend import inherit
    from .train.loop import train as run

    given: dict[str, Any] = {**options}
    if given.get("extend") is not None:
        given = inherit(given)
    limit_threads(threads)
    config = TrainConfig.from_json(given)
    metrics = run(config, resume, quiet, keep_threads=threads is not None)
    folder = Path(config.out)
    if first_process():
        write_report(folder / REPORT, run=folder, pictures=pictures)
    return metrics


def sweep(
    out: Path | str,
    parallel: int | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = print,
    **options: Unpack[SweepOptions],
) -> dict[str, Any]:
    """Train a grid of learners, distillers, queries and seeds, or what is missing of it, and compare them.

    options: see sweep.grid.make_plan. Returns: the contents of OUT/sweep.json; `failed` names the cells that did.
    """
    from .sweep.sweep import sweep as run

    with told(say):
        return run(Path(out), {**options}, parallel, threads)


def export(
    run: Path | str,
    out: Path | str,
    profile: str = "ort",
    dynamic_batch: bool = False,
    images: int = 500,
    target: str = "bundle",
    data: str | None = None,
    replace: bool = False,
    say: Callable[[str], None] = _silent,
    statistics: bool = False,
) -> dict[str, Any]:
    """RUN -> BUNDLE or Triton model repository, see export.export_bundle.export. Raises also: GateError.

    say: gets a line for each step.
    """
    from .errors import choose
    from .export.export_bundle import export as fold

    limit_threads(None)
    if choose("target", target, ("bundle", "triton")) == "bundle":
        with told(say):
            return fold(run, out, profile, dynamic_batch, images, data, replace, statistics)
    from .artefacts.bundle import open_bundle
    from .export.triton import check_repository, write_repository
    from .files import workspace

    check_repository(Path(out))
    with told(say), workspace(Path(out).parent) as folder:
        name = Path(run).resolve().name
        result = fold(run, folder / name, profile, dynamic_batch, images, data, statistics=statistics)
        write_repository(open_bundle(result["bundle"]), Path(out), replace=replace)
    return {**result, "bundle": None, "repository": str(out)}


def calibrate(
    bundle: Path | str,
    out: Path | str,
    data: str | None = None,
    ranges: str = "auto",
    method: str = "max",
    smooth: float | str | None = "auto",
    schemes: Sequence[str] | None = None,
    images: int | None = None,
    max_drop: float | None = None,
    searching: bool = True,
    opset: int | None = None,
    limit_per_class: int | None = None,
    say: Callable[[str], None] = _silent,
    replace: bool = False,
    flavours: Sequence[str] | None = None,
) -> dict[str, Any]:
    """BUNDLE -> BUNDLE with INT8 graphs, see calibrate.calibrate_bundle.calibrate. Raises also: GateError.

    flavours: the earlier name of `schemes`.
    """
    from .calibrate.calibrate_bundle import calibrate as run

    numbers = (images, max_drop, searching, opset, limit_per_class, replace)
    with told(say):
        return run(bundle, out, data, ranges, method, smooth, schemes or flavours, *numbers)


def build(
    bundle: Path | str,
    graph: str = "student",
    precision: str | None = None,
    rebuild: bool = False,
    *,
    workspace_mib: int = 1024,
    level: int = 3,
    max_batch: int = 8,
    unfuse_attention: bool = False,
    refit: bool = True,
) -> dict[str, Any]:
    """The TensorRT engine of a bundle for this GPU; the last five: see runtime.engines.build.Options."""
    from .artefacts.bundle import open_bundle
    from .runtime.backends.tensorrt import build_engine
    from .runtime.engines.build import Options

    options = Options(workspace_mib, level, max_batch, unfuse_attention, refit)
    result = build_engine(open_bundle(bundle), graph, precision, options, rebuild)
    return {**result, "engine": str(result["engine"])}


def evaluate(
    source: Path | str,
    data: str,
    limit_per_class: int | None = None,
    backend: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    split: str = "auto",
    say: Callable[[str], None] = _silent,
) -> dict[str, Any]:
    """Accuracy per task: of a RUN in torch, of a BUNDLE on a backend. split: which images, see data.Dataset.scored.

    backend, precision: of a BUNDLE; a RUN is evaluated in fp32. say: for progress.
    """
    from .artefacts.layout import CONFIG
    from .errors import InputError, command_line

    if (Path(source) / CONFIG).is_file():
        if backend not in ("auto", "torch") or precision not in (None, "fp32"):
            raise InputError(
                f"{source}: a run is evaluated by torch in fp32",
                got=f"--backend {backend}" + (f" --precision {precision}" if precision else ""),
                expected="neither: they choose how a bundle runs",
                fix=f"leave them out, or evaluate a bundle of it: {command_line('export', source)} --out BUNDLE",
            )
        from .train.evaluate import evaluate_run

        limit_threads(threads)
        with told(say):
            return evaluate_run(Path(source), data, limit_per_class, split)
    from .measurement.evaluate import evaluate as run
    from .runtime import load

    with told(say), load(source, backend, threads, precision=precision) as runner:
        return run(runner, data, limit_per_class, split)


def predict(
    bundle: Path | str,
    images: Sequence[Path | str | bytes | np.ndarray],
    task: int | None = None,
    top: int = 1,
    backend: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    policy: str = "exact",
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Classify images (files, folders, their bytes, RGB frames), see runtime.predict. For many calls: runtime.load.

    An image that cannot be read is listed in "unreadable" and does not stop the others. say: told what is read.
    policy: a key of runtime.policy.POLICIES, for which the images are frames in their order; "pinned" pins `task`.
    """
    from .folders import named_pictures, reasons
    from .runtime.policy import open_policy
    from .runtime.predict import predict as run

    pinned = task if policy == "pinned" else None
    files, left_out = named_pictures(images)
    if say is not None:
        say(f"{len(files)} image(s), {sum(left_out.values())} left out {reasons(left_out)}".strip())
    with open_policy(bundle, policy, backend, threads, precision, task=pinned) as student:
        result = run(student, files, task, top, skip_unreadable=True)
    return {**result, "data": {"images": len(files), "left_out": dict(left_out)}}


def profile(
    bundle: Path | str,
    backend: str = "auto",
    threads: int | None = None,
    runs: int | None = None,
    images: Sequence[Path | str | bytes] | None = None,
    warmup: int = 20,
    trace: Path | str | None = None,
    precision: str | None = None,
) -> dict[str, Any]:
    """Latency of one image a call, see measurement.profile.profile."""
    from .measurement.profile import profile as run

    return run(bundle, backend, threads, runs, images, warmup, trace, precision)


def compare(a: Path | str, b: Path | str, stage: str = "end_to_end_ms", floor: float | None = None) -> dict[str, Any]:
    """Two files of `profile`: is B faster, or is it noise? See measurement.compare.compare."""
    from .measurement.compare import compare as run

    return run(a, b, stage, floor)


def enrol(
    bundle: Path | str,
    name: str,
    images: Sequence[Path | str | bytes | np.ndarray],
    max_drop: float | None = None,
    backend: str = "auto",
    threads: int | None = None,
    say: Callable[[str], None] = _silent,
    keep_pictures: bool = False,
    anyway: bool = False,
) -> dict[str, Any]:
    """A class of BUNDLE from a few pictures, without torch, see updates.enrol.enrol. Raises also: GateError.

    max_drop: points that the classes that were there may lose; None: 0.5.
    """
    from .updates.enrol import MAX_DROP
    from .updates.enrol import enrol as run

    most = MAX_DROP if max_drop is None else max_drop
    with told(say):
        return run(bundle, name, images, most, backend, threads, keep_pictures, anyway)


def remove_enrolment(
    bundle: Path | str, name: str, backend: str = "auto", threads: int | None = None
) -> dict[str, Any]:
    """What was enrolled as the class `name` out of BUNDLE again, see updates.enrol.remove."""
    from .updates.enrol import remove as run

    return run(bundle, name, backend, threads)


def rename_enrolment(
    bundle: Path | str, old: str, new: str, backend: str = "auto", threads: int | None = None
) -> dict[str, Any]:
    """Another name for a class that was enrolled in BUNDLE, see updates.enrol.rename."""
    from .updates.enrol import rename as run

    return run(bundle, old, new, backend, threads)


def export_enrolments(
    bundle: Path | str, out: Path | str, key: Path | None = None, sequence: int | None = None
) -> dict[str, Any]:
    """What was enrolled in BUNDLE, for others: see updates.enrol.export_enrolments."""
    from .updates.enrol import export_enrolments as run

    return run(bundle, out, key, sequence)


def enrolments(bundle: Path | str) -> list[dict[str, Any]]:
    """What was enrolled in BUNDLE, see updates.enrol.enrolments."""
    from .updates.enrol import enrolments as run

    return run(bundle)


def inspect(bundle: Path | str) -> dict[str, Any]:
    """What a bundle holds."""
    from .measurement.inspect import inspect as run

    return run(bundle)


def validate(bundle: Path | str, backend: str = "auto", precision: str | None = None) -> dict[str, Any]:
    """Check every hash, load the graph, run a picture through it."""
    from .measurement.inspect import validate as run

    return run(bundle, backend, precision=precision)


def report(
    out: Path | str,
    run: Path | str | None = None,
    bundle: Path | str | None = None,
    profile: dict[str, Any] | None = None,
    pictures: bool = True,
) -> Path:
    """One self-contained HTML page about a run, a bundle, or both.

    profile: what `profile` returned. pictures: show some validation pictures of the run, if its data source is there.
    """
    from .report.model_page import write_report

    paths = [Path(p) if p is not None else None for p in (run, bundle)]
    return write_report(Path(out), run=paths[0], bundle=paths[1], profile=profile, pictures=pictures)


def doctor() -> dict[str, Any]:
    """What this machine has and lacks."""
    from .measurement.doctor import doctor as run

    return run()


def watch(
    source: str | int | Path,
    bundle: Path | str,
    policy: str = "exact",
    task: int | None = None,
    backend: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    frames: int | None = None,
    on_change: bool = False,
    take: str = "auto",
    preview: int | None = None,
    say: Callable[[str], None] = _silent,
) -> Generator[dict[str, Any], None, None]:
    """Answers to what a camera sees, one by one, see streams.watch.watch; opened when this returns.

    source: see streams.source.EXPECTED. policy, task: as `predict`. frames: to classify, None: all. take: a key of
    streams.watch.TAKE. preview: port of a page on this machine that shows them (extra `serve`); 0: a free one.
    """
    from .runtime.policy import open_policy
    from .streams.watch import source_of
    from .streams.watch import watch as run

    if preview is not None:
        from .server import installed

        installed()
    found, newest = source_of(source, take, threads)
    student = open_policy(bundle, policy, backend, threads, precision, task=task if policy == "pinned" else None)
    show = None
    if preview is not None:
        from .server.preview import Preview

        show = Preview(preview)
        say(f"preview: {show.address}")
    return run(student, found, found.open(), newest, task, frames, on_change, show, say)
