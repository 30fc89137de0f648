"""Logs that machines read: every line of a server is a JSON object, and requests are found by their ids."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx

from dlops.serve.launch import ServerProcess

PNG = {"Content-Type": "image/png"}


def test_every_line_is_json_and_requests_are_found_by_their_ids(digits_artifact, digit_pngs) -> None:
    env = {"DLOPS_LOG": "json", "DLOPS_ACCESS_LOG": "true"}
    x = digits_artifact.samples().inputs["image"][:1]
    head = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8],
                        "parameters": {"binary_data_size": x.nbytes}}]}  # fmt: skip
    text = json.dumps(head).encode()
    with ServerProcess(digits_artifact, env=env) as server, httpx.Client(base_url=server.url) as client:
        client.post("/predict", content=digit_pngs[0], headers=PNG | {"X-Request-Id": "one"}).raise_for_status()
        length = {"Inference-Header-Content-Length": str(len(text))}
        client.post(
            "/v2/models/digits/infer", content=text + x.tobytes(), headers=length | {"X-Request-Id": "two"}
        ).raise_for_status()
        assert client.get("/nowhere", headers={"X-Request-Id": "three" * 100}).status_code == 404
        lines = server.log_path.read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert all({"time", "level", "message"} <= set(one) for one in told)
    assert any("self-test passed, ready" in one["message"] for one in told)
    requests = {one["request"]: one for one in told if one["message"] == "answered"}
    one = requests["one"]
    assert (one["route"], one["status"], one["model"]) == ("/predict", "200", "digits")
    assert requests["two"]["route"] == "/v2/models/{name}/infer"
    assert 0 < requests["two"]["ms"] < 30_000
    # What cannot stand in a log is not in it, and has an id all the same.
    (lost,) = [one for one in requests.values() if one["status"] == "404"]
    assert len(lost["request"]) == 16


def test_the_launcher_s_own_lines_are_json_too(digits_artifact, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        command = [sys.executable, "-m", "dlops", "serve", str(digits_artifact.directory), "--port", str(port)]
        env = os.environ | {"DLOPS_LOG": "json"}
        # The port is taken.
        probe.listen()
        refused = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    (failure,) = [json.loads(line) for line in refused.stderr.splitlines()]
    assert (refused.returncode, failure["level"]) == (4, "error")
    assert str(port) in failure["message"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, env=env, stderr=log, stdout=log)
        try:
            deadline = time.monotonic() + 60
            while "self-test passed" not in (tmp_path / "log").read_text():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()
        told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert told[0]["message"].startswith("starting digits version 1 on http://")
    assert (told[-1]["message"], told[-1]["level"]) == ("interrupted", "error")


def test_for_people_it_is_a_line_of_text(digits_artifact, digit_pngs) -> None:
    with ServerProcess(digits_artifact, env={"DLOPS_ACCESS_LOG": "true"}) as server:
        headers = PNG | {"X-Request-Id": "a-17"}
        httpx.post(f"{server.url}/predict", content=digit_pngs[0], headers=headers).raise_for_status()
        (line,) = [line for line in server.log_path.read_text().splitlines() if "a-17" in line]
    assert line.startswith("POST /predict digits 200 ")
    assert line.endswith(" ms a-17")
