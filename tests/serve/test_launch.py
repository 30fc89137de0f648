"""How the server starts, fails to start, and ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import pytest

from dlops.artifact import open_artifact
from dlops.errors import CorruptError, DlopsError, GateError, MachineError, UsageError
from dlops.serve import launch, ports
from dlops.serve.launch import ServerProcess, serve_artifacts
from dlops.serve.ports import claim_port
from dlops.serve.settings import Settings
from dlops.serve.supervision import read_failure, write_failure

FOREGROUND = """
import sys
from dlops.errors import DlopsError
from dlops.serve.launch import serve_artifacts
try:
    sys.exit(serve_artifacts([sys.argv[1]], port=int(sys.argv[2])))
except DlopsError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], *, port: int, **options):
    """A server in the foreground of a process of its own, once it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        deadline = time.monotonic() + 60
        # One client for all: each reads the certificates of the whole world.
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            while True:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                try:
                    if client.get("/v2/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_server_and_all_that_it_started_end_with_the_block(digits_artifact) -> None:
    with ServerProcess(digits_artifact, workers=2) as server:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(family) == 3
        folder = server.log_path.parent
        url = server.url
        # Both workers count into one /metrics, and junk elsewhere on the machine does not.
        with httpx.Client(headers={"Connection": "close"}) as client:
            for _ in range(20):
                client.get(f"{url}/v2")
        counts = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if 'route="/v2",status="200"' in line]
        assert counts[0].endswith(" 20.0")
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    assert not folder.exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_worker_in_the_place_of_a_killed_one_takes_nothing_before_it_can_answer(digits_artifact) -> None:
    def ready(client: httpx.Client) -> str:
        return next(line for line in client.get("/metrics").text.splitlines() if line.startswith("dlops_ready "))

    with (
        ServerProcess(digits_artifact, workers=2) as server,
        # A connection each, which goes to whichever worker accepts it.
        httpx.Client(base_url=server.url, headers={"Connection": "close"}, timeout=30) as client,
    ):
        until = time.monotonic() + 60
        while ready(client) != "dlops_ready 2.0":
            assert time.monotonic() < until
            time.sleep(0.05)
        folder = server.log_path.parent
        files = sorted(folder.rglob("*.cells"))
        killed, _ = psutil.Process(server.pid).children()
        killed.kill()
        killed.wait(10)
        assert ready(client) == "dlops_ready 1.0"
        statuses = set()
        while ready(client) != "dlops_ready 2.0":
            assert time.monotonic() < until
            statuses |= {client.get("/v2/health/ready").status_code for _ in range(5)}
        assert statuses == {200}
        # It counts on in the file of the one before it.
        assert len(files) == 2
        assert sorted(folder.rglob("*.cells")) == files


@pytest.mark.parametrize("control", ["none", "explicit"])
def test_workers_in_the_places_of_all_that_began_answer(digits_artifact, control: str) -> None:
    with (
        ServerProcess(digits_artifact, workers=2, env={"DLOPS_MODEL_CONTROL": control}) as server,
        httpx.Client(base_url=server.url, headers={"Connection": "close"}, timeout=60) as client,
    ):
        until = time.monotonic() + 120

        def wait_for_both() -> None:
            while "dlops_ready 2.0" not in client.get("/metrics").text:
                assert time.monotonic() < until
                time.sleep(0.05)

        wait_for_both()
        first = psutil.Process(server.pid).children()
        assert len(first) == 2
        for worker in first:
            worker.kill()
            worker.wait(10)
            wait_for_both()
        now = psutil.Process(server.pid).children()
        assert len({one.pid for one in (*first, *now)}) == 4
        # Either of them, alone.
        for silent in now:
            silent.suspend()
            try:
                assert client.get("/v2/health/ready").status_code == 200
            finally:
                silent.resume()


def test_an_artifact_that_fails_its_self_test_never_turns_ready(make_digits_artifact, tmp_path) -> None:
    broken = make_digits_artifact(tmp_path / "broken", scale=1.5)
    with pytest.raises(GateError, match="outputs differ from the reference"), ServerProcess(broken):
        pytest.fail("a broken artifact was served")


def test_bentoml_serve_itself_ends_with_one_line_and_a_status_where_the_self_test_fails(
    make_digits_artifact, tmp_path
) -> None:
    broken = make_digits_artifact(tmp_path / "broken", scale=1.5)
    command = [sys.executable, "-m", "bentoml", "serve", "dlops.serve.service:Service", "--port", str(free_port())]
    env = os.environ | {"DLOPS_ARTIFACT": str(broken.directory)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert len([line for line in ended.stderr.splitlines() if "outputs differ from the reference" in line]) == 1
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("named", [True, False], ids=["any folder", "project folder"])
def test_bentoml_serve_serves_the_newest_artifact_of_the_folder(make_digits_artifact, tmp_path, named: bool) -> None:
    make_digits_artifact(tmp_path / "artifacts/old/onnx-fp32", name="old", created=datetime(2020, 1, 1, tzinfo=UTC))
    make_digits_artifact(tmp_path / "artifacts/new/onnx-fp32", name="new")
    port = free_port()
    command = ["bentoml", "serve", "--port", str(port)]
    if named:
        command.insert(2, "dlops.serve.service:Service")
    else:
        (tmp_path / "pyproject.toml").write_text(
            '[project]\nname = "x"\nversion = "1"\n[tool.bentoml.build]\nservice = "dlops.serve.service:Service"\n'
        )
    # The command as people type it: unlike `python -m`, it does not put the folder on the path by itself.
    command[0] = str(Path(sys.executable).with_name("bentoml"))
    with running(command, port=port, cwd=tmp_path) as process:
        assert httpx.get(f"http://127.0.0.1:{port}/v2/models/new/ready").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing keeps a name for a process")
def test_of_two_servers_that_are_started_together_on_one_port_the_second_says_so(digits_artifact, request) -> None:
    port = free_port()
    # As the first has it before it listens.
    claim_port("127.0.0.1", port)
    request.addfinalizer(ports._HELD.pop().close)
    command = [sys.executable, "-m", "bentoml", "serve", "dlops.serve.service:Service", "--port", str(port)]
    env = os.environ | {"DLOPS_ARTIFACT": str(digits_artifact.directory)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 4
    assert f"port {port} on 127.0.0.1 is in use" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_bentoml_serve_without_an_artifact_says_so_and_ends(tmp_path) -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "dlops.serve.service:Service"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "no artifact under" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_wrong_setting_is_named_by_its_variable(tmp_path) -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "dlops.serve.service:Service"]
    env = os.environ | {"DLOPS_MAX_BATCH": "many"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "max_batch" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_ctrl_c_ends_the_foreground_server_cleanly(digits_artifact) -> None:
    port = free_port()
    command = [sys.executable, "-c", FOREGROUND, str(digits_artifact.directory), str(port)]
    with running(command, port=port) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_killed_launcher_takes_its_server_with_it(digits_artifact) -> None:
    port = free_port()
    command = [sys.executable, "-c", FOREGROUND, str(digits_artifact.directory), str(port)]
    with running(command, port=port) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert gone(children, within_s=30)


@contextmanager
def in_flight(url: str, document: dict, *, workers: list[psutil.Process]):
    """A request that the server is computing, as a future of its answer."""
    with ThreadPoolExecutor(1) as pool:
        busy = sum(worker.cpu_times().user for worker in workers)
        answer = pool.submit(httpx.post, f"{url}/v2/models/digits/infer", json=document, timeout=60)
        while sum(worker.cpu_times().user for worker in workers) < busy + 0.2:
            assert not answer.done()
            time.sleep(0.02)
        yield answer


def alive(process: psutil.Process) -> bool:
    """A killed process is a zombie as soon as its first thread has ended; sockets are open until the last one has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def gone(processes: list[psutil.Process], *, within_s: float) -> bool:
    """Zombies count as gone: a container without an init process never collects them."""
    deadline = time.monotonic() + within_s
    while any(alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_workers_end_when_the_process_that_started_them_is_killed(digits_artifact, tmp_path) -> None:
    with ServerProcess(digits_artifact, workers=2, env={"TMPDIR": str(tmp_path)}) as server:
        workers = psutil.Process(server.pid).children(recursive=True)
        assert len(workers) == 2
        os.kill(server.pid, signal.SIGKILL)
        assert gone(workers, within_s=30)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)
    # What it counted in lay in the launcher's folder, which has gone.
    assert list(tmp_path.glob("dlops-*")) == []


