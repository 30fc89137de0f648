"""Each server started as its documentation says, asked until it answers, and ended with the block.

All run the same ONNX file with one thread an operator, one instance unless said otherwise, on 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dlops.artifact import Artifact
from dlops.bench.http import HttpTransport
from dlops.bench.nullserver import null_server
from dlops.bench.oip_rest import RestClient, decode_outputs
from dlops.bench.transport import Answer
from dlops.serve.launch import ServerProcess
from dlops.signature import Array
from dlops.version import __version__

from .environments import UnavailableError, environment, version
from .mlp import NAME, PIXELS

HERE = Path(__file__).parent
HOST = "127.0.0.1"
START_TIMEOUT_S, STOP_TIMEOUT_S, ASK_TIMEOUT_S = 120.0, 20.0, 10.0
# Triton makes no larger batches than its model says, and neither does LitServe here.
MAX_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """form: how tensors travel. requests: whole, as they are sent. decode: an answer's logits, (1, 10); None where
    nothing is computed. pid: of the process that started all others of it, and the number of their group. polls: it
    looks for requests all the time, and so must be stopped while it is others' turn."""

    name: str
    form: str
    port: int
    pid: int | None
    requests: Sequence[bytes]
    decode: Callable[[Answer], Array] | None
    polls: bool = False


Start = Callable[[Artifact, Path], AbstractContextManager[list[Server]]]


@contextmanager
def dlops(artifact: Artifact, folder: Path) -> Iterator[list[Server]]:
    with ServerProcess(artifact, threads=1) as process:
        yield [_binary(artifact, f"dlops {__version__}", process.port, process.pid, model=NAME)]


def triton_command(folder: Path, *options: str, metrics_port: int) -> tuple[list[str], dict[str, str]]:
    """How tritonserver is started on `folder`/models, and its environment; its python backend is put into `folder`."""
    home = environment("tritonserver")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    triton = packages / "pytriton" / "tritonserver"
    stub = triton / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(triton / "backends", folder / "backends")
    shutil.copy(stub / "triton_python_backend_stub", folder / "backends" / "python")
    command = [
        str(triton / "bin" / "tritonserver"), "--model-repository", str(folder / "models"),
        "--backend-directory", str(folder / "backends"), "--http-address", HOST, "--metrics-address", HOST,
        "--metrics-port", str(metrics_port), *options,
    ]  # fmt: skip
    env = {
        "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
        # The interpreter that the backend embeds takes its environment from the python3 that comes first here.
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    return command, env


@contextmanager
def tritonserver(artifact: Artifact, folder: Path) -> Iterator[list[Server]]:
    """One server with the model twice: with one instance of the python backend, and with two."""
    instances = {NAME: 1, f"{NAME}_2": 2}
    for model, count in instances.items():
        version_folder = folder / "models" / model / "1"
        version_folder.mkdir(parents=True)
        shutil.copy(HERE / "peer_tritonserver.py", version_folder / "model.py")
        (version_folder.parent / "config.pbtxt").write_text(_triton_config(artifact, count))
    ports = free_ports(2)
    command, env = triton_command(folder, "--http-port", str(ports[0]), "--allow-grpc", "false", metrics_port=ports[1])
    with process(command, folder, env) as child:
        served = []
        for model, count in instances.items():
            name = f"tritonserver 2.51, {count} instance{'s' if count > 1 else ''}"
            served.append(_binary(artifact, name, ports[0], child.pid, model=model))
        _wait(child, served, folder)
        yield served


@contextmanager
def bentoml(artifact: Artifact, folder: Path) -> Iterator[list[Server]]:
    home = environment("bentoml")
    shutil.copy(HERE / "peer_bentoml.py", folder)
    (port,) = free_ports(1)
    command = [
        str(home / "bin" / "bentoml"), "serve", "peer_bentoml:Mlp", "--host", HOST, "--port", str(port),
    ]  # fmt: skip
    env = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(folder / "home"), "MODEL": _model(artifact)}
    with process(command, folder, env) as child:
        served = _json(artifact, version("bentoml"), port, child.pid, decode=lambda answer: json.loads(answer.body))
        _wait(child, [served], folder)
        yield [served]


@contextmanager
def litserve(artifact: Artifact, folder: Path) -> Iterator[list[Server]]:
    home = environment("litserve")
    shutil.copy(HERE / "peer_litserve.py", folder)
    (port,) = free_ports(1)
    command = [str(home / "bin" / "python"), "peer_litserve.py", str(port)]
    with process(command, folder, {"MODEL": _model(artifact)}) as child:
        # It makes the batch itself: a request is one row.
        served = _json(artifact, version("litserve"), port, child.pid, decode=_logits, batched=False)
        served = replace(served, polls=True)
        _wait(child, [served], folder)
        yield [served]


@contextmanager
def fastapi(artifact: Artifact, folder: Path) -> Iterator[list[Server]]:
    home = environment("fastapi")
    shutil.copy(HERE / "peer_fastapi.py", folder)
    (port,) = free_ports(1)
    command = [
        str(home / "bin" / "uvicorn"), "peer_fastapi:app", "--host", HOST, "--port", str(port), "--loop", "uvloop",
        "--http", "httptools", "--no-access-log",
    ]  # fmt: skip
    with process(command, folder, {"MODEL": _model(artifact)}) as child:
        served = _json(artifact, version("fastapi"), port, child.pid, decode=_logits)
        _wait(child, [served], folder)
        yield [served]


