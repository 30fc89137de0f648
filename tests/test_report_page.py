"""docs/report-json.md and docs/report.schema.json say what report.json holds: both are written from its types.

`python tests/test_report_page.py` writes them anew after a change of the types.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import re
import sys
import types
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic.fields import FieldInfo

from dlops.manifest import Manifest, Record
from dlops.report import Interval, Report

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, SCHEMA = DOCS / "report-json.md", DOCS / "report.schema.json"
GOLDEN = Path(__file__).parent / "golden" / "report.json"

INTRODUCTION = """\
# report.json, field by field

<!-- Written from the types in dlops/report*.py by `python tests/test_report_page.py`. -->

[`dlops bench`](bench.md) and `dlops quickstart` write a folder: `report.json`, which this page describes, a
`samples-<digest>.safetensors` with every raw sample, a trace for each [profile](#profile), and `report.html`.
[report.schema.json](report.schema.json) is the same as JSON Schema, for checking a file or generating types.

**The promise.** `schema` is {schema}. Under one number no field is removed or renamed, and none changes its type, its
unit or its meaning; fields may be added, with a default. So every later version of dlops reads a report that this one
wrote, and a program that passes over what it does not know goes on working. Where any of that has to change the number
rises, and dlops keeps reading the old one. An older dlops refuses a report with a higher number, and one with a field
that it does not know, and says so in one line; it never guesses.

**Reading it.** Every field is always written, those without a value as `null`. Times are in nanoseconds, shares are
fractions. Should a number be infinite or none, for which JSON has no word, it is the string `"Infinity"`,
`"-Infinity"` or `"NaN"`, and the schema file, which knows numbers only, refuses it. `dlops.read_report` checks `sha256`
and the digest of every file, so a report that was edited is refused. In Python:

    from dlops import read_report

    row = read_report("reports/mine").measurements[0]
    print(row.target, row.latency.p50_ns)
"""

# The unit that a name ends with, the longest ending first.
UNITS = {
    "_j_per_item": "J/item", "_per_s": "bytes/s", "_points": "percentage points", "bytes": "bytes", "_ns": "ns",
    "_s": "s",
}  # fmt: skip
UNIT = re.compile(r"\[(?P<unit>[^]]+)\]\s+")


@cache
def field_texts(record: type[Record]) -> dict[str, str]:
    """What is written under each field of a record and of those that it inherits from, as one line."""
    found: dict[str, str] = {}
    for kind in reversed(record.__mro__):
        if not issubclass(kind, Record) or kind is Record:
            continue
        (definition,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def key_of(name: str, field: FieldInfo) -> str:
    return field.alias or name


def unit_and_text(record: type[Record], name: str) -> tuple[str, str]:
    """A field's unit, empty where it has none, and what it is."""
    text = field_texts(record)[name]
    named = UNIT.match(text)
    if named:
        return named["unit"], text[named.end() :]
    return next((unit for ending, unit in UNITS.items() if name.endswith(ending)), ""), text


def parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations, and its arguments."""
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    return typing.get_origin(kind), typing.get_args(kind)


def is_nullable(kind: Any) -> bool:
    origin, arguments = parts(kind)
    return origin in (types.UnionType, typing.Union) and type(None) in arguments


def is_number(kind: Any) -> bool:
    """Whether it is a number, or numbers by name, or an interval of one: what has a unit."""
    origin, arguments = parts(kind)
    if origin in (types.UnionType, typing.Union, tuple):
        return any(is_number(one) for one in arguments)
    if origin is dict:
        return is_number(arguments[1])
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    return kind in (int, float, Interval)


def type_text(kind: Any) -> str:
    """A field's type as the page says it, records linked to their tables."""
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    origin, arguments = parts(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if one is type(None) else type_text(one) for one in arguments)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {type_text(arguments[0])}"
        return f"[{', '.join(type_text(one) for one in arguments)}]"
    if origin is dict:
        return f"object: {type_text(arguments[1])} by name"
    if isinstance(kind, type) and issubclass(kind, Record):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}.get(kind, "time")


def records(kind: Any, found: dict[type[Record], None] | None = None) -> dict[type[Record], None]:
    """All records that a type leads to, in the order that a reader meets them."""
    found = {} if found is None else found
    if isinstance(kind, type) and issubclass(kind, Record) and kind not in found:
        found[kind] = None
        for field in kind.model_fields.values():
            records(field.annotation, found)
    for one in parts(kind)[1]:
        records(one, found)
    return found