def test_a_worker_that_cannot_load_again_leaves_the_others_serving(digits_artifact, tmp_path) -> None:
    shutil.copytree(digits_artifact.directory, tmp_path / "digits")
    model = tmp_path / "digits" / digits_artifact.path("model").name
    with ServerProcess(open_artifact(tmp_path / "digits"), workers=2) as server:
        first, second = psutil.Process(server.pid).children(recursive=True)
        # Ready is what the first to load says; both have to have.
        until = time.monotonic() + 60
        wanted = f'dlops_instances{{model="{digits_artifact.name}"}} 2.0'
        while wanted not in (text := httpx.get(f"{server.url}/metrics").text):
            assert time.monotonic() < until, text
            time.sleep(0.1)
        content = model.read_bytes()
        model.unlink()
        first.kill()
        # Two that came in its place: one that could not load, and the next.
        seen: set[int] = set()
        while len(seen) < 2:
            assert time.monotonic() < until + 60
            seen |= {one.pid for one in psutil.Process(server.pid).children() if one.pid not in (first.pid, second.pid)}
            time.sleep(0.2)
        assert second.is_running()
        answered = [_health(server.url) for _ in range(10)]
        assert 200 in answered
        # What was missing is there again, and the next try is the last.
        model.write_bytes(content)
        until = time.monotonic() + 60
        while [_health(server.url) for _ in range(10)] != [200] * 10:
            assert time.monotonic() < until
            time.sleep(0.5)