@contextmanager
def mlserver(artifact: Artifact, folder: Path) -> Iterator[list[Server]]:
    home = environment("mlserver")
    shutil.copy(HERE / "peer_mlserver.py", folder)
    port, grpc_port, metrics_port = free_ports(3)
    settings = {
        # Its own default hands requests to another process, which takes twice the time here.
        "parallel_workers": 0, "debug": False,
        "host": HOST, "http_port": port, "grpc_port": grpc_port, "metrics_port": metrics_port,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps({"name": NAME, "implementation": "peer_mlserver.Mlp"}))
    with process([str(home / "bin" / "mlserver"), "start", "."], folder, {"MODEL": _model(artifact)}) as child:
        bodies = []
        for row in artifact.samples().inputs["x"]:
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, PIXELS], "data": _numbers(row)}
            bodies.append({"inputs": [tensor]})
        served = Server(
            name=version("mlserver"), form="JSON, V2", port=port, pid=child.pid,
            requests=_posts(f"/v2/models/{NAME}/infer", bodies, port),
            decode=lambda answer: decode_outputs(answer.body, None)["logits"],
        )  # fmt: skip
        _wait(child, [served], folder)
        yield [served]


@contextmanager
def nothing(artifact: Artifact, folder: Path) -> Iterator[list[Server]]:
    """A server that answers two bytes at once: what the load can send and take."""
    with null_server() as port:
        requests = _binary(artifact, "", port, None, model=NAME).requests
        yield [Server(name="an empty answer", form="binary", port=port, pid=None, requests=requests, decode=None)]


STARTS: Mapping[str, Start] = {
    "dlops": dlops, "tritonserver": tritonserver, "bentoml": bentoml, "litserve": litserve, "fastapi": fastapi,
    "mlserver": mlserver, "nothing": nothing,
}  # fmt: skip


@contextmanager
def awake(server: Server) -> Iterator[None]:
    """Let it run for as long as the block lasts, where it is not to run otherwise."""
    if not server.polls or server.pid is None:
        yield
        return
    os.killpg(server.pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGSTOP)


def check_answers(server: Server, artifact: Artifact) -> None:
    """Raise AssertionError unless each request is answered as ONNX Runtime in this process answers it."""
    if server.decode is None:
        return
    expected = artifact.samples().outputs["logits"]
    with awake(server):
        for request, logits in zip(server.requests, expected, strict=True):
            answer = _ask(server, request)
            assert answer.status == 200, f"{server.name}: {answer.status} {answer.body[:300]!r}"
            found = np.asarray(server.decode(answer), np.float32).reshape(-1)
            np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5, err_msg=server.name)


def _ask(server: Server, request: bytes) -> Answer:
    line = HttpTransport().dial(HOST, server.port, timeout_s=ASK_TIMEOUT_S)
    try:
        return line.ask(request)
    finally:
        line.close()


def _binary(artifact: Artifact, name: str, port: int, pid: int | None, *, model: str) -> Server:
    client = RestClient(base=f"http://{HOST}:{port}", path=f"/v2/models/{model}")
    rows = artifact.samples().inputs["x"]
    return Server(
        name=name, form="binary, V2", port=port, pid=pid, requests=[client.encode({"x": row[None]}) for row in rows],
        decode=lambda answer: client.decode(answer)["logits"],
    )  # fmt: skip


def _json(
    artifact: Artifact, name: str, port: int, pid: int, *, decode: Callable[[Answer], Array], batched: bool = True
) -> Server:
    rows = [_numbers(row) for row in artifact.samples().inputs["x"]]
    bodies = [{"x": [row] if batched else row} for row in rows]
    return Server(name=name, form="JSON", port=port, pid=pid, requests=_posts("/predict", bodies, port), decode=decode)


def _logits(answer: Answer) -> Array:
    return np.array(json.loads(answer.body)["logits"])


def _numbers(row: Array) -> list[float]:
    """As few digits as say a float32: as Python's floats they would have twice as many, which take longer to read."""
    return [float(str(value)) for value in row]


def _posts(path: str, bodies: Sequence[object], port: int) -> list[bytes]:
    found = []
    for body in bodies:
        text = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(text)}\r\n\r\n"
        )
        found.append(head.encode() + text)
    return found


def _triton_config(artifact: Artifact, instances: int) -> str:
    return f"""backend: "python"
max_batch_size: {MAX_BATCH}
input [{{ name: "x" data_type: TYPE_FP32 dims: [{PIXELS}] }}]
output [{{ name: "logits" data_type: TYPE_FP32 dims: [10] }}]
instance_group [{{ kind: KIND_CPU count: {instances} }}]
dynamic_batching {{ max_queue_delay_microseconds: 0 }}
parameters: {{ key: "onnx" value: {{ string_value: "{_model(artifact)}" }} }}
"""


def _model(artifact: Artifact) -> str:
    return str(artifact.path("model").resolve())


def free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on at this moment."""
    probes = [socket.create_server((HOST, 0)) for _ in range(count)]
    try:
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@contextmanager
def process(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, with the folder as its place and `log.txt` there as its output."""
    # What is set for our own interpreter is not for those of the peers.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with (folder / "log.txt").open("wb") as log:
        child = subprocess.Popen(
            command, cwd=folder, env={**kept, **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield child
    finally:
        # All that it started is in its session's group. Those that are stopped end once they go on.
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(child.pid, number)
                os.killpg(child.pid, signal.SIGCONT)
            except ProcessLookupError:
                break
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue


def _wait(child: subprocess.Popen[bytes], served: Sequence[Server], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    for server in served:
        while True:
            try:
                answer = _ask(server, server.requests[0])
                if answer.status == 200:
                    break
                said = f"it answers {answer.status}"
            except (OSError, ValueError) as error:
                said = type(error).__name__
            if child.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join((folder / "log.txt").read_text(errors="replace").splitlines()[-20:])
                raise UnavailableError(f"{server.name} does not start: {said}\n{tail}")
            time.sleep(0.2)
