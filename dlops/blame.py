"""Which line of a model's code an exporter stumbled over: of a person's own module, or of the library it is from."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from importlib import util
from pathlib import Path
from types import TracebackType
from typing import Any

# What captures and runs modules; their own lines say nothing of the model.
_TOOLS = ("torch", "dlops", "onnxscript", "executorch", "torchao", "typeguard")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')
_MOST_CHARS = 120


def where(line: str | None) -> str:
    """As it stands in a message: in brackets, after a space; nothing where no line is known."""
    return f" ({line})" if line else ""


def code_line(error: BaseException) -> str | None:
    """`own.py, line 14: y = strange(x)`, or None where neither the error nor what led to it knows.

    From the frames that it passed, from the node of the captured graph that a tool held, or from its text.
    """
    chain = list(_chain(error))
    for one in chain:
        if found := last_line((frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(one.__traceback__)):
            return found
    for one in chain:
        for trace in _nodes(one.__traceback__):
            if found := line_in(trace):
                return found
    return next((found for one in chain if (found := line_in(str(one)))), None)


def line_in(text: str) -> str | None:
    """The same from frames that are printed in a text, as the nodes of captured graphs carry them."""
    return last_line((match["file"], int(match["line"])) for match in _FRAME.finditer(text))


def operator_line(nodes: Iterable[Any], operator: str) -> str | None:
    """Of the nodes of a captured graph, where the first of an operator was made ("aten.special_i1.default")."""
    traces = (node.meta.get("stack_trace") for node in nodes if str(node.target) == operator)
    return next((found for trace in traces if trace and (found := line_in(trace))), None)


def last_line(places: Iterable[tuple[str, int]]) -> str | None:
    """The last of the (file, line) that is a model's and no tool's."""
    tools = _folders()
    own = [(file, line) for file, line in places if line and _is_code(file, tools)]
    if not own:
        return None
    file, line = own[-1]
    code = linecache.getline(file, line).strip()
    return f"{_shown(file)}, line {line}" + (f": {code[:_MOST_CHARS]}" if code else "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, the first cause first."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return reversed(found)


def _nodes(trace: TracebackType | None) -> Iterator[str]:
    """Where the nodes were made that the frames of a traceback held, the innermost first."""
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        node: Any = frame.f_locals.get("node")
        said = getattr(node, "meta", {}).get("stack_trace") if node is not None else None
        if isinstance(said, str):
            yield said


def _folders() -> tuple[str, ...]:
    found: list[str] = []
    for name in _TOOLS:
        spec = util.find_spec(name)
        found += [] if spec is None else spec.submodule_search_locations or []
    # dlops may lie in a source tree whose stages are links.
    own = [str(path.resolve()) for path in Path(__file__).parent.iterdir() if path.is_dir()]
    return (*found, *own, sysconfig.get_paths()["stdlib"])


def _is_code(file: str, tools: tuple[str, ...]) -> bool:
    """Whether a file is a model's: a library's beside the tools counts, and what is none, as "<string>", does not."""
    if file.startswith("<"):
        return False
    path = str(Path(file))
    stdlib = tools[-1]
    if any(path.startswith(folder + "/") for folder in tools[:-1]):
        return False
    return not path.startswith(stdlib + "/") or "site-packages" in path


def _shown(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