def page() -> str:
    lines = [INTRODUCTION.format(schema=Report.newest_schema)]
    for record in records(Report):
        lines += [f"## {record.__name__}", "", inspect.cleandoc(record.__doc__ or ""), ""]
        lines += ["| field | type | unit | what it is |", "|---|---|---|---|"]
        for name, field in record.model_fields.items():
            unit, text = unit_and_text(record, name)
            cells = (f"`{key_of(name, field)}`", type_text(field.annotation), unit, text)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def schema() -> dict[str, Any]:
    """JSON Schema of what is written, with what the page says of each field."""
    found = Report.model_json_schema(mode="serialization")
    for record in records(Report):
        described = found if record is Report else found["$defs"][record.__name__]
        for name, field in record.model_fields.items():
            of_field = described["properties"][key_of(name, field)]
            unit, text = unit_and_text(record, name)
            of_field["description"] = f"{text} Unit: {unit}." if unit else text
            of_field.pop("title", None)
            # Else it would have to be written anew for every version.
            if name == "dlops_version":
                of_field.pop("default", None)
        described["required"] = [key_of(name, field) for name, field in record.model_fields.items()]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def schema_text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def misfit(value: Any, described: dict[str, Any], root: dict[str, Any], at: str = "report") -> str | None:
    """Where and why a document is not what a JSON Schema describes, by the keywords that ours uses; None where it is.

    Raises KeyError for a keyword that is not known here, so that none is passed over.
    """
    kinds = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    checks: dict[str, Any] = {
        "type": lambda kind: isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool)),
        "const": lambda wanted: value == wanted,
        "enum": lambda allowed: value in allowed,
        "minimum": lambda least: value >= least,
        "exclusiveMinimum": lambda least: value > least,
        "minItems": lambda least: len(value) >= least,
        "maxItems": lambda most: len(value) <= most,
        "maxLength": lambda most: len(value) <= most,
        "pattern": lambda pattern: re.search(pattern, value) is not None,
        "required": lambda names: set(names) <= set(value),
        "$ref": lambda path: misfit(value, root["$defs"][path.removeprefix("#/$defs/")], root, at),
        "anyOf": lambda kinds_: not all(misfit(value, one, root, at) for one in kinds_),
    }
    said = {"$schema", "$defs", "title", "description", "default", "format"}
    inside = {"properties", "additionalProperties", "items", "prefixItems"}
    for keyword, argument in sorted(described.items(), key=lambda item: item[0] != "type"):
        if keyword in said | inside:
            continue
        result = checks[keyword](argument)
        if isinstance(result, str):
            return result
        if result is False:
            return f"{at}: {value!r} is not {keyword} {argument!r}"
    if isinstance(value, dict):
        rest = described.get("additionalProperties", True)
        for key, one in value.items():
            of_key = described.get("properties", {}).get(key, rest)
            if of_key is False:
                return f"{at}: {key} is not known"
            if of_key is not True and (problem := misfit(one, of_key, root, f"{at}.{key}")):
                return problem
    if isinstance(value, list):
        for index, one in enumerate(value):
            first = described.get("prefixItems", [])
            of_item = first[index] if index < len(first) else described["items"]
            if problem := misfit(one, of_item, root, f"{at}[{index}]"):
                return problem
    return None


def test_the_page_and_the_schema_are_what_the_types_say() -> None:
    assert PAGE.read_text() == page(), f"python {Path(__file__).name} writes it anew"
    assert SCHEMA.read_text() == schema_text(), f"python {Path(__file__).name} writes it anew"


def test_every_field_says_what_it_is_its_unit_and_when_it_is_null() -> None:
    wanting = []
    for record in records(Report):
        for name, field in record.model_fields.items():
            where = f"{record.__name__}.{name}"
            if name not in field_texts(record):
                wanting.append(f"{where}: no text under it")
                continue
            unit, text = unit_and_text(record, name)
            if is_number(field.annotation) and not unit:
                wanting.append(f"{where}: no unit")
            if is_nullable(field.annotation) and "null" not in text.lower():
                wanting.append(f"{where}: not said when it is null")
            if "|" in text:
                wanting.append(f"{where}: its text would break the table")
    assert wanting == []
    assert len(records(Report)) > 20


def test_the_golden_report_fits_the_schema() -> None:
    described = schema()
    golden = json.loads(GOLDEN.read_text())
    assert misfit(golden, described, described) is None


def _altered(path: str, value: Any) -> dict[str, Any]:
    document: dict[str, Any] = copy.deepcopy(json.loads(GOLDEN.read_text()))
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    inner: Any = document
    for step in way:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("measurements.0.latency.samples", 0),
        ("measurements.0.latency.samples", 1.5),
        ("measurements.0.latency.mean_ns", None),
        ("measurements.0.latency.p50_ns", {"value": 1.0, "low": None}),
        ("measurements.0.load.scenario", "both"),
        ("measurements.0.verdict.steady", 1),
        ("measurements.0.nodes", {"CPUExecutionProvider": 3}),
        ("measurements.0.verdict", ...),
        ("measurements.0.colour", "red"),
        ("telemetry.0.spans", {"row00": [100]}),
        ("files.samples.path", "../etc"),
        ("kind", "artifact"),
    ],
)
def test_a_document_that_is_no_report_does_not_fit_the_schema(path: str, value: Any) -> None:
    described = schema()
    problem = misfit(_altered(path, value), described, described)
    assert problem is not None
    assert path.split(".")[0] in problem


def test_fields_under_one_schema_number_have_defaults() -> None:
    """What a report of the first version held is enough to read one: later fields were added with a default."""
    required = {key_of(name, field) for name, field in Report.model_fields.items() if field.is_required()}
    assert required == {"title", "created", "command", "environment", "measurements"}
    assert Report.newest_schema == Manifest.newest_schema == 1


if __name__ == "__main__":
    PAGE.write_text(page())
    SCHEMA.write_text(schema_text())
    sys.stdout.write(f"wrote {PAGE} and {SCHEMA}\n")
