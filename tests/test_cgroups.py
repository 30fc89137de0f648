"""Limits of control groups are those of all groups around a process, in either version of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlops.cgroups import allowed_cores, allowed_memory

V2, V1_CPU, V1_MEMORY = "cgroup2 cgroup rw", "cgroup cgroup rw,cpu,cpuacct", "cgroup cgroup rw,memory"


@pytest.fixture
def machine(tmp_path: Path):
    """Makes /proc/self and what it names. mounts: (of, at, kind); files: by their path in the folder of mounts."""

    def make(*, cgroup: str, mounts: list[tuple[str, str, str]], files: dict[str, str]) -> Path:
        proc = tmp_path / "self"
        proc.mkdir()
        (proc / "cgroup").write_text(cgroup)
        lines = ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw", "23 22 0:5 / /proc rw - proc proc rw", "odd"]
        lines += [
            f"{31 + number} 22 0:28 {of} {str(tmp_path / at).replace(' ', chr(92) + '040')} rw shared:9 - {kind}"
            for number, (of, at, kind) in enumerate(mounts)
        ]
        (proc / "mountinfo").write_text("\n".join(lines))
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return proc

    return make


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, None, None),
        ({"cg/cpu.max": "max 100000\n", "cg/memory.max": "max\n"}, None, None),
        ({"cg/cpu.max": "200000 100000\n", "cg/memory.max": "536870912\n"}, 2, 2**29),
        ({"cg/system.slice/a.service/cpu.max": "150000 100000", "cg/system.slice/cpu.max": "max 100000"}, 1.5, None),
        # Of a group's limits and those around it the tightest holds.
        ({"cg/system.slice/cpu.max": "50000 100000", "cg/system.slice/a.service/cpu.max": "400000 100000"}, 0.5, None),
        ({"cg/system.slice/memory.max": "7", "cg/system.slice/a.service/memory.max": "9"}, None, 7),
        ({"cg/other.slice/cpu.max": "100000 100000", "cg/other.slice/memory.max": "7", "cpu.max": "1 1"}, None, None),
        ({"cg/cpu.max": "odd", "cg/memory.max": "odd"}, None, None),
        ({"cg/cpu.max": "", "cg/memory.max": ""}, None, None),
        ({"cg/cpu.max": "100000 0"}, None, None),
    ],
)
def test_version_2(machine, files: dict[str, str], cores: float | None, memory: int | None) -> None:
    proc = machine(cgroup="0::/system.slice/a.service\n", mounts=[("/", "cg", V2)], files=files)
    assert allowed_cores(proc) == cores
    assert allowed_memory(proc) == memory


def test_version_1_has_a_tree_for_each_controller(machine) -> None:
    proc = machine(
        cgroup="4:memory:/docker/b\n2:cpu,cpuacct:/docker/a\n1:name=systemd:/\n",
        mounts=[("/", "cpu", V1_CPU), ("/", "memory", V1_MEMORY), ("/", "unified", V2)],
        files={
            "cpu/docker/a/cpu.cfs_quota_us": "300000\n", "cpu/docker/a/cpu.cfs_period_us": "100000\n",
            "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n",
            "memory/docker/b/memory.limit_in_bytes": "1073741824\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )  # fmt: skip
    assert allowed_cores(proc) == 3
    assert allowed_memory(proc) == 2**30


@pytest.mark.parametrize("group", ["/docker/a", "/"])
def test_a_container_sees_its_own_part_of_the_tree(machine, group: str) -> None:
    """By the name that its group has outside, without a namespace of its own; with one, as the whole."""
    proc = machine(
        cgroup=f"2:cpu:{group}\n",
        mounts=[(group, "a folder/cpu", V1_CPU)],
        files={"a folder/cpu/cpu.cfs_quota_us": "250000", "a folder/cpu/cpu.cfs_period_us": "100000"},
    )
    assert allowed_cores(proc) == 2.5


def test_a_group_outside_of_what_is_mounted_has_the_limits_of_that(machine) -> None:
    proc = machine(cgroup="0::/../b\n", mounts=[("/a", "cg", V2)], files={"cg/cpu.max": "100000 100000"})
    assert allowed_cores(proc) == 1


def test_where_there_is_no_proc_there_is_no_limit(tmp_path: Path) -> None:
    assert allowed_cores(tmp_path / "absent") is None
    assert allowed_memory(tmp_path / "absent") is None


def test_this_machines_own_can_be_read() -> None:
    cores, memory = allowed_cores(), allowed_memory()
    assert cores is None or cores > 0
    assert memory is None or memory > 2**26
