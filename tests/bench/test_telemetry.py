"""The machine beside a run: what is read, what is said of rows, and what a machine that tells nothing gives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dlops.bench import nvml, telemetry
from dlops.bench.attended import Attended, AttendedTurn
from dlops.bench.cputime import Ticks, Trees, is_here, listeners, machine_ticks
from dlops.bench.disturbed import Seen, attach, other_load, seen_in_turns
from dlops.bench.inprocess import misplaced
from dlops.bench.reanalysis import reanalyse
from dlops.bench.results import merge, save_report
from dlops.bench.run import measure
from dlops.bench.sensors import Rapl, Sensors, find_sensors
from dlops.bench.series import MOST_POINTS, recorded
from dlops.bench.telemetry import Recorder, Timeline
from dlops.report import read_report
from dlops.runtimes import Placement, SessionOptions
from dlops.timing import Turn, WarmUp
from tests.nvml_stand_in import FakeNvml

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
SECOND = 1_000_000_000
SPIN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass"


def write(root: Path, **files: str) -> Path:
    """files: contents by path, with "__" for "/"."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


GPUS = (nvml.Gpu(name="a", pci="00000000:3B:00.0"), nvml.Gpu(name="b", pci="00000000:5E:00.0"))


def timeline(seconds: int = 10, **values: object) -> Timeline:
    """A sample a second from 0 s on; a value is what there is at every sample, or grows by so much a second."""
    times = np.arange(seconds + 1) * SECOND
    arrays = {
        name: np.array(value, np.int64) if isinstance(value, list) else np.arange(seconds + 1) * int(value)
        for name, value in values.items()
        if name != "options"
    }
    return Timeline(interval_s=1.0, times_ns=times, values=arrays, cpus=2, **values.get("options", {}))


def seen(begin_s: float = 1.0, end_s: float = 9.0, **options: object) -> Seen:
    options = {"items": 100.0} | options
    return Seen(begin_ns=round(begin_s * SECOND), end_ns=round(end_s * SECOND), **options)


def judged(example, line: Timeline, one: Seen, number: int = 0, **changes: object):
    measured = example()
    row = measured.measurements[number]
    row = row.model_copy(
        update={"verdict": row.verdict.model_copy(update={"steady": True, "reasons": (), "observed": ()}), **changes}
    )
    report = measured.report.model_copy(update={"measurements": (row,)})
    new = attach(type(measured)(report=report, samples=measured.samples), line, {row.samples: one})
    return new.measurements[0]


def test_busy_and_steal_are_of_the_processors_that_the_run_may_use(tmp_path) -> None:
    proc = write(
        tmp_path,
        stat="cpu 999 9 9 9 9 9 9 9 0 0\ncpu0 10 1 5 100 7 3 4 2 0 0\ncpu1 20 2 6 100 7 3 4 1 0 0\n"
        "cpu2 500 0 0 0 0 0 0 0 0 0\nctxt 1",
    )  # fmt: skip
    assert machine_ticks(frozenset({0, 1}), proc) == Ticks(busy=44, steal=3)
    with pytest.raises(ValueError, match="none of the processors"):
        machine_ticks(frozenset({7}), proc)


