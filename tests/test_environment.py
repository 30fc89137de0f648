"""The machine is described by what is really there."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest

from dlops import environment
from dlops.environment import Environment, available_cores, available_memory, describe_environment, installed_packages


def test_this_machine_is_described() -> None:
    found = describe_environment()
    assert found.python == platform.python_version()
    assert found.packages["numpy"] == np.__version__
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.memory_bytes > 2**28
    assert Environment.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (2.0, 2), (0.5, 1), (1.6, 2), (99.0, 8)])
def test_cores_are_cut_to_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(environment, "allowed_cores", lambda: quota)
    assert available_cores() == cores


@pytest.mark.parametrize(("limit", "memory"), [(None, 2**40), (2**29, 2**29), (2**50, 2**40)])
def test_memory_is_cut_to_the_limit(monkeypatch: pytest.MonkeyPatch, limit: int | None, memory: int) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**28}[name])
    monkeypatch.setattr(environment, "allowed_memory", lambda: limit)
    assert available_memory() == memory


def test_packages_that_are_not_installed_are_left_out() -> None:
    assert installed_packages(("numpy", "package-that-is-absent")) == {"numpy": np.__version__}


def test_gpus_are_what_the_driver_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for script, gpus in (
        ("echo 'A, 580, 1 MiB'; echo 'B, 580, 2 MiB'", ("A, 580, 1 MiB", "B, 580, 2 MiB")),
        ("echo 'no driver'; exit 9", ()),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert environment._gpus() == gpus
