"""Both ports encrypted, with and without certificates of clients, by keys that openssl makes."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from dlops.errors import UsageError
from dlops.serve.launch import ServerProcess, serve_artifacts
from dlops.serve.settings import Settings
from dlops.serve.tls import Tls

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
PNG = {"Content-Type": "image/png"}


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@dataclass(frozen=True)
class Signed:
    certificate: Path
    key: Path


Authority = tuple[Path, Callable[[str], Signed]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Authority]:
    """authority("name") gives its certificate, and what signs others with it."""

    def make(name: str) -> Authority:
        folder = tmp_path_factory.mktemp(name)
        ca, ca_key = folder / "ca.pem", folder / "ca-key.pem"
        openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-days", "2", "-keyout", ca_key,
            "-out", ca,
        )  # fmt: skip

        def sign(whom: str) -> Signed:
            key, asked, signed, more = (folder / f"{whom}{end}" for end in ("-key.pem", ".csr", ".pem", ".ext"))
            openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={whom}", "-keyout", key, "-out", asked)
            more.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
            openssl(
                "x509", "-req", "-in", asked, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2",
                "-extfile", more, "-out", signed,
            )  # fmt: skip
            return Signed(certificate=signed, key=key)

        return ca, sign

    return make


@pytest.fixture(scope="module")
def ours(authority: Callable[[str], Authority]) -> Authority:
    return authority("ours")


@pytest.fixture(scope="module", params=["anybody", "clients with a certificate"])
def secure(request: pytest.FixtureRequest, digits_artifact, ours: Authority) -> Iterator[tuple[ServerProcess, bool]]:
    ca, sign = ours
    mutual = request.param != "anybody"
    own = sign("server")
    env = {"DLOPS_TLS_CERT": str(own.certificate), "DLOPS_TLS_KEY": str(own.key)}
    if mutual:
        env["DLOPS_TLS_CLIENT_CA"] = str(ca)
    with ServerProcess(digits_artifact, grpc_port=0, env=env) as server:
        yield server, mutual


def context_of(ca: Path, client: Signed | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context


def health(port: int, environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.CompletedProcess[str]:
    """What an image's HEALTHCHECK runs, beside a server with these variables."""
    return subprocess.run(
        [sys.executable, "-m", "dlops.serve.health", str(port)], env={**os.environ, **environment}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


def test_the_health_check_of_an_image_asks_as_the_server_listens(secure, ours: Authority, authority) -> None:
    server, mutual = secure
    own = ours[1]("server")
    told = {"DLOPS_TLS_CERT": str(own.certificate), "DLOPS_TLS_KEY": str(own.key)}
    if mutual:
        told["DLOPS_TLS_CLIENT_CA"] = str(ours[0])
    done = health(server.port, told)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # Not by TLS, and with the certificate of another authority.
    done = health(server.port)
    assert done.returncode == 1
    assert done.stderr.startswith(f"http://127.0.0.1:{server.port}/v2/health/ready: ")
    if mutual:
        other = authority("theirs")[1]("server")
        done = health(server.port, told | {"DLOPS_TLS_CERT": str(other.certificate), "DLOPS_TLS_KEY": str(other.key)})
        assert done.returncode == 1
        assert done.stderr.startswith("https://")
        assert done.stderr.count("\n") == 1


def test_the_health_check_says_why_a_server_is_not_ready(digits_artifact, tmp_path: Path) -> None:
    with ServerProcess(digits_artifact, env={"DLOPS_DRAIN_DELAY_S": "2"}) as server:
        # Whatever a variable names as a proxy is not asked.
        done = health(server.port, {"http_proxy": "http://127.0.0.1:9"})
        assert (done.returncode, done.stderr) == (0, "")
        os.kill(server.pid, signal.SIGTERM)
        limit = time.monotonic() + 30
        while (done := health(server.port)).returncode == 0:
            assert time.monotonic() < limit
        assert done.returncode == 1
        assert done.stderr.startswith(f"http://127.0.0.1:{server.port}/v2/health/ready: ")
    nothing = str(tmp_path / "nothing.pem")
    told = {"DLOPS_TLS_CERT": nothing, "DLOPS_TLS_KEY": nothing, "DLOPS_TLS_CLIENT_CA": nothing}
    done = health(9, told)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "nothing.pem" in done.stderr


def test_both_ports_answer_those_they_should(secure, ours: Authority, digits_artifact, digit_pngs) -> None:
    server, mutual = secure
    ca, sign = ours
    client = sign("client") if mutual else None
    assert server.url.startswith("https://127.0.0.1:")
    with httpx.Client(base_url=server.url, verify=context_of(ca, client)) as web:
        assert web.post("/predict", content=digit_pngs[0], headers=PNG).status_code == 200
        assert web.get("/v2/health/ready").status_code == 200
    x, expected = (
        getattr(digits_artifact.samples(), side)[name] for side, name in (("inputs", "image"), ("outputs", "logits"))
    )
    by_http = tritonclient.http.InferenceServerClient(
        f"127.0.0.1:{server.port}", ssl=True, ssl_context_factory=lambda: context_of(ca, client)
    )
    by_grpc = tritonclient.grpc.InferenceServerClient(
        f"localhost:{server.grpc_port}", ssl=True, root_certificates=str(ca),
        private_key=str(client.key) if client else None, certificate_chain=str(client.certificate) if client else None,
    )  # fmt: skip
    for asking, tools in ((by_http, tritonclient.http), (by_grpc, tritonclient.grpc)):
        tensor = tools.InferInput("image", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        found = asking.infer("digits", [tensor]).as_numpy("logits")
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        asking.close()


def test_others_are_not_answered(secure, ours: Authority, authority: Callable[[str], Authority]) -> None:
    server, mutual = secure
    ca, _ = ours
    with pytest.raises(httpx.HTTPError):  # plain text
        httpx.get(f"http://127.0.0.1:{server.port}/v2")
    if not mutual:
        return
    stranger = authority("strangers")[1]("client")
    for client in (None, stranger):
        with pytest.raises(httpx.HTTPError), httpx.Client(verify=context_of(ca, client)) as web:
            web.get(f"{server.url}/v2")
        pair = (None, None) if client is None else (client.key.read_bytes(), client.certificate.read_bytes())
        credentials = grpc.ssl_channel_credentials(ca.read_bytes(), *pair)
        by_grpc = tritonclient.grpc.InferenceServerClient(f"localhost:{server.grpc_port}", creds=credentials)
        with pytest.raises(InferenceServerException):
            by_grpc.get_server_metadata(client_timeout=5)
        by_grpc.close()


def test_files_that_do_not_fit_are_one_clear_line(ours: Authority, digits_artifact, tmp_path: Path) -> None:
    _, sign = ours
    one, other = sign("one"), sign("other")
    nothing, text, encrypted = (tmp_path / f"{name}.pem" for name in ("nothing", "text", "encrypted"))
    text.write_text("hello")
    openssl("pkey", "-in", one.key, "-aes256", "-passout", "pass:secret", "-out", encrypted)
    for certificate, key, client_ca, says in (
        (nothing, one.key, None, "nothing.pem"), (one.certificate, nothing, None, "nothing.pem"),
        (text, one.key, None, "text.pem"), (one.certificate, other.key, None, "other-key.pem"),
        (one.certificate, one.key, text, "text.pem"), (one.certificate, encrypted, None, "the key is encrypted"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            Tls(certificate=certificate, key=key, client_ca=client_ca).check()
    with pytest.raises(UsageError, match=r"nothing\.pem"):
        serve_artifacts([digits_artifact.directory], port=0, tls_cert=nothing, tls_key=one.key)
    for given in ({"DLOPS_TLS_CERT": "a"}, {"DLOPS_TLS_KEY": "a"}, {"DLOPS_TLS_CLIENT_CA": "a"}):
        with pytest.raises(UsageError, match="tls_cert and tls_key go together"):
            Settings.from_environment(given)
