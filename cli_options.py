"""What the commands of the command line share: options, and how they answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import click

from .display import printable
from .files import UNWRITABLE, first_process

NOTHING_WRITTEN = "nothing was written; start the same command again"
"how to go on after Ctrl-C in a command that writes its result at the end"

force_option = click.option(
    "--force", is_flag=True, help="Replace a bundle of ours at --out; anything else that is there stays."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Last line of stdout: one JSON document.")
pictures_option = click.option(
    "--pictures/--no-pictures", default=None, help="show validation pictures in the report [default: yes]"
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads [default: OMP_NUM_THREADS, or the free cores]"
)
backend_option = click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="auto | cpu | onnxruntime (all three: ONNX Runtime on the CPU) | cuda | ort-tensorrt | openvino | tensorrt",
)
precision_option = click.option(
    "--precision", help="fp32 | fp16 | bf16 | int8 [default: what the bundle recommends, else fp32]"
)


@contextmanager
def resumable(advice: str) -> Iterator[None]:
    """Ctrl-C ends a command with what is kept and how to go on, and exit code 1."""
    try:
        yield
    except KeyboardInterrupt:
        if first_process():
            click.echo(f"\nstopped: {advice}", err=True)
        raise SystemExit(1) from None


def emit(document: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a command's answer: the text for people, or with --json the document as the last line."""
    if first_process():
        put(json.dumps(document, allow_nan=False) if as_json else printable(text))


def put(text: str) -> None:
    """Print to stdout. Where that is a file on a full disk a message is the end, with exit code 1.

    Not 2, with which commands promise that nothing has changed: their work is done by then.
    """
    try:
        click.echo(text)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        say(
            f"failed: the answer cannot be written to standard output\n  got:      {error.strerror}\n"
            "  do:       make room; only the answer is lost, what the command had to change is changed"
        )
        raise SystemExit(1) from None


def say(line: str) -> None:
    """Progress goes to stderr; nothing ends because a full disk takes no more of it."""
    try:
        click.echo(printable(line), err=True)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise


class Outer(click.Command):
    """A command with others inside: `profile BUNDLE`, and `profile compare A B`.

    A bundle that has the name of an inner command is written `./compare`.
    """

    inner: ClassVar[dict[str, click.Command]] = {}

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the inner command where the first word names one."""
        if args and args[0] in self.inner:
            name = args[0]
            return self.inner[name].make_context(f"{info_name} {name}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)
