"""`cdl-edge enrol` and the commands inside it: classes that a device learns by itself."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import click

from .cli_options import Outer, backend_option, emit, json_option, say, threads_option
from .errors import command_line


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def enrol_list(bundle: Path, as_json: bool) -> None:
    """What was enrolled in a bundle, in its order."""
    from . import api

    found = api.enrolments(bundle)
    lines = [f"{e['name']}: {e['images']} picture(s), {e['at']}" for e in found] or ["nothing was enrolled"]
    emit({"bundle": str(bundle), "enrolments": found}, as_json, "\n".join(lines))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name")
@backend_option
@threads_option
@json_option
def enrol_remove(bundle: Path, name: str, backend: str, threads: int | None, as_json: bool) -> None:
    """Take the pictures that were enrolled as a class out again; the other classes are as before."""
    from . import api

    result = api.remove_enrolment(bundle, name, backend, threads)
    text = f"{name}: {result['images']} picture(s) taken out, {result['classes']} classes\n"
    emit(result, as_json, f"{text}{bundle}: {result['previous']} -> {result['version']}, self-test passed")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("old")
@click.argument("new")
@backend_option
@threads_option
@json_option
def enrol_rename(bundle: Path, old: str, new: str, backend: str, threads: int | None, as_json: bool) -> None:
    """Give a class that was enrolled another name; what it has learnt stays."""
    from . import api

    result = api.rename_enrolment(bundle, old, new, backend, threads)
    text = f"{old} is called {new} now, {result['images']} picture(s)\n"
    emit(result, as_json, f"{text}{bundle}: {result['previous']} -> {result['version']}, self-test passed")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Ed25519 private key (PEM) to sign the pack with")
@click.option("--sequence", type=click.IntRange(1), help="order among packs [default: after the version it is for]")
@json_option
def enrol_export(bundle: Path, out: Path, key: Path | None, sequence: int | None, as_json: bool) -> None:
    """Write what was enrolled for others: a pack for devices, statistics and kept pictures for training."""
    from . import api

    result = api.export_enrolments(bundle, out, key, sequence)
    lines = [f"{n}: {c['images']} picture(s), {c['kept']} kept" for n, c in result["classes"].items()]
    pack_, photos = result["pack"], f"{out / 'photos'}" if result["photos"] else "no picture was kept"
    lines += [
        f"pack: {pack_['pack']}, {pack_['bytes']} bytes, {'signed' if pack_['signed'] else 'not signed'}",
        f"statistics: {out / 'statistics.npz'}",
        f"pictures: {photos}",
    ]
    emit(result, as_json, "\n".join(lines))


class EnrolCommand(Outer):
    """`enrol BUNDLE NAME IMAGE...`, and `enrol list`, `remove`, `rename` and `export`."""

    inner: ClassVar[dict[str, click.Command]] = {
        "list": enrol_list,
        "remove": enrol_remove,
        "rename": enrol_rename,
        "export": enrol_export,
    }


@click.command(cls=EnrolCommand, epilog="Also, each with its --help: cdl-edge enrol list | remove | rename | export.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE|FOLDER...")
@click.option("--max-drop", type=click.FloatRange(0), help="points that the other classes may lose [default: 0.5]")
@click.option("--keep-pictures", is_flag=True, help="keep the pictures in the bundle, for `enrol export`")
@click.option("--anyway", is_flag=True, help="learn also from 1 or 2 pictures, or from such as look like another class")
@backend_option
@threads_option
@json_option
def enrol(
    bundle: Path,
    name: str,
    images: tuple[Path, ...],
    max_drop: float | None,
    keep_pictures: bool,
    anyway: bool,
    backend: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Teach a bundle a class from a few pictures, on the device, or give a class more of them."""
    from . import api

    result = api.enrol(bundle, name, images, max_drop, backend, threads, say, keep_pictures, anyway)
    own, old = result["leave_one_out"], result["old_classes"]
    kept, means = old["selftest"], old["means"]
    lines = [
        f"{name}: {result['pictures']} picture(s), {'a new class' if result['new_class'] else 'known before'}; "
        f"{result['classes']} classes",
        f"left out one by one: {own['accuracy']:.0f} % recognised (95 % interval {own['low']:.0f} to "
        f"{own['high']:.0f} %)",
        own["sentence"],
        f"other classes: {kept['changed']} of {kept['images']} answers of the self-test changed; "
        f"{means['recognised_after']} of {means['classes']} known by their mean, {means['recognised_before']} before",
        f"{bundle}: {result['previous']} -> {result['version']}, self-test passed",
        "back: " + command_line("enrol", "remove", bundle, name),
    ]
    emit(result, as_json, "\n".join(lines))
