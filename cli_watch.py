"""The command that watches: an answer for each frame, until the source ends or Ctrl-C."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from .cli_options import backend_option, precision_option, put, say, threads_option


@click.command()
@click.argument("source")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--policy",
    default="exact",
    show_default=True,
    help="exact | pinned | sticky: who selects the prompts: each frame, --task, or an earlier frame",
)
@click.option("--task", type=click.IntRange(1), help="only the classes of this task compete (the first is 1)")
@click.option(
    "--take",
    default="auto",
    show_default=True,
    help="all | newest | auto: which frames, where they come faster than they are classified. auto: the newest of "
    "cameras and streams, all of files and folders",
)
@click.option("--frames", type=click.IntRange(1), help="stop after so many classified frames [default: no end]")
@click.option(
    "--on-change", is_flag=True, help="only answers that differ from the one before: in the label, or in being unknown"
)
@click.option("--preview", type=click.IntRange(0, 65535), help="port of a page on this machine; 0: a free one")
@backend_option
@precision_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line, for each answer.")
def watch(source: str, bundle: Path, task: int | None, as_json: bool, **options: Any) -> None:
    """Classify what a camera sees, as it comes: SOURCE is the number of a camera, a video file, an address (rtsp://,
    http://), a GStreamer pipeline, or a folder that is being filled."""
    from . import api
    from .display import prediction_line, printable

    answers = api.watch(source, bundle, task=None if task is None else task - 1, say=say, **options)
    with contextlib.closing(answers), contextlib.suppress(KeyboardInterrupt):
        for answer in answers:
            line = json.dumps(answer, allow_nan=False) if as_json else printable(prediction_line(answer, _name(answer)))
            put(line)


def _name(answer: dict[str, Any]) -> str:
    if answer["image"] is not None:
        return str(answer["image"])
    place = answer["at"][11:23] if answer["seconds"] is None else f"{answer['seconds']:.2f} s"
    return f"{place} frame {answer['frame']}"
