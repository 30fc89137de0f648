"""A program that torch.export saved (a .pt2 file), read without torch's own loader.

torch.export.load unpickles parts of the file and evaluates text out of it as Python, so a crafted one runs code. Here
only JSON and the raw bytes of weights are read of the archive; every node must be an operator that computes and no more
(`program_operators`), and all names in the module that comes out are made here. What needs more is refused.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from dlops.errors import CorruptError, DlopsError, UsageError, from_os_error
from dlops.program_operators import find_operator

# torch's numbers for what files hold (torch/_export/serde/schema.py); major versions of that schema change them.
_SCHEMA = 8
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
    28: torch.uint16, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
_MEMORY_FORMATS = {
    1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format,
}  # fmt: skip
_STRIDED = 7
# A dim that is the caller's, as sympy writes it; read as text and never evaluated.
_SYMBOL = re.compile(r"(?:Symbol\('([A-Za-z]\w{0,50})'[^()]*\)|([A-Za-z]\w{0,50}))")
# A graph of ten thousand nodes takes some ten megabytes.
_MAX_JSON_BYTES = 512 * 1024 * 1024
_MAX_DEPTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInput:
    """shape: ints, and the names of dims that are the caller's; a text that is no name is an expression of such."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """module: takes the inputs by place and gives a tuple of the outputs. ranges: of named dims, the end None if open.

    outputs: names where the program returns a dict, else none.
    """

    module: fx.GraphModule
    inputs: tuple[ProgramInput, ...]
    outputs: tuple[str, ...]
    ranges: Mapping[str, tuple[int, int | None]]


def read_program(path: Path, *, device: torch.device | str = "cpu") -> Program:
    """The program with its weights on `device`, in eval form as it was exported. Nothing in the file is executed.

    Raises CorruptError where the file is damaged or no such program, UsageError naming what it holds that is not read:
    pickled weights, custom objects, operators that do more than compute.
    """
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(archive, where, torch.device(device)).read()
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except DlopsError:
        raise
    # What json, zipfile and torch raise for content that does not fit together.
    except (
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RecursionError, RuntimeError, ValueError,
        KeyError, TypeError, IndexError, AttributeError, OverflowError,
    ) as error:  # fmt: skip
        said = (str(error).splitlines() or [""])[0][:200]
        raise CorruptError(
            f"{where}: not a program that torch.export saved, or damaged ({type(error).__name__}: {said})"
        ) from None


class _Reader:
    """One archive. Its members are in a folder named for the file that it was once saved to."""

    def __init__(self, archive: zipfile.ZipFile, where: str, device: torch.device) -> None:
        self._archive, self._where, self._device = archive, where, device
        self._members = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}

    def read(self) -> Program:
        document = self._json("models/model.json")
        if document["schema_version"]["major"] != _SCHEMA:
            raise UsageError(
                f"{self._where}: saved by torch {document.get('torch_version', 'of another version')} in a form that "
                "this dlops does not read", hint="save it again with the torch that is installed here",
            )  # fmt: skip
        content = document["graph_module"]
        weights = self._weights("weights") | self._weights("constants")
        inputs = self._inputs(content, weights)
        for node in content["graph"]["nodes"]:
            self._node(node)
        outputs = [self._output(spec) for spec in content["signature"]["output_specs"]]
        self._graph.output(tuple(outputs))
        self._graph.lint()
        module = fx.GraphModule(self._root, self._graph).eval()
        names = _output_names(content["module_call_graph"])
        ranges = {
            str(name): (max(int(limits["min_val"]), 0), None if limits["max_val"] is None else int(limits["max_val"]))
            for name, limits in document["range_constraints"].items()
        }
        return Program(
            module=module, inputs=tuple(inputs), outputs=names if len(names) == len(outputs) else (), ranges=ranges
        )

    def _bytes(self, name: str) -> bytes:
        entry = self._members.get(name)
        if entry is None:
            raise ValueError(f"no {name} in it")
        return self._archive.read(entry)

    def _json(self, name: str) -> Any:
        entry = self._members.get(name)
        if entry is not None and entry.file_size > _MAX_JSON_BYTES:
            raise ValueError(f"{name} unpacks to {entry.file_size} bytes")
        return json.loads(self._bytes(name))

    def _weights(self, kind: str) -> dict[str, nn.Parameter | torch.Tensor]:
        config = self._json(f"data/{kind}/model_{kind}_config.json")["config"]
        flat: dict[str, torch.Tensor] = {}
        found: dict[str, nn.Parameter | torch.Tensor] = {}
        for name, entry in config.items():
            file, meta = str(entry["path_name"]), entry["tensor_meta"]
            if entry["use_pickle"] or not file.startswith(("weight_", "tensor_")):
                raise UsageError(
                    f"{self._where}: {name} is stored pickled, and unpickling runs what the file says",
                    hint="save the program of a model with plain tensors alone",
                )
            if meta["layout"] != _STRIDED:
                raise UsageError(f"{self._where}: {name} is a sparse tensor, which is not read")
            sizes, strides = _ints(meta["sizes"]), _ints(meta["strides"])
            if file not in flat:
                content, dtype = self._bytes(f"data/{kind}/{file}"), _DTYPES[meta["dtype"]]
                flat[file] = (
                    torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
                )
            base = flat[file]
            if base.dtype != _DTYPES[meta["dtype"]]:
                raise ValueError(f"{name} shares its bytes with a tensor of another dtype")
            (offset,) = _ints([meta["storage_offset"]])
            tensor = base.as_strided(sizes, strides, offset).to(self._device)
            floating = tensor.is_floating_point() or tensor.is_complex()
            found[name] = nn.Parameter(tensor, requires_grad=floating) if entry["is_param"] else tensor
        return found

    def _inputs(
        self, content: Mapping[str, Any], weights: Mapping[str, nn.Parameter | torch.Tensor]
    ) -> list[ProgramInput]:
        """Makes weights attributes and the others placeholders, under names of our own."""
        metas = content["graph"]["tensor_values"]
        found: list[ProgramInput] = []
        for place, spec in enumerate(content["signature"]["input_specs"]):
            ((kind, value),) = spec.items()
            if kind == "user_input" and set(value["arg"]) == {"as_tensor"}:
                name = str(value["arg"]["as_tensor"]["name"])
                self._values[name] = self._graph.placeholder(f"input_{len(found)}")
                meta = metas[name]
                found.append(ProgramInput(name=name, dtype=_DTYPES[meta["dtype"]], shape=_shape(meta["sizes"])))
            elif kind in ("parameter", "buffer", "tensor_constant"):
                tensor, attribute = weights[value[f"{kind}_name"]], f"weight_{place}"
                if isinstance(tensor, nn.Parameter):
                    self._root.register_parameter(attribute, tensor)
                else:
                    self._root.register_buffer(attribute, tensor)
                self._values[value["arg"]["name"]] = self._graph.get_attr(attribute)
            else:
                raise UsageError(
                    f"{self._where}: it takes a {str(kind)[:50].replace('_', ' ')}, and only tensors are read",
                    hint="export a module whose arguments are tensors",
                )
        return found

    def _node(self, node: Mapping[str, Any]) -> None:
        target = str(node["target"])
        found = find_operator(target)
        if found is None:
            raise UsageError(
                f"{self._where}: it uses {target[:100]}, which is not among the operators that compute and do no more",
                hint="a program of ATen operators, without control flow and custom ones, is read",
            )
        arguments = [(str(one["name"]), self._argument(one["arg"], 0)) for one in node["inputs"]]
        args, kwargs = _call(found, arguments)
        made = self._graph.call_function(found, tuple(args), kwargs)
        self._bind(made, node["outputs"], found)

    def _bind(self, made: fx.Node, outputs: Sequence[Mapping[str, Any]], found: Callable[..., Any]) -> None:
        """Gives the names of the file to what a call returns: one value, a tuple of several, or a list."""
        returns = len(found._schema.returns) if isinstance(found, torch._ops.OpOverload) else 1
        if returns == 1 and len(outputs) == 1 and set(outputs[0]) & {"as_tensors"}:
            outputs, returns = [{"as_tensor": one} for one in outputs[0]["as_tensors"]], 0
        if returns == 1 and len(outputs) == 1:
            if (name := _name_of(outputs[0])) is not None:
                self._values[name] = made
            return
        for place, output in enumerate(outputs):
            if (name := _name_of(output)) is not None:
                item: Callable[..., Any] = _item
                self._values[name] = self._graph.call_function(item, (made, place))

    def _output(self, spec: Mapping[str, Any]) -> fx.Node:
        ((kind, value),) = spec.items()
        name = _name_of(value["arg"]) if kind == "user_output" else None
        if name is None:
            raise UsageError(
                f"{self._where}: it has a {kind.replace('_', ' ')}, and only programs that give tensors are read",
                hint="export it in eval mode",
            )
        return self._values[name]

    def _argument(self, argument: Mapping[str, Any], depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("arguments are nested")
        ((kind, value),) = argument.items()
        match kind:
            case "as_none":
                return None
            case "as_tensor":
                return self._values[value["name"]]
            case "as_name":
                return self._values[value]
            case "as_tensors":
                return [self._values[one["name"]] for one in value]
            case "as_sym_int" | "as_sym_float" | "as_sym_bool" | "as_optional_tensor":
                return self._argument(value, depth + 1)
            case "as_sym_ints" | "as_sym_floats" | "as_sym_bools" | "as_optional_tensors":
                return [self._argument(one, depth + 1) for one in value]
            case "as_int" | "as_float" | "as_bool" | "as_string":
                return _plain(kind, value)
            case "as_ints" | "as_floats" | "as_bools":
                return [_plain(kind[:-1], one) for one in value]
            case "as_scalar_type":
                return _DTYPES[value]
            case "as_memory_format":
                return _MEMORY_FORMATS[value]
            case "as_layout" if value == _STRIDED:
                return torch.strided
            case "as_device":
                # What was made on one device runs on the other.
                return self._device
        raise UsageError(f"{self._where}: an argument of the kind {str(kind)[:50]!r}, which is not read")


def _call(found: Callable[..., Any], arguments: Sequence[tuple[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    """Positional as far as they go by place, the rest by name."""
    if not isinstance(found, torch._ops.OpOverload):
        return [value for _, value in arguments], {}
    schema = {one.name: place for place, one in enumerate(found._schema.arguments)}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in arguments:
        if name not in schema or name in kwargs:
            raise ValueError(f"{found} takes no {name}")
        if schema[name] == len(args) and not kwargs and not found._schema.arguments[len(args)].kwarg_only:
            args.append(value)
        else:
            kwargs[name] = value
    return args, kwargs


def _item(values: Sequence[Any], place: int) -> Any:
    return values[place]


def _plain(kind: str, value: Any) -> int | float | bool | str:
    if kind == "as_float":
        # JSON has no infinity, so torch writes it as text.
        return float(value)
    wanted = {"as_int": int, "as_bool": bool, "as_string": str}[kind]
    if type(value) is not wanted:
        raise TypeError(f"{kind} holds {type(value).__name__}")
    assert isinstance(value, int | str)
    return value


def _ints(sizes: Sequence[Mapping[str, Any]]) -> list[int]:
    found = [one["as_int"] for one in sizes]
    if any(type(size) is not int or size < 0 for size in found):
        raise ValueError("a size is not a number")
    return found


def _shape(sizes: Sequence[Mapping[str, Any]]) -> tuple[int | str, ...]:
    return tuple(int(one["as_int"]) if "as_int" in one else _symbol(str(one["as_expr"]["expr_str"])) for one in sizes)


def _symbol(expression: str) -> str:
    match = _SYMBOL.fullmatch(expression)
    return expression if match is None else match[1] or match[2]


def _name_of(output: Mapping[str, Any]) -> str | None:
    """The name of a value that a node or the program gives; None for no value."""
    ((kind, value),) = output.items()
    match kind:
        case "as_tensor":
            return str(value["name"])
        case "as_sym_int" | "as_sym_float" | "as_sym_bool" if "as_name" in value:
            return str(value["as_name"])
        case "as_none":
            return None
    raise ValueError(f"a result of the kind {str(kind)[:50]!r}")


def _output_names(calls: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The keys of the dict that the program returns; none where it returns a tensor or a tuple."""
    signature = next(call["signature"] for call in calls if call["fqn"] == "")
    _, spec = json.loads(signature["out_spec"])
    if spec["type"] != "builtins.dict":
        return ()
    keys = json.loads(spec["context"])
    return tuple(keys) if all(isinstance(key, str) for key in keys) else ()
