"""The verbs of the command line as functions: `from cdl_edge import train, export, predict, ...`.

Each imports what it needs when it is called. All raise InputError for bad input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def limit_threads(threads: int | None) -> None:
    """CPU threads of torch; None: OMP_NUM_THREADS, or the cores that are free."""
    import torch

    from .cores import default_threads

    torch.set_num_threads(threads or default_threads())


def quickstart(
    data: str = "digits",
    out: Path | str = "quickstart",
    say: Callable[[str], None] = print,
    threads: int | None = None,
) -> dict[str, Any]:
    """The whole way once: train, export, calibrate, evaluate, profile, report. threads: see limit_threads."""
    from .quickstart import quickstart as run

    limit_threads(threads)
    return run(data, Path(out), say)[0]


def pretrain(
    resume: bool = False, say: Callable[[str], None] = print, threads: int | None = None, **options: Any
) -> dict[str, Any]:
    """Make a small backbone; options: the fields of train.pretrain.PretrainConfig, or of train.hybrid.HybridConfig.

    threads: see limit_threads.
    """
    from .errors import InputError
    from .train.hybrid import HYBRIDS, HybridConfig, pretrain_hybrid
    from .train.pretrain import PretrainConfig
    from .train.pretrain import pretrain as run

    config: Any = HybridConfig if options.get("arch") in HYBRIDS else PretrainConfig
    known = config.__dataclass_fields__
    given = {k: v for k, v in options.items() if v is not None and v is not False}
    if odd := [k for k in given if k not in known]:
        raise InputError(
            f"--{odd[0].replace('_', '-')} does not belong to --arch {options.get('arch')}",
            expected=", ".join(f"--{k.replace('_', '-')}" for k in known),
        )
    if missing := [k for k, f in known.items() if k not in given and f.default is MISSING]:
        raise InputError(
            f"pretrain --arch {options.get('arch')}: an option is missing", got="nothing", expected=missing[0]
        )
    limit_threads(threads)
    return (pretrain_hybrid if config is HybridConfig else run)(config(**given), resume, say)


def train(resume: bool = False, quiet: bool = False, threads: int | None = None, **options: Any) -> dict[str, Any]:
    """Train teacher and student on one task after another and write a RUN folder with its report.

    options: the fields of train.config.TrainConfig, `data` and `out` at least; with `extend` those not given are that
    run's. threads: of the CPU; None: as many as the run began with if it is resumed, else see limit_threads.
    Returns: the contents of metrics.json.
    """
    from .files import first_process
    from .report import write_report
    from .train.config import TrainConfig
    from .train.extend import inherit
    from .train.loop import train as run

    if options.get("extend") is not None:
        options = inherit(options)
    limit_threads(threads)
    metrics = run(TrainConfig.from_json(options), resume, quiet, keep_threads=threads is not None)
    folder = Path(metrics["config"]["out"])
    if first_process():
        write_report(folder / "report.html", run=folder)
    return metrics


def sweep(
    out: Path | str,
    parallel: int | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Any]:
    """Train a grid of learners, distillers, queries and seeds, or what is missing of it, and compare them.

    options: see sweep.grid.make_plan. Returns: the contents of OUT/sweep.json; `failed` names the cells that did.
    """
    from .sweep.sweep import sweep as run

    return run(Path(out), options, parallel, threads, say)


def export(
    run: Path | str,
    out: Path | str,
    profile: str = "ort",
    dynamic_batch: bool = False,
    images: int = 500,
    target: str = "bundle",
    data: str | None = None,
    replace: bool = False,
    say: Callable[[str], None] = lambda line: None,
    statistics: bool = False,
) -> dict[str, Any]:
    """RUN -> BUNDLE or Triton model repository, see export.bundle.export. Raises also: export.ParityError.

    say: gets a line for each step.
    """
    from .errors import choose
    from .export.bundle import export as fold

    limit_threads(None)
    if choose("target", target, ("bundle", "triton")) == "bundle":
        return fold(run, out, profile, dynamic_batch, images, data, say, replace, statistics)
    from .export.triton import check_repository, write_repository
    from .files import workspace
    from .runtime import open_bundle

    check_repository(Path(out))
    with workspace(Path(out).parent) as folder:
        result = fold(
            run, folder / Path(run).resolve().name, profile, dynamic_batch, images, data, say, statistics=statistics
        )
        write_repository(open_bundle(result["bundle"]), Path(out), replace=replace)
    return {**result, "bundle": None, "repository": str(out)}


def calibrate(bundle: Path | str, out: Path | str, **options: Any) -> dict[str, Any]:
    """BUNDLE -> BUNDLE with INT8 graphs, see calibrate.bundle.calibrate. Raises also: calibrate.GateError."""
    from .calibrate.bundle import calibrate as run

    return run(bundle, out, **options)


def build(
    bundle: Path | str,
    graph: str = "student",
    precision: str | None = None,
    rebuild: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The TensorRT engine of a bundle for this GPU; options: the fields of runtime.engines.build.Options."""
    from .runtime import open_bundle
    from .runtime.backends.tensorrt import build_engine
    from .runtime.engines.build import Options

    result = build_engine(open_bundle(bundle), graph, precision, Options(**options), rebuild)
    return {**result, "engine": str(result["engine"])}


