"""The list of all networks: what is kept between runs, what is tried again, and what is said of it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision import models
from torchvision.models import list_models

from dlops.errors import UsageError
from dlops.version import __version__
from dlops.workflows import zoo
from dlops.workflows.zoo import FORMATS, Tried, main, run_zoo, table, try_network

PASSES = dict.fromkeys(FORMATS, (True, ""))


def rows(name: str, found: dict[str, tuple[bool | None, str]] = PASSES, **changes: str) -> list[Tried]:
    return [
        Tried(network=name, slug=slug, passed=passed, reason=reason, torch=torch.__version__, parameters=1_200_000)
        .model_copy(update=changes)
        for slug, (passed, reason) in found.items()
    ]  # fmt: skip


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that a process was started for, each of which passes."""
    names: list[str] = []

    def in_a_process(name: str, limit_s: float) -> list[Tried]:
        names.append(name)
        return rows(name)

    monkeypatch.setattr(zoo, "_in_a_process", in_a_process)
    return names


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path, tried: list[str]) -> None:
    kept = tmp_path / "new" / "zoo.jsonl"
    assert len(run_zoo(["squeezenet*"], kept=kept)) == 4
    assert tried == ["squeezenet1_0", "squeezenet1_1"]
    # As a kill leaves it: the last line is cut short.
    kept.write_text(kept.read_text()[:-20])
    found = run_zoo(["squeezenet*", "mnasnet0_5"], kept=kept)
    assert tried[2:] == ["mnasnet0_5", "squeezenet1_1"]
    assert [one.network for one in found] == [name for name in sorted(set(tried)) for _ in FORMATS]
    run_zoo(["squeezenet1_0"], kept=kept, again=True)
    assert tried[4:] == ["squeezenet1_0"]


@pytest.mark.parametrize(
    ("before", "again"),
    [
        (rows("squeezenet1_0"), False),
        (rows("squeezenet1_0", dict.fromkeys(FORMATS, (None, "600 M parameters"))), False),
        (rows("squeezenet1_0", PASSES | {FORMATS[0]: (False, "not done after 2 s")}), True),
        (rows("squeezenet1_0", torch="1.0"), True),
        (rows("squeezenet1_0", dlops_version="0.0.1"), True),
        (rows("squeezenet1_0")[:1], True),
    ],
    ids=["passed", "not to be tried", "failed", "another torch", "another dlops", "one format"],
)
def test_what_is_tried_again(before: list[Tried], again: bool, tmp_path: Path, tried: list[str]) -> None:
    kept = tmp_path / "zoo.jsonl"
    kept.write_text("".join(one.model_dump_json() + "\n" for one in before))
    found = run_zoo(["squeezenet1_0"], kept=kept)
    assert tried == ["squeezenet1_0"] * again
    # The newest line of a network counts.
    assert [one.passed for one in found] == ([True, True] if again else [one.passed for one in before])


def test_a_name_that_fits_nothing_is_one_line(tmp_path: Path, tried: list[str], capsys) -> None:
    with pytest.raises(UsageError, match="torchvision builds no network of that name"):
        run_zoo(["nothing*"], kept=tmp_path / "zoo.jsonl")
    assert main(["nothing*", "--kept", str(tmp_path / "zoo.jsonl")]) == 2
    assert "zoo: nothing*: torchvision builds no network" in capsys.readouterr().err
    assert tried == []


def test_the_table_counts_and_gives_reasons() -> None:
    some = [
        *rows("a"), *rows("b", {FORMATS[0]: (False, "it | broke"), FORMATS[1]: (True, "")}),
        *rows("c", dict.fromkeys(FORMATS, (None, "quantized already")), parameters=None),
    ]  # fmt: skip
    lines = table(some).splitlines()
    assert lines[2:4] == ["| onnx-fp32 | 1 | 1 | 1 |", "| torchscript-fp32 | 2 | 0 | 1 |"]
    assert "| a | 1.2 M | passed | passed |" in lines
    assert "| b | 1.2 M | FAILED: it \\| broke | passed |" in lines
    assert "| c | – | not tried: quantized already | not tried: quantized already |" in lines


@pytest.mark.parametrize("failed", [False, True])
def test_the_status_says_whether_all_passed(failed: bool, tmp_path: Path, monkeypatch, capsys) -> None:
    found = rows("squeezenet1_0", PASSES | {FORMATS[0]: (not failed, "")})
    monkeypatch.setattr(zoo, "_in_a_process", lambda name, limit_s: found)
    assert main(["squeezenet1_0", "--kept", str(tmp_path / "zoo.jsonl")]) == int(failed)
    assert "| squeezenet1_0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda *_, **__: subprocess.CompletedProcess([], -9, "", "Killed\n"), "its process ended with -9: Killed"),
        (lambda *_, timeout, **__: (_ for _ in ()).throw(subprocess.TimeoutExpired([], timeout)), "not done after 7 s"),
    ],
    ids=["killed", "too slow"],
)
def test_a_process_that_ends_otherwise_is_a_failure_with_its_reason(
    run: Callable[..., object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", run)
    found = zoo._in_a_process("squeezenet1_0", 7)
    assert [(one.slug, one.passed, one.reason) for one in found] == [(slug, False, reason) for slug in FORMATS]


def test_what_is_quantized_or_too_large_is_not_tried_and_says_why() -> None:
    quantized = next(name for name in list_models() if name.startswith("quantized_mobilenet_v2"))
    for name, reason in ((quantized, "quantized"), ("vit_h_14", "M parameters, over 200 M")):
        found = try_network(name)
        assert [(one.passed, one.dlops_version) for one in found] == [(None, __version__)] * 2
        assert all(reason in one.reason for one in found)


def test_parameters_are_counted_where_a_network_cannot_be_built_without_memory() -> None:
    for name, count in (("regnet_x_400mf", 5_495_976), ("squeezenet1_1", 1_235_496)):
        assert zoo._count_parameters(getattr(models, name), {}) == count


@pytest.mark.slow
def test_a_network_is_exported_in_a_process_of_its_own(tmp_path: Path) -> None:
    found = run_zoo(["squeezenet1_1"], kept=tmp_path / "zoo.jsonl")
    assert [(one.passed, one.reason) for one in found] == [(True, "")] * 2
    assert all(one.seconds > 0 and one.parameters for one in found)
