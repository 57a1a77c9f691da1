"""The page itself: documents in, one HTML file out, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from .. import __version__
from ..artefacts.bundle import Bundle, open_bundle
from ..artefacts.profile_record import ProfileRecord
from ..artefacts.run_record import Metrics, read_metrics
from ..errors import InputError
from ..files import check_out, write_text
from .charts import HEAT_DARK, HEAT_LIGHT, ink
from .documents import check_measured, check_pair
from .mistakes import mistakes_section, verdict
from .pictures import pictures_section
from .quantisation import quantisation_section
from .sections import accuracy_section, card_section, export_section, figures, header, latency_section

TEMPLATE = "page.html.j2"
_GENERATOR = b'<meta name="generator" content="cdl-edge '
"in the head of every page that is written here"


def write_report(
    out: Path,
    run: Path | None = None,
    bundle: Path | None = None,
    profile: Mapping[str, Any] | None = None,
    pictures: bool = True,
) -> Path:
    """Write the page and return its path.

    Args:
        out: HTML file to write, whole or not at all.
        run: folder written by train (metrics.json). None: what the bundle keeps of it, if any.
        bundle: folder written by export or calibrate; every file of it is hashed.
        profile: what `profile --json` prints, with an optional "trace_ms": end-to-end milliseconds of each call.
        pictures: show some validation pictures of the run, read from its data source; small copies are in the page.

    Raises: InputError when there is neither run nor bundle, when something is missing, damaged, malformed or newer than
        this code, and when run, bundle and profile do not belong together.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: is a folder", expected="an HTML file", fix=f"name {out / 'report.html'}")
    if run is None and bundle is None:
        raise InputError("nothing to report on", expected="a run folder, a bundle folder or both")
    metrics = read_metrics(run) if run is not None else None
    opened = open_bundle(bundle) if bundle is not None else None
    if opened is not None and metrics is not None:
        check_pair(metrics, opened)
    elif opened is not None and opened.manifest.training:
        metrics = Metrics.of(opened.manifest.training, f"{opened.path}: manifest.json, training")
    checked = ProfileRecord.of(profile) if profile is not None else None
    if checked is not None:
        check_measured(checked, opened)
    wall = pictures_section(metrics, wanted=pictures) if metrics is not None and run is not None else None
    write_page(out, render(metrics, opened, checked, wall))
    return out


def _foreign(out: Path) -> str | None:
    """What an existing file is instead of a page of ours, see files.check_out."""
    if not out.is_file():
        return "no file"
    with open(out, "rb") as stream:
        return None if _GENERATOR in stream.read(2000) else "a file of another origin"


def write_page(out: Path, html: str) -> None:
    """Write it, whole or not at all; only a page that was written here is replaced. Raises: InputError."""
    check_out(out, "a report", _foreign, replace=True)
    # A file name that is no UTF-8 reaches JSON as a lone surrogate, which no UTF-8 file can hold.
    write_text(out, html.encode("utf-8", "replace").decode("utf-8"))


def fill(template: str, **values: Any) -> str:
    """A template of this package with its values, the colours of the heat map and the version."""
    # Autoescape: class names and paths are the user's, and end up in a page that is opened with a double click.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        heat_light=[(c, ink(c)) for c in HEAT_LIGHT],
        heat_dark=[(c, ink(c)) for c in HEAT_DARK],
        version=__version__,
        **values,
    )


def render(
    metrics: Metrics | None,
    bundle: Bundle | None,
    profile: ProfileRecord | None,
    wall: Mapping[str, Any] | None = None,
) -> str:
    """The page as text, from documents that have been checked. wall: see pictures.pictures_section."""
    sections = {
        "verdict": verdict(metrics) if metrics else None,
        "mistakes": mistakes_section(metrics) if metrics else None,
        "wall": wall,
        "accuracy": accuracy_section(metrics) if metrics else None,
        "latency": latency_section(profile) if profile else None,
        "quantisation": quantisation_section(bundle) if bundle else None,
        "export": export_section(bundle) if bundle else None,
        "card": card_section(metrics, bundle, profile),
    }
    return fill(
        TEMPLATE,
        header=header(metrics, bundle),
        figures=figures(metrics, bundle, profile),
        **sections,
    )