def _health(url: str) -> int:
    try:
        return httpx.get(f"{url}/v2/health/ready").status_code
    except httpx.TransportError:  # by the worker that has just ended
        return 0


def test_a_worker_notices_without_the_kernel_that_its_parent_is_gone() -> None:
    watched = """
import sys, time
from dlops.serve.supervision import end_with_arbiter
sys.platform = "any"
end_with_arbiter()
print("watching", flush=True)
time.sleep(60)
"""
    parent = f"""
import os, subprocess, sys
from dlops.serve.supervision import ARBITER_PID
os.environ[ARBITER_PID] = str(os.getpid())
subprocess.run([sys.executable, "-c", {watched!r}])
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        assert gone([child], within_s=30)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_server_and_its_workers_at_once(
    slow_artifact, slow_request, number: int, status: int
) -> None:
    port = free_port()
    command = [sys.executable, "-c", FOREGROUND, str(slow_artifact.directory), str(port)]
    with running(command, port=port) as process:
        (arbiter,) = psutil.Process(process.pid).children()
        family = [arbiter, *arbiter.children(recursive=True)]
        with in_flight(f"http://127.0.0.1:{port}", slow_request(1e8), workers=family[1:]) as answer:
            process.send_signal(number)
            time.sleep(0.5)
            assert not gone(family, within_s=0), "a first signal lets the answer be finished"
            process.send_signal(number)
            assert process.wait(10) == status
            assert gone(family, within_s=0)
            assert isinstance(answer.exception(10), httpx.TransportError)


def test_a_block_that_ends_in_the_middle_of_a_long_answer_leaves_nothing_behind(slow_artifact, slow_request) -> None:
    with ServerProcess(slow_artifact, stop_timeout_s=0.3) as server:
        workers = psutil.Process(server.pid).children(recursive=True)
        with in_flight(server.url, slow_request(1e8), workers=workers) as answer:
            server.close()
            assert gone(workers, within_s=0)
            assert isinstance(answer.exception(10), httpx.TransportError)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["-m", "bentoml", "serve", "dlops.serve.service:Service", "--port", "{port}"], 0),
        (["-m", "dlops", "serve", "{artifact}", "--port", "{port}"], 0),
    ],
    ids=["bentoml serve", "dlops serve"],
)
def test_what_was_accepted_before_sigterm_is_answered(
    slow_artifact, slow_request, command: list[str], status: int
) -> None:
    port, artifact = str(free_port()), str(slow_artifact.directory)
    command = [part.replace("{port}", port).replace("{artifact}", artifact) for part in command]
    env = os.environ | {"DLOPS_ARTIFACT": artifact}
    with running([sys.executable, *command], port=int(port), env=env) as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        with in_flight(f"http://127.0.0.1:{port}", slow_request(2e6), workers=workers) as answer:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert not answer.done()
            assert answer.result(30).status_code == 200
        _, err = process.communicate(timeout=30)
        assert process.returncode == status
        assert "Traceback" not in err
        assert gone(workers, within_s=0)


def test_a_port_in_use_is_an_error_of_the_machine(digits_artifact) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for start in (
            lambda: serve_artifacts([digits_artifact.directory], port=port),
            lambda: ServerProcess(digits_artifact, port=port).__enter__(),
        ):
            with pytest.raises(MachineError, match=f"port {port} on 127.0.0.1 is in use") as caught:
                start()
            assert caught.value.exit_status == 4
        command = [sys.executable, "-m", "bentoml", "serve", "dlops.serve.service:Service"]
        env = os.environ | {"DLOPS_ARTIFACT": str(digits_artifact.directory)}
        for arguments, variables in ((["--port", str(port)], {}), ([], {"BENTOML_PORT": str(port)})):
            ended = subprocess.run(
                [*command, *arguments], env=env | variables, capture_output=True, text=True, timeout=60, check=False
            )
            assert ended.returncode == 4
            assert f"port {port} on 127.0.0.1 is in use" in ended.stderr
            assert "Traceback" not in ended.stdout + ended.stderr


def test_a_variable_counts_where_no_argument_says_otherwise(digits_artifact, tmp_path, monkeypatch, capfd) -> None:
    for version in ("1", "2"):
        shutil.copytree(digits_artifact.directory, tmp_path / "digits" / version)
    started = []

    def start(*_: object, env: dict[str, str], **__: object) -> None:
        started.append(Settings.from_environment(env).versions)
        raise MachineError("far enough")

    monkeypatch.setattr(launch, "_start", start)
    both = "2, digits version 1"
    for variable, versions, said in (("0", None, both), ("0", 2, both), ("0", 1, "2"), ("", None, "2")):
        monkeypatch.setenv("DLOPS_VERSIONS", variable)
        with pytest.raises(MachineError, match="far enough"):
            serve_artifacts([tmp_path], port=0, versions=versions)
        assert f"starting digits version {said} on http" in capfd.readouterr().err
    assert started == [0, 2, 1, 1]
    monkeypatch.setenv("DLOPS_VERSIONS", "many")
    with pytest.raises(UsageError, match=r"DLOPS_.* versions"):
        serve_artifacts([tmp_path], port=0)


@pytest.mark.parametrize(
    ("host", "variable", "listens"),
    [
        ("127.0.0.1", None, "127.0.0.1"), ("0.0.0.0", None, "0.0.0.0"), ("0.0.0.0", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0", "0.0.0.0"), ("0.0.0.0", "", "0.0.0.0"),
    ],
)  # fmt: skip
def test_grpc_listens_where_its_variable_says_or_where_http_does(
    digits_artifact, monkeypatch, host: str, variable: str | None, listens: str
) -> None:
    started = []

    def start(*_: object, env: dict[str, str], **__: object) -> None:
        started.append(Settings.from_environment(env))
        raise MachineError("far enough")

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.delenv("DLOPS_GRPC_HOST", raising=False)
    if variable is not None:
        monkeypatch.setenv("DLOPS_GRPC_HOST", variable)
    with pytest.raises(MachineError, match="far enough"):
        serve_artifacts([digits_artifact.directory], host=host, port=0, grpc_port=0)
    monkeypatch.setenv("DLOPS_GRPC_PORT", "4572")
    with pytest.raises(MachineError, match="far enough"):
        serve_artifacts([digits_artifact.directory], host=host, port=0)
    assert [one.grpc_host for one in started] == [listens, listens]
    assert started[1].grpc_port == 4572


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"workers": 300}, "workers: input should be less than or equal to 256"),
        ({"tls_cert": Path("x")}, "tls_cert and tls_key go together"),
        ({"port": 4571, "grpc_port": 4571}, "--port and --grpc-port are both 4571"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(arguments, said: str, digits_artifact) -> None:
    with pytest.raises(UsageError, match=said):
        serve_artifacts([digits_artifact.directory], **{"port": 0, **arguments})


def test_no_limit_is_no_limit_that_can_be_set() -> None:
    for name in ("MAX_WAIT_S", "SEND_TIMEOUT_S", "RECEIVE_TIMEOUT_S"):
        with pytest.raises(UsageError, match="finite"):
            Settings.from_environment({f"DLOPS_{name}": "inf"})


def test_a_host_that_is_none_is_refused(digits_artifact) -> None:
    with pytest.raises(UsageError, match="no-such-host"):
        serve_artifacts([digits_artifact.directory], host="no-such-host.invalid")


def test_a_server_that_does_not_start_shows_the_end_of_its_log(digits_artifact) -> None:
    with (
        pytest.raises(MachineError, match="not ready within 0"),
        ServerProcess(digits_artifact, start_timeout_s=0.01),
    ):
        pytest.fail("it cannot be that fast")
    with pytest.raises(MachineError, match="max_batch"), ServerProcess(digits_artifact, env={"DLOPS_MAX_BATCH": "x"}):
        pytest.fail("it started with a wrong setting")


def test_an_onnx_artifact_is_served_without_torch(digits_artifact, digit_pngs, tmp_path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('raise ImportError("torch was imported")\n')
    with ServerProcess(digits_artifact, env={"PYTHONPATH": str(tmp_path)}) as server:
        response = httpx.post(f"{server.url}/predict", content=digit_pngs[7], headers={"Content-Type": "image/png"})
        assert response.json()["predictions"][0]["label"] == "7"


def test_usage_is_not_tracked_unless_the_user_says_so(tmp_path) -> None:
    script = """