@LINUX
def test_a_tree_counts_its_processes_living_and_ended_and_nobody_else() -> None:
    hz = os.sysconf("SC_CLK_TCK")
    stranger = subprocess.Popen([sys.executable, "-c", SPIN.format(60)])
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', '''{SPIN.format(0.4)}'''])\n"
    ours = subprocess.Popen(
        [sys.executable, "-c", f"{parent}print('done', flush=True)\n{SPIN.format(0.3)}\nprint(1)\ninput()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        trees = Trees([ours.pid])
        before = trees.used()
        assert ours.stdout.readline() == b"done\n"
        with_child = trees.used()
        assert ours.stdout.readline() == b"1\n"
        after = trees.used()
    finally:
        for process in (stranger, ours):
            process.kill()
            process.communicate()
    # A tick is lost where a process's time is cut to whole ones. The interpreters' starts come on top.
    assert with_child - before >= 0.4 * hz - 4
    assert after - with_child >= 0.3 * hz - 4
    assert after <= with_child + 0.3 * hz + 4, "the stranger's time is not ours"


def test_a_process_added_later_counts_from_then_on(tmp_path) -> None:
    def process(pid: int, user: int, children: str = "") -> None:
        numbers = " ".join(["0"] * 10)
        files = {f"{pid}__stat": f"{pid} (a) b) S {numbers} {user} 1 0 0 0", f"{pid}__task__{pid}__children": children}
        write(tmp_path, **files)

    process(1, 100, "2")
    process(2, 50)
    process(3, 7000)
    trees = Trees([1], tmp_path)
    process(2, 60)
    assert trees.used() == 10
    trees.add([3, 2])
    process(3, 7005)
    assert trees.used() == 15
    (tmp_path / "3" / "stat").unlink()
    assert trees.used() == 15
    trees.used()  # what has gone for good is gone
    process(1, 104, "2")
    assert trees.used() == 19
    with pytest.raises(OSError, match="children"):
        Trees([9], tmp_path)


@LINUX
def test_who_listens_on_a_port_is_found() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert listeners(port) == []
        server.listen()
        assert listeners(port) == [os.getpid()]
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1"), "an address for documentation is no machine's"


def test_sensors_give_what_is_there_and_say_what_is_not(tmp_path) -> None:
    cpu = "devices__system__cpu__cpu"
    files = {
        f"{cpu}0__cpufreq__scaling_cur_freq": "1200000",
        f"{cpu}1__cpufreq__scaling_cur_freq": "3400000",
        f"{cpu}7__cpufreq__scaling_cur_freq": "5000000",
        f"{cpu}0__thermal_throttle__core_throttle_count": "3",
        f"{cpu}0__thermal_throttle__package_throttle_count": "4",
        "class__hwmon__hwmon0__name": "nvme",
        "class__hwmon__hwmon0__temp1_input": "90000",
        "class__hwmon__hwmon1__name": "coretemp",
        "class__hwmon__hwmon1__temp1_input": "51000",
        "class__hwmon__hwmon1__temp2_input": "63000",
    }
    files |= {
        "fs__cgroup__a__b__cpu.stat": "usage_usec 9\nthrottled_usec 40", "fs__cgroup__a__cpu.stat": "throttled_usec 2",
        "fs__cgroup__cpu.stat": "usage_usec 9",
    }  # fmt: skip
    sys_ = write(tmp_path / "sys", **files)
    proc = write(tmp_path / "proc", loadavg="1.25 1 1 1/9 99", self__cgroup="5:cpuset:/x\n0::/a/b")
    found = find_sensors(frozenset({0, 1}), sys=sys_, proc=proc)
    assert found.read() == {
        "cpu_frequency_khz": 3_400_000, "cpu_temperature_mc": 63_000, "cpu_throttle_count": 7, "load_milli": 1250,
        "quota_stall_us": 42,
    }  # fmt: skip
    assert set(found.absent) == {"memory pressure", "CPU energy"}

    bare = find_sensors(frozenset({0}), sys=tmp_path / "none", proc=write(tmp_path / "p", loadavg="0 0 0 1/1 1"))
    assert bare.read() == {"load_milli": 0}
    assert set(bare.absent) == {
        "CPU frequency", "CPU temperature", "CPU throttle counters", "CPU quota", "memory pressure", "CPU energy"
    }  # fmt: skip
    assert all(bare.absent.values())


def rapl(root: Path, **zones: tuple[str, str]) -> Path:
    for zone, (name, energy) in zones.items():
        folder = f"class__powercap__intel-rapl:{zone}"
        files = {f"{folder}__name": name, f"{folder}__energy_uj": energy, f"{folder}__max_energy_range_uj": "1000"}
        write(root, **files)
    return root


def test_energy_is_that_of_packages_and_memory_and_goes_on_where_a_counter_wraps(tmp_path) -> None:
    root = rapl(
        tmp_path,
        **{"0": ("package-0", "900"), "0:0": ("core", "1"), "0:1": ("dram", "50"), "1": ("psys", "5")},
    )  # fmt: skip
    counters = Rapl(root)
    assert counters.domains == ["package-0", "dram-0"]
    assert counters.read() == {"package-0_energy_uj": 900, "dram-0_energy_uj": 50}
    rapl(root, **{"0": ("package-0", "100")})
    assert counters.read()["package-0_energy_uj"] == 1100


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="shows what a counter for root alone says")
def test_a_counter_that_cannot_be_read_is_absent_with_the_reason(tmp_path, monkeypatch) -> None:
    root = rapl(tmp_path, **{"0": ("package-0", "900")})
    whole = Path.read_text

    def refuse(path: Path, *args: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return whole(path, *args)

    monkeypatch.setattr(Path, "read_text", refuse)
    counters = Rapl(root)
    assert counters.domains == []
    assert "for root alone" in counters.absent["CPU energy"]


def test_a_gpu_gives_what_nvml_knows_in_base_units(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("pynvml"))
    sensors = Sensors()
    assert nvml.find_gpus(sensors) == [nvml.Gpu(name="NVIDIA Example", pci="00000000:3B:00.0")]
    assert sensors.read() == {
        "gpu0_utilization_ppm": 850_000, "gpu0_sm_clock_khz": 1_700_000, "gpu0_memory_clock_khz": 1_700_000,
        "gpu0_power_mw": 250_000, "gpu0_memory_bytes": 12_000_000_000, "gpu0_clock_events_bits": 0x24,
        "gpu0_energy_uj": 5_000_000,
    }  # fmt: skip
    assert sensors.absent == {"GPU0 temperature": "NVML: Not Supported"}


def test_without_nvml_there_is_no_gpu_and_a_reason(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sensors = Sensors()
    assert nvml.find_gpus(sensors) == []
    assert sensors.absent == {"GPU": "nvidia-ml-py is not installed"}


def test_other_load_is_what_is_left_of_busy_time_and_steal_by_name(example) -> None:
    line = timeline(busy_ticks=150, ours_ticks=100, steal_ticks=10)
    assert other_load(line, seen()) == pytest.approx((0.30, 0.05))
    row = judged(example, line, seen())
    said = "other load on the machine: 30% of the CPU time was not ours; other virtual machines took 5% (steal)"
    assert row.verdict.reasons == row.verdict.observed == (said,)
    assert not row.verdict.steady
    assert row.other_load == 0.3


def test_little_other_load_is_said_and_the_row_stands_and_less_is_not_said(example) -> None:
    row = judged(example, timeline(busy_ticks=110, ours_ticks=100, steal_ticks=0), seen())
    assert row.verdict.remarks == ("other load on the machine: 5% of the CPU time was not ours",)
    assert row.verdict.steady
    quiet = judged(example, timeline(busy_ticks=103, ours_ticks=100, steal_ticks=0), seen())
    assert quiet.verdict.reasons == ()
    assert quiet.other_load == 0.015


@pytest.mark.parametrize(
    ("line", "one"),
    [
        (timeline(busy_ticks=150, ours_ticks=100, steal_ticks=0), seen(1.0, 1.9)),
        (timeline(busy_ticks=150, ours_ticks=100, steal_ticks=0), seen(1.0, 11.0)),
        (
            timeline(busy_ticks=150, ours_ticks=0, steal_ticks=0, options={"services": {"u": "hidden"}}),
            seen(service="u"),
        ),
        (Timeline(interval_s=0.25), seen()),
    ],
    ids=["too short", "not sampled to the end", "a service that cannot be seen", "nothing sampled"],
)  # fmt: skip
def test_where_other_load_cannot_be_told_it_is_not_said(example, line, one) -> None:
    row = judged(example, line, one)
    assert row.other_load is None
    assert row.verdict.reasons == ()


def test_a_processor_that_throttles_marks_the_row(example) -> None:
    count = [0] * 5 + [3] * 6
    line = timeline(cpu_throttle_count=count)
    assert judged(example, line, seen()).verdict.reasons == (
        "throttled: the processor's thermal throttle counters rose by 3",
    )
    assert judged(example, line, seen(6.0, 9.0)).verdict.reasons == ()
    elsewhere = timeline(cpu_throttle_count=count, options={"services": {"u": "elsewhere"}})
    assert judged(example, elsewhere, seen(service="u"), number=4).verdict.reasons == ()


def test_a_quota_that_stops_the_run_marks_the_row(example) -> None:
    (said,) = judged(example, timeline(quota_stall_us=50_000), seen()).verdict.reasons
    assert said == "throttled: a CPU quota stopped it for 5% of the time, summed over processors"
    assert judged(example, timeline(quota_stall_us=5_000), seen()).verdict.reasons == ()


def test_a_frequency_that_falls_under_load_marks_the_row_and_one_that_falls_with_it_does_not(example) -> None:
    fell = [3_400_000] * 10 + [2_900_000] * 11
    busy = timeline(20, cpu_frequency_khz=fell, busy_ticks=100, ours_ticks=100, steal_ticks=0)
    (said,) = judged(example, busy, seen(1.0, 19.0)).verdict.reasons
    assert said == "throttled: the processor's frequency fell from 3.40 to 2.90 GHz under load"
    ours = [100 * min(second, 10) for second in range(21)]
    idle = timeline(20, cpu_frequency_khz=fell, busy_ticks=ours, ours_ticks=ours, steal_ticks=0)
    assert judged(example, idle, seen(1.0, 19.0)).verdict.reasons == ()


def test_a_gpu_that_throttles_marks_rows_that_ran_on_it(example) -> None:
    events = [0x1] * 6 + [0x4] * 5  # idle is no throttling
    # The other is as busy, with work of somebody else.
    line = timeline(
        gpu0_clock_events_bits=events, gpu0_utilization_ppm=[900_000] * 11,
        gpu1_clock_events_bits=[0x40] * 11, gpu1_utilization_ppm=[900_000] * 11,
        options={"gpus": GPUS, "services": {"u": "here"}},
    )  # fmt: skip
    first, second = "throttled: GPU 0: power cap in 44%", "throttled: GPU 1: thermal slowdown by hardware in 100%"
    (said,) = judged(example, line, seen(gpu="0000:3b:00.0"), device="cuda:0").verdict.reasons
    assert said == f"{first} of the samples"
    # CUDA's number is its own: by the place on the bus it is NVML's second.
    (said,) = judged(example, line, seen(gpu="0000:5E:00.0"), device="cuda:0").verdict.reasons
    assert said == f"{second} of the samples"
    assert judged(example, line, seen()).verdict.reasons == ()
    # Which one a service runs on is not known: each that is busy may be it.
    assert len(judged(example, line, seen(service="u"), number=4).verdict.reasons) == 2


def test_a_row_whose_gpu_is_not_known_has_none_of_anothers_numbers_and_the_report_says_so(example) -> None:
    line = timeline(
        gpu0_clock_events_bits=[0x40] * 11, gpu0_utilization_ppm=[900_000] * 11, gpu0_energy_uj=30_000_000,
        options={"gpus": GPUS[:1]},
    )  # fmt: skip
    for where in (None, "0000:99:00.0"):
        row = judged(example, line, seen(gpu=where), device="cuda:0")
        assert row.verdict.reasons == ()
        assert row.energy_j_per_item is None
    measured = example()
    (row, *_) = measured.measurements
    report = measured.report.model_copy(update={"measurements": (row.model_copy(update={"device": "cuda:0"}),)})
    measured = type(measured)(report=report, samples=measured.samples)
    said = "which GPU some rows ran on"
    assert said in attach(measured, line, {row.samples: seen()}).report.telemetry[0].absent
    assert said not in attach(measured, line, {row.samples: seen(gpu=GPUS[0].pci)}).report.telemetry[0].absent


def test_gpus_are_told_apart_by_their_place_on_the_bus_however_it_is_written() -> None:
    assert nvml.same_gpu("00000000:3B:00.0", "0000:3b:00.0")
    assert nvml.same_gpu("00010000:0A:1F.0", "10000:0a:1f.0")
    assert not nvml.same_gpu("00000000:3B:00.0", "0000:3c:00.0")
    assert not nvml.same_gpu("00000001:3B:00.0", "0000:3b:00.0")


def test_memory_that_grew_is_that_of_the_gpu_that_is_asked_about(monkeypatch) -> None:
    used = {0: 1000, 1: 5000}

    class Two(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:  # noqa: N802
            return 2

        def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
            return index

        def nvmlDeviceGetPciInfo(self, handle: int) -> object:  # noqa: N802
            return types.SimpleNamespace(busId=GPUS[handle].pci)

        def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:  # noqa: N802
            return types.SimpleNamespace(used=used[handle])

    monkeypatch.setitem(sys.modules, "pynvml", Two("pynvml"))
    grown = nvml.memory_growth()
    used |= {0: 9000, 1: 5700}
    assert (grown("0000:5e:00.0"), grown("0000:3b:00.0"), grown("0000:99:00.0")) == (700, 8000, None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.memory_growth() is None


def test_a_row_in_turns_has_the_energy_of_its_own_turns(example) -> None:
    turns = [
        [AttendedTurn(begin_ns=n * SECOND, end_ns=n * SECOND + 1, calls=10, energy_uj=energy) for n in range(1, 5)]
        for energy in (2_000_000, 500_000)
    ]
    first, second = (seen_in_turns(turns, number, batch=2) for number in (0, 1))
    line = timeline(**{"package-0_energy_uj": 10})
    row = judged(example, line, first)
    assert row.energy_j_per_item == pytest.approx(8.0 / 80)
    assert row.energy_sources == ("package-0",)
    assert judged(example, line, second).energy_j_per_item == pytest.approx(2.0 / 80)
    # A counter that stands still for a whole turn cannot tell turns apart.
    turns[1][2] = AttendedTurn(begin_ns=3, end_ns=4, calls=10, energy_uj=0)
    assert judged(example, line, seen_in_turns(turns, 1, batch=2)).energy_j_per_item is None


def test_a_service_has_the_energy_of_the_machine_while_it_ran_and_a_far_one_none(example) -> None:
    counters = {"package-0_energy_uj": 5_000_000, "gpu0_energy_uj": 20_000_000}
    here = timeline(**counters, options={"services": {"u": "here"}, "gpus": GPUS[:1]})
    row = judged(example, here, seen(service="u"), number=4)
    assert row.energy_j_per_item == pytest.approx(25 * 8 / 100)
    assert row.energy_sources == ("package-0", "gpu0")
    far = timeline(**counters, options={"services": {"u": "elsewhere"}, "gpus": GPUS[:1]})
    assert judged(example, far, seen(service="u"), number=4).energy_j_per_item is None


def test_on_a_gpu_only_a_row_that_was_alone_has_an_energy(example) -> None:
    line = timeline(gpu0_energy_uj=30_000_000, options={"gpus": GPUS[:1]})
    there = GPUS[0].pci
    row = judged(example, line, seen(gpu=there), device="cuda:0")
    assert row.energy_j_per_item == pytest.approx(30 * 8 / 100)
    assert judged(example, line, seen(gpu=there, alone=False), device="cuda:0").energy_j_per_item is None


class _Arm:
    def warm_up(self, limit_s: float) -> WarmUp:
        return WarmUp(calls=1, settled=True)

    def take_turn(self, turn_s: float) -> Turn:
        # The first fifth is the lead-in, whose calls are not kept.
        now = time.perf_counter_ns()
        starts = now + np.arange(20, 100) * 1_000_000
        return Turn(starts_ns=starts, latencies_ns=np.full(80, 1_000_000))


def test_calls_of_a_lead_in_count_where_energy_is_shared_out() -> None:
    energy = iter(range(0, 100, 7))
    arm = Attended(_Arm(), lambda: {"package-0_energy_uj": next(energy), "dram-0_energy_uj": 0})
    arm.take_turn(0.1)
    (turn,) = arm.turns
    assert turn.calls == pytest.approx(100, rel=0.01)
    assert turn.energy_uj == 7
    plain = Attended(_Arm())
    plain.take_turn(0.1)
    assert plain.turns[0].energy_uj is None


def test_a_session_that_does_not_run_where_it_was_asked_to_is_told_of() -> None:
    cpu = Placement(runtime="r", device="cpu", provider="CPUExecutionProvider", precision="fp32", threads=1)
    assert misplaced(SessionOptions(device="cuda"), cpu) == (
        "wrong provider: asked for cuda, ran on CPUExecutionProvider (cpu)",
    )
    assert misplaced(SessionOptions(device="cpu"), cpu) == misplaced(SessionOptions(device="auto"), cpu) == ()


def test_products_on_the_cpu_beside_a_gpu_are_told_of_and_shapes_are_not() -> None:
    gpu = Placement(runtime="r", device="cuda:0", provider="CUDAExecutionProvider", precision="fp32", threads=1)
    shapes = {"CUDAExecutionProvider": {"Conv": 3}, "CPUExecutionProvider": {"Gather": 2, "Shape": 1}}
    assert misplaced(SessionOptions(device="cuda"), replace(gpu, nodes=shapes)) == ()
    for own in ({"CUDAExecutionProvider": {"Conv": 3}}, {}):
        nodes = {**own, "CPUExecutionProvider": {"Conv": 2, "Shape": 1, "MatMul": 1}}
        for device in ("cuda", "auto"):
            assert misplaced(SessionOptions(device=device), replace(gpu, nodes=nodes)) == (
                "wrong provider: on cuda:0, and 2 Conv, 1 MatMul on the CPU",
            )
    on_cpu = replace(gpu, device="cpu", provider="CPUExecutionProvider", nodes={"CPUExecutionProvider": {"Conv": 1}})
    assert misplaced(SessionOptions(device="cpu"), on_cpu) == ()


def test_a_long_timeline_is_kept_in_few_points_that_lose_no_time_and_no_event() -> None:
    events = np.zeros(2001, np.int64)
    events[777] = 0x40
    line = timeline(
        2000, busy_ticks=120, ours_ticks=50, steal_ticks=10, memory_stall_us=1000, load_milli=[500] * 2001,
        gpu0_clock_events_bits=events.tolist(), gpu0_energy_uj=7_000_000, options={"gpus": GPUS[:1]},
    )  # fmt: skip
    telemetry, arrays = recorded(line, spans={"row00": (5 * SECOND, 9 * SECOND)}, key="telemetry00")
    times = arrays["telemetry00.times_ns"]
    assert len(times) <= MOST_POINTS
    assert telemetry.samples == 2001
    assert telemetry.spans == {"row00": (5 * SECOND, 9 * SECOND)}
    for name, value in {
        "cpu_ours_ppm": 250_000, "cpu_other_ppm": 400_000, "cpu_steal_ppm": 50_000, "memory_stall_ppm": 1000,
        "load_milli": 500, "gpu0_power_mw": 7000,
    }.items():  # fmt: skip
        assert (arrays[f"telemetry00.{name}"] == value).all(), name
    (at,) = np.flatnonzero(arrays["telemetry00.gpu0_clock_events_bits"])
    assert abs(times[at] - 777 * SECOND) <= 4 * SECOND
    assert all(array.dtype == np.int64 and len(array) == len(times) for array in arrays.values())


def test_a_last_sample_just_after_another_makes_no_point_of_its_own() -> None:
    times = np.array([0, 1, 2, 2.001]) * SECOND
    ticks = np.array([0, 50, 100, 101])
    values = {"busy_ticks": ticks, "ours_ticks": ticks, "steal_ticks": ticks * 0}
    line = Timeline(interval_s=1.0, times_ns=times.astype(np.int64), values=values, cpus=1)
    _, arrays = recorded(line, spans={}, key="t")
    assert len(arrays["t.cpu_ours_ppm"]) == 2
    assert arrays["t.cpu_ours_ppm"] == pytest.approx([500_000, 505_000], rel=0.01)


def test_where_nothing_can_be_sampled_the_report_says_why(example, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with Recorder() as recorder:
        recorder.watch("u", "127.0.0.1", 1)
        line = recorder.end()
    assert "darwin" in line.absent["telemetry"]
    telemetry, arrays = recorded(line, spans={}, key="telemetry00")
    assert (telemetry.samples, telemetry.series, arrays) == (0, (), {})


@LINUX
def test_a_sampling_process_that_is_killed_ends_no_run() -> None:
    with Recorder() as recorder:
        os.kill(recorder.pid, signal.SIGKILL)
        recorder.watch("u", "127.0.0.1", 1)
        line = recorder.end()
    assert line.absent["telemetry"] == "the process that samples ended with SIGKILL"
    assert len(line.times_ns) == 0


@LINUX
def test_a_stranger_is_seen_beside_a_run_whose_own_work_is_not(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact(hidden=64)
    # No child of this process, which is the run: its shell has ended.
    command = ["sh", "-c", '"$0" -c "$1" >/dev/null & echo $!', sys.executable, SPIN.format(600)]
    stranger = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    try:
        measured = measure([artifact], duration_s=1.2, threads=1)
    finally:
        os.kill(stranger, signal.SIGKILL)
    network = measure([serve(artifact).url], payload=artifact, duration_s=0.3)
    (row,) = measured.measurements
    # The stranger takes half of one processor or more; what else runs only adds to it.
    assert row.other_load > 0.25 / len(os.sched_getaffinity(0))
    said = any(reason.startswith("other load on the machine") for reason in row.verdict.reasons)
    assert said == (row.other_load >= 0.03)
    assert network.report.telemetry[0].absent.keys() == measured.report.telemetry[0].absent.keys()

    both = merge(measured, network)
    report = save_report(both, tmp_path / "report")
    assert [one.key for one in report.telemetry] == ["telemetry00", "telemetry01"]
    assert [list(one.spans) for one in report.telemetry] == [["row00"], ["row01"]]
    samples = read_report(tmp_path / "report").raw_samples()
    assert (samples["telemetry01.times_ns"] == network.samples["telemetry00.times_ns"]).all()
    ours = samples["telemetry00.cpu_ours_ppm"]
    # On average: where the machine is busy, a single sample may come late and hold more than its time.
    assert 0 < ours.mean() <= 1_100_000
    # Worked out again, all of it is as before.
    again = reanalyse(read_report(tmp_path / "report"))
    assert again.measurements == report.measurements
    assert again.report.telemetry == report.telemetry


@LINUX
def test_a_run_does_not_wait_for_what_only_watches_it(monkeypatch) -> None:
    monkeypatch.setattr(telemetry, "_ANSWER_S", 0.0)
    with Recorder() as recorder:
        timeline = recorder.end()
    assert timeline.absent["telemetry"] == "the process that samples did not answer within 0 s"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux knows SCHED_IDLE and groups of sessions")
def test_the_observer_takes_idle_time_only_in_a_session_of_its_own_too() -> None:
    code = (
        "import os; from pathlib import Path; from dlops.bench.observer import _stand_back; _stand_back();"
        "group = Path('/proc/self/autogroup'); print(os.sched_getscheduler(0) == os.SCHED_IDLE);"
        "print(group.read_text().split()[-1] if group.exists() else 'none')"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], start_new_session=True, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0] == "True"
    assert said[1] in ("19", "none")


def test_the_observer_imports_neither_numpy_nor_a_runtime() -> None:
    code = "import sys, dlops.bench.observer; print([one for one in ('numpy', 'onnxruntime') if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
