from __future__ import annotations

import hashlib
import io
import socketserver
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dlops.errors import CorruptError, MachineError
from dlops.train.data import cifar, download, mnist


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """(folder, its address)"""
    folder = tmp_path / "published"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_file_is_downloaded_once_from_the_first_address_that_has_it(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = server
    content = np.random.default_rng(0).bytes(3_000_000)
    (folder / "it.bin").write_bytes(content)
    digest, into = hashlib.sha256(content).hexdigest(), tmp_path / "data" / "it.bin"
    urls = [f"{url}/absent", f"{url}/it.bin"]
    assert download.fetch(urls, into, algorithm="sha256", digest=digest).read_bytes() == content
    (folder / "it.bin").unlink()
    assert download.fetch(urls, into, algorithm="sha256", digest=digest) == into
    assert [path.name for path in into.parent.iterdir()] == ["it.bin"]


def test_a_download_with_another_digest_is_refused_and_leaves_nothing(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = server
    (folder / "it.bin").write_bytes(b"something else")
    into = tmp_path / "data" / "it.bin"
    with pytest.raises(CorruptError, match="md5 is"):
        download.fetch([f"{url}/it.bin"], into, algorithm="md5", digest="0" * 32)
    assert list(into.parent.iterdir()) == []


def test_without_a_network_the_error_says_where_to_put_the_file(tmp_path: Path) -> None:
    into = tmp_path / "data" / "it.bin"
    with pytest.raises(MachineError, match=r"could not download it\.bin: .*refused.*put the file at"):
        download.fetch(["http://127.0.0.1:9/it.bin"], into, algorithm="md5", digest="0" * 32)
    assert list(into.parent.iterdir()) == []


@pytest.mark.parametrize(
    "answer", [b"220 mail.example ESMTP\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"]
)
def test_an_answer_that_is_no_http_is_told_in_one_line(answer: bytes, tmp_path: Path) -> None:
    into = tmp_path / "data" / "it.bin"
    with (
        answering(answer) as url,
        pytest.raises(MachineError, match=r"could not download it\.bin: .*not an answer in HTTP"),
    ):
        download.fetch([url], into, algorithm="md5", digest="0" * 32)
    assert list(into.parent.iterdir()) == []


def test_a_length_that_is_no_number_is_passed_over(tmp_path: Path) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: many\r\nConnection: close\r\n\r\nwhole"
    with answering(answer) as url:
        digest = hashlib.sha256(b"whole").hexdigest()
        assert download.fetch([url], tmp_path / "it.bin", algorithm="sha256", digest=digest).read_bytes() == b"whole"


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of a server that sends those bytes to whoever asks."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/it.bin"
        server.shutdown()
        thread.join()


def written_cifar(
    path: Path, distribution: cifar.Distribution, *, classes: int, per_file: int, cut: int = 0
) -> np.ndarray:
    """A small archive in the published layout. Returns the pixels of its test file, (n, 32, 32, 3)."""
    rng = np.random.default_rng(0)
    pixels = np.zeros(0)
    with tarfile.open(path, "w:gz") as tar:
        for name in (*distribution.train, *distribution.test):
            pixels = rng.integers(0, 256, (per_file, 3, 32, 32), dtype=np.uint8)
            fine = (np.arange(per_file) % classes).astype(np.uint8)[:, None]
            coarse = np.full((per_file, distribution.label_bytes - 1), 19, np.uint8)
            content = np.concatenate([coarse, fine, pixels.reshape(per_file, -1)], axis=1).tobytes()
            _add(tar, name, content[: len(content) - cut])
        _add(tar, distribution.label_names, "\n".join(f"class{i}" for i in range(classes)).encode() + b"\n\n")
    return pixels.transpose(0, 2, 3, 1)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(("distribution", "classes"), [(cifar.CIFAR10, 10), (cifar.CIFAR100, 100)])
def test_cifar_records_become_images_with_their_labels(
    tmp_path: Path, distribution: cifar.Distribution, classes: int
) -> None:
    path = tmp_path / "cifar.tar.gz"
    pixels = written_cifar(path, distribution, classes=classes, per_file=classes * 3)
    data = cifar.read_distribution(path, distribution, split_seed=0)
    assert data.labels[-1] == f"class{classes - 1}"
    assert data.test.targets.tolist() == list(range(classes)) * 3
    np.testing.assert_array_equal(np.stack(data.test.raw), pixels)
    assert len(data.train) + len(data.validation) == classes * 3 * len(distribution.train)


@pytest.mark.parametrize(("name", "classes"), [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_is_fetched_checked_and_read(
    server: tuple[Path, str], name: str, classes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, url = server
    monkeypatch.chdir(tmp_path)
    published = getattr(cifar, name)
    pixels = written_cifar(folder / "cifar.tar.gz", published, classes=classes, per_file=classes * 2)
    digest = hashlib.md5((folder / "cifar.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, name, replace(published, url=f"{url}/cifar.tar.gz", md5=digest))
    data = getattr(cifar, f"load_{published.name}")(split_seed=0)
    np.testing.assert_array_equal(np.stack(data.test.raw), pixels)


def test_a_cifar_archive_that_is_cut_or_another_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar.tar.gz"
    written_cifar(path, cifar.CIFAR10, classes=10, per_file=30, cut=5)
    with pytest.raises(CorruptError, match="not whole records of 3073"):
        cifar.read_distribution(path, cifar.CIFAR10, split_seed=0)
    with pytest.raises(CorruptError, match="not the cifar100 binary distribution"):
        cifar.read_distribution(path, cifar.CIFAR100, split_seed=0)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptError, match="not the cifar10 binary distribution"):
        cifar.read_distribution(path, cifar.CIFAR10, split_seed=0)


def test_mnist_is_fetched_checked_unpacked_and_read_by_torchvision(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    from torchvision.datasets import MNIST

    folder, url = server
    rng = np.random.default_rng(0)
    images = {
        "train": rng.integers(0, 256, (60, 28, 28), np.uint8),
        "t10k": rng.integers(0, 256, (20, 28, 28), np.uint8),
    }
    resources = []
    for kind, pixels in images.items():
        count = len(pixels)
        files = {
            f"{kind}-images-idx3-ubyte.gz": np.array([0x803, count, 28, 28], ">i4").tobytes() + pixels.tobytes(),
            f"{kind}-labels-idx1-ubyte.gz": np.array([0x801, count], ">i4").tobytes()
            + (np.arange(count) % 10).astype(np.uint8).tobytes(),
        }
        for name, content in files.items():
            (folder / name).write_bytes(gzip.compress(content))
            resources.append((name, hashlib.md5((folder / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [f"{url}/"])
    # What is not checked against a published digest is not read: neither unpacked files nor torchvision's old format.
    raw, processed = Path("data/MNIST/raw"), Path("data/MNIST/processed")
    for directory in (raw, processed):
        directory.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"planted")
    for name in ("training.pt", "test.pt"):
        (processed / name).write_bytes(b"planted")
    data = mnist.load(split_seed=0)
    np.testing.assert_array_equal(np.stack(data.test.raw), images["t10k"])
    assert data.test.targets.tolist() == [*range(10)] * 2
    assert len(data.train) + len(data.validation) == 60