import os, json
from bentoml._internal.utils.analytics import usage_stats
usage_stats.do_not_track()  # as BentoML's command line does before it loads a service
import dlops.serve.service
print(json.dumps(usage_stats.do_not_track()))
"""
    for given, expected in ((None, True), ("False", False)):
        env = {key: value for key, value in os.environ.items() if key != "BENTOML_DO_NOT_TRACK"}
        env |= {} if given is None else {"BENTOML_DO_NOT_TRACK": given}
        ended = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert json.loads(ended.stdout) is expected


def test_settings_survive_the_environment() -> None:
    settings = Settings(artifact="/a", device="cpu", threads=3, workers=2, max_batch=7)
    assert Settings.from_environment(settings.to_environment()) == settings
    assert Settings.from_environment({"DLOPS_THREADS": ""}) == Settings()
    assert Settings().to_environment() == {}, "a default must not hide what the user has set"
    with pytest.raises(UsageError) as caught:
        Settings.from_environment({"DLOPS_WORKERS": "0", "DLOPS_DEVICE": "tpu"})
    assert "workers" in caught.value.message
    assert "device" in caught.value.message


def test_failures_keep_their_kind_on_the_way_to_the_launcher(tmp_path: Path) -> None:
    path = tmp_path / "failure.json"
    assert read_failure(path) is None
    for error in (GateError("a", hint="b"), CorruptError("c"), DlopsError("d")):
        write_failure(path, error)
        back = read_failure(path)
        assert (type(back), back.message, back.hint) == (type(error), error.message, error.hint)


class Caller(threading.Thread):
    """One request after another, on the last one's connection where that stays open, until `enough` is set."""

    def __init__(self, url: str, body: bytes, headers: dict[str, str], enough: threading.Event) -> None:
        super().__init__()
        self._url, self._body, self._headers, self._enough = url, body, headers, enough
        self.seen: list[int | str] = []
        self.last_at = 0.0

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._enough.is_set():
                try:
                    response = client.post("/v2/models/digits/infer", content=self._body, headers=self._headers)
                except httpx.HTTPError as error:
                    self.seen.append(repr(error))
                else:
                    self.seen.append(response.status_code)
                    self.last_at = time.monotonic()