def evaluate(
    source: Path | str,
    data: str,
    limit_per_class: int | None = None,
    backend: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    split: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Accuracy per task: of a RUN in torch, of a BUNDLE on a backend. split: which images, see data.Dataset.scored.

    say: for progress.
    """
    if (Path(source) / "config.json").is_file():
        from .train.evaluate import evaluate_run

        limit_threads(threads)
        return evaluate_run(Path(source), data, limit_per_class, split, say)
    from .measurement.evaluate import evaluate as run
    from .measurement.evaluate import fifths
    from .runtime import load

    with load(source, backend, threads, precision=precision) as runner:
        return run(runner, data, limit_per_class, fifths("classified", say), split, say)


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


def profile(bundle: Path | str, **options: Any) -> dict[str, Any]:
    """Latency of one image a call, see measurement.profile.profile for the options."""
    from .measurement.profile import profile as run

    return run(bundle, **options)


def compare(a: Path | str, b: Path | str, **options: Any) -> dict[str, Any]:
    """Two files of `profile`: is B faster, or is it noise? See measurement.compare.compare for the options."""
    from .measurement.compare import compare as run

    return run(a, b, **options)


def create_pack(
    old: Path | str, new: Path | str, out: Path | str, key: Path | None = None, sequence: int | None = None
) -> dict[str, Any]:
    """BUNDLE, BUNDLE -> PACK, see updates.packs.create."""
    from .updates.packs import create as run

    return run(old, new, out, key, sequence)


def install_pack(
    pack: Path | str, bundle: Path | str, public_key: Path | None = None, **options: Any
) -> dict[str, Any]:
    """PACK into BUNDLE, see updates.packs.install; options: backend, threads."""
    from .updates.packs import install as run

    return run(pack, bundle, public_key, **options)


def rollback(bundle: Path | str, to: str | None = None, **options: Any) -> dict[str, Any]:
    """A kept version of BUNDLE again, see updates.packs.rollback; options: backend, threads."""
    from .updates.packs import rollback as run

    return run(bundle, to, **options)


def versions(bundle: Path | str) -> list[dict[str, Any]]:
    """The versions of BUNDLE that are kept, oldest first, see updates.packs.listed."""
    from .updates.packs import listed as run

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
) -> Path:
    """One self-contained HTML page about a run, a bundle, or both; profile: what `profile` returned."""
    from .report import write_report

    paths = [Path(p) if p is not None else None for p in (run, bundle)]
    return write_report(Path(out), run=paths[0], bundle=paths[1], profile=profile)


def doctor() -> dict[str, Any]:
    """What this machine has and lacks."""
    from .measurement.doctor import doctor as run

    return run()
