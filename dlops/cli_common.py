"""What the commands share: options that several take, what is left out found, usage errors, and stdout."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from dlops.artifact import Artifact
    from dlops.checkpoint import Checkpoint

Place = Literal["auto", "cpu", "cuda", "tensorrt"]
Device = Annotated[Place, typer.Option(help="auto takes CUDA where it works; tensorrt is for ONNX.")]
# More than any machine has cores; runtimes make them all before the first call.
MAX_THREADS = 1024
Threads = Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="For one operator; all cores if left out.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run native or pickled code that was made elsewhere.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def usage(message: str, hint: str) -> NoReturn:
    from dlops.errors import UsageError

    raise UsageError(message, hint=hint)


def points(text: str) -> float:
    """`0.5%` or `0.5`, as `--max-drop` has them."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", text.strip())
    if found is None:
        usage(f"--max-drop {text!r}: not percentage points", "--max-drop 0.5%")
    return float(found[1])


def given_options(context: typer.Context, *, but: set[str]) -> list[str]:
    """What the command line gives beside the parameters of those names: `TARGET`, `--duration`."""
    return [
        one.opts[0] if one.param_type_name == "option" else one.opts[0].upper()
        for one in context.command.params
        if one.name is not None and one.name not in but
        and (source := context.get_parameter_source(one.name)) is not None and source.name == "COMMANDLINE"
    ]  # fmt: skip


def command_line() -> tuple[str, ...]:
    return ("dlops", *sys.argv[1:])


def print_result(thing: Any) -> None:
    from dlops.console import out

    if isinstance(thing, (str, Path)):
        out.print(str(thing), markup=False, emoji=False, soft_wrap=True)
    else:
        out.print(thing)


def find_checkpoint(path: Path | None) -> Checkpoint:
    from dlops.checkpoint import load_checkpoint, newest_checkpoint
    from dlops.console import say

    if path is not None:
        return load_checkpoint(path)
    checkpoint = newest_checkpoint()
    say(f"Taking the newest checkpoint: {checkpoint.directory}")
    return checkpoint


def find_artifact(path: Path | None) -> Artifact:
    from dlops.artifact import newest_artifact, open_artifact
    from dlops.console import say

    if path is not None:
        return open_artifact(path)
    artifact = newest_artifact()
    say(f"Taking the newest artifact: {artifact.directory}")
    return artifact