@pytest.mark.parametrize("way", ["binary", "json"])
def test_on_sigterm_readiness_ends_first_and_nothing_is_lost(digits_artifact, way: str) -> None:
    image = digits_artifact.samples().inputs["image"][:1]
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8]}
    if way == "binary":
        head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": image.nbytes}}]}).encode()
        body, headers = head + image.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
    else:
        body, headers = json.dumps({"inputs": [tensor | {"data": image.ravel().tolist()}]}).encode(), {}
    enough = threading.Event()
    with ServerProcess(digits_artifact, env={"DLOPS_DRAIN_DELAY_S": "3"}) as server:
        callers = [Caller(server.url, body, headers, enough) for _ in range(4)]
        for caller in callers:
            caller.start()
        time.sleep(1)
        began = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        while httpx.get(f"{server.url}/v2/health/ready").status_code == 200:
            time.sleep(0.02)
        assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
        answer = httpx.post(f"{server.url}/v2/models/digits/infer", content=body, headers=headers)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        # A load balancer that has noticed: it sends no more, and what it has sent is answered.
        time.sleep(1)
        noticed = time.monotonic()
        enough.set()
        for caller in callers:
            caller.join(30)
        assert psutil.Process(server.pid).wait(30) == 0
        assert time.monotonic() - began >= 3
    assert {seen for caller in callers for seen in caller.seen} == {200}
    assert all(caller.last_at > noticed - 0.5 for caller in callers)
