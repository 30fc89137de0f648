"""Directories that are whole or absent, whatever happens while they are written or was done to them since."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import AwareDatetime, Field

from dlops import directory as directory_module
from dlops.directory import DirectoryWriter, payload_name, write_json
from dlops.errors import CorruptError, MachineError, UsageError
from dlops.manifest import MAX_MANIFEST_BYTES, Manifest, newest_manifest, read_manifest

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Box(Manifest):
    file_name: ClassVar[str] = "box.json"
    newest_schema: ClassVar[int] = 2

    kind: Literal["box"] = "box"
    schema_version: int = Field(2, alias="schema", ge=1)
    dlops_version: str = "0.1.0"
    created: AwareDatetime = NOON
    value: float = 0.0


def write_box(directory: Path, content: bytes, **fields: object) -> Box:
    with DirectoryWriter(directory) as writer:
        return writer.commit(Box(files={"data": writer.add("data.bin", content)}, **fields))


def edit(directory: Path, *without: str, **changes: object) -> None:
    """Change fields by hand, as an editor does: the manifest's own digest stays what it was."""
    path = directory / "box.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if key not in without}))


def test_a_written_directory_reads_back_equal(tmp_path: Path) -> None:
    written = write_box(tmp_path / "a" / "b", b"content", value=2.5)
    read = read_manifest(tmp_path / "a" / "b", Box)
    assert read == written
    assert read.path("data").read_bytes() == b"content"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_lacks_survive_in_valid_json(tmp_path: Path, value: float) -> None:
    write_box(tmp_path, b"x", value=value)
    json.loads((tmp_path / "box.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read_manifest(tmp_path, Box).value == pytest.approx(value, nan_ok=True)


# For N = 1, 2, ...: a process rewrites directory N and is killed just before its N-th operation on a file. Prints how
# each ended, until one got through. Forked from one small process, which is faster than 80 fresh interpreters.
DYING_WRITERS = textwrap.dedent(
    """
    import importlib.util, os, signal, sys
    from pathlib import Path
    from dlops.directory import DirectoryWriter

    spec = importlib.util.spec_from_file_location("tested", sys.argv[2])
    tested = sys.modules["tested"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tested)
    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock")

    def rewrite(directory, deadly):
        seen = 0

        def strike():
            nonlocal seen
            seen += 1
            if seen == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

        def mortal(function):
            def wrapped(*arguments):
                strike()
                return function(*arguments)
            return wrapped

        # Neither is audited. A sync that did not happen stands for a write that did not reach the disk.
        os.fsync = mortal(os.fsync)
        os.close = mortal(os.close)
        sys.addaudithook(lambda event, arguments: strike() if event in EVENTS else None)
        with DirectoryWriter(directory) as writer:
            files = {name: writer.add(f"{name}.bin", name.encode() * 1000) for name in ("first", "second")}
            writer.commit(tested.Box(files=files, value=2))

    for deadly in range(1, 100):
        directory = Path(sys.argv[1]) / str(deadly)
        if sys.argv[3] == "old":
            tested.write_box(directory, b"old", value=1)
        child = os.fork()
        if child == 0:
            rewrite(directory, deadly)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)
        if status != -signal.SIGKILL:
            break
    """
)


@pytest.mark.parametrize("before", ["nothing", "old"])
def test_a_kill_before_any_file_operation_leaves_the_old_directory_or_the_new(tmp_path: Path, before: str) -> None:
    writers = subprocess.run(
        [sys.executable, "-c", DYING_WRITERS, str(tmp_path), __file__, before],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    statuses = [int(line) for line in writers.stdout.split()]
    assert set(statuses[:-1]) == {-signal.SIGKILL}
    assert statuses[-1] == 0, writers.stderr

    outcomes = []
    for deadly in range(1, len(statuses) + 1):
        directory = tmp_path / str(deadly)
        try:
            outcomes.append(str(read_manifest(directory, Box).value))
        except CorruptError as error:
            pytest.fail(f"killed before operation {deadly}: {error}")
        except UsageError:
            outcomes.append("nothing")
        write_box(directory, b"after", value=3)
        left = sorted(path.name.partition("-")[0] for path in directory.iterdir())
        assert left == ["box.json", "data"], f"killed before operation {deadly}, leftovers were not collected"
    # Old up to some operation and new from there on, with kills tried on both sides of it.
    old = "nothing" if before == "nothing" else "1.0"
    count = outcomes.count(old)
    assert outcomes == [old] * count + ["2.0"] * (len(outcomes) - count)
    assert count > 10
    assert len(outcomes) - count > 1


def test_an_interrupt_right_after_the_replacement_keeps_the_payloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_box(tmp_path, b"old")
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == "box.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_box(tmp_path, b"new", value=9)
    assert read_manifest(tmp_path, Box).value == 9


def test_an_interrupt_before_the_replacement_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(directory_module, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_box(tmp_path / "made" / "here", b"new")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_removes_what_was_written_and_the_folders_that_were_made(tmp_path: Path) -> None:
    with suppress(RuntimeError), DirectoryWriter(tmp_path / "a" / "b") as writer:
        assert (tmp_path / "a" / "b" / writer.add("data.bin", b"x").path).is_file()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_persons_own_files_are_never_collected(tmp_path: Path) -> None:
    names = ["notes.txt", "weights-mine.safetensors", "data-0123456789abcdef"]
    for name in names:
        (tmp_path / name).write_text("mine")
    write_box(tmp_path, b"one")
    write_box(tmp_path, b"two")
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    assert len(list(tmp_path.glob("data-*.bin"))) == 1


class Crate(Box):
    file_name: ClassVar[str] = "crate.json"


def test_what_another_manifest_of_the_folder_names_is_not_collected(tmp_path: Path) -> None:
    box = write_box(tmp_path, b"of the box")
    for content in (b"first", b"second"):
        with DirectoryWriter(tmp_path) as writer:
            writer.commit(Crate(files={"data": writer.add("data.bin", content)}))
    assert read_manifest(tmp_path, Box).path("data").read_bytes() == b"of the box"
    assert read_manifest(tmp_path, Crate).path("data").read_bytes() == b"second"
    assert len(list(tmp_path.glob("data-*.bin"))) == 2
    # What a damaged manifest named may still be saved with it.
    (tmp_path / "box.json").write_text("{")
    with DirectoryWriter(tmp_path) as writer:
        writer.commit(Crate(files={"data": writer.add("data.bin", b"third")}))
    assert box.path("data").read_bytes() == b"of the box"


# RLIMIT_FSIZE makes the kernel itself refuse a write half-way through, as a full disk does, for root as for anyone.
FULL_DISK = textwrap.dedent(
    """
    import resource, signal, sys
    from pathlib import Path
    from dlops.directory import DirectoryWriter
    from dlops.errors import MachineError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        with DirectoryWriter(Path(sys.argv[1])) as writer:
            writer.add("data.bin", b"x" * 1_000_000)
    except MachineError as error:
        print(error.message)
    """
)


def test_a_write_that_the_kernel_cuts_off_leaves_the_old_directory_whole(tmp_path: Path) -> None:
    write_box(tmp_path, b"old", value=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "File too large" in child.stdout, child.stderr
    assert read_manifest(tmp_path, Box).value == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("during", ["payload", "manifest"])
def test_a_full_disk_is_said_and_the_old_directory_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str, number: int
) -> None:
    write_box(tmp_path, b"old", value=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    write = directory_module._write_synced

    def full(path: Path, content: bytes) -> None:
        if path.name.endswith("box.json") == (during == "manifest"):
            path.write_bytes(content[: len(content) // 2])
            raise OSError(number, os.strerror(number), str(path))
        write(path, content)

    monkeypatch.setattr(directory_module, "_write_synced", full)
    with pytest.raises(MachineError, match="the disk is full") as caught:
        write_box(tmp_path, b"new" * 100)
    assert caught.value.hint == "free some space and run it again"
    assert read_manifest(tmp_path, Box).value == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_really_full_file_system_is_said(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root; the write that the kernel cuts off is tested above")
    try:
        write_box(disk / "box", b"old", value=1)
        with pytest.raises(MachineError, match="the disk is full"):
            write_box(disk / "box", b"x" * 1_000_000)
        assert read_manifest(disk / "box", Box).value == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_second_writer_is_refused_while_the_first_one_writes(tmp_path: Path) -> None:
    with DirectoryWriter(tmp_path) as first:
        with pytest.raises(MachineError, match="another process is writing there"), DirectoryWriter(tmp_path):
            pytest.fail("two writers at once")
        first.commit(Box(files={"data": first.add("data.bin", b"x")}))
    assert write_box(tmp_path, b"later", value=2) == read_manifest(tmp_path, Box)


def test_a_lock_on_a_directory_that_was_removed_meanwhile_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "box"
    open_ = os.open

    def removed_after(path: Path, flags: int) -> int:
        handle = open_(path, flags)
        directory.rmdir()
        directory.mkdir()
        return handle

    monkeypatch.setattr(os, "open", removed_after)
    with pytest.raises(MachineError, match="another process"), DirectoryWriter(directory):
        pytest.fail("the lock is on a directory that is gone")


def test_a_reader_beside_a_busy_writer_always_reads_a_whole_directory(tmp_path: Path) -> None:
    write_box(tmp_path, b"0" * 1000, value=0)
    stop = threading.Event()

    def write_on() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            write_box(tmp_path, str(value).encode() * 1000, value=value)

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        values = []
        # However slow the writer is on a busy disk, some of it is seen.
        until = time.monotonic() + 60
        while len(values) < 300 or (len(set(values)) == 1 and time.monotonic() < until):
            values.append(read_manifest(tmp_path, Box).value)
    finally:
        stop.set()
        writer.join()
    assert values == sorted(values)
    assert len(set(values)) > 1


def test_a_writer_where_a_file_stands_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="file exists"), DirectoryWriter(tmp_path / "file"):
        pytest.fail("entered a file")
    with pytest.raises(UsageError, match="file exists"):
        write_json(tmp_path / "file" / "x.json", "{}")
    with DirectoryWriter(tmp_path / "box") as writer, pytest.raises(UsageError, match="no such file"):
        writer.add_file("data.bin", tmp_path / "absent.bin")


def test_a_payload_is_stored_under_the_name_that_can_be_told_beforehand(tmp_path: Path) -> None:
    with DirectoryWriter(tmp_path) as writer:
        payload = writer.add("weights.data", b"content")
        assert payload.path == payload_name("weights.data", hashlib.sha256(b"content").hexdigest())
        assert (tmp_path / payload.path).read_bytes() == b"content"


def test_add_file_stores_what_add_stores(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    with DirectoryWriter(tmp_path / "box") as writer:
        payload = writer.add_file("data.bin", source)
        assert payload == writer.add("data.bin", b"content")
        writer.commit(Box(files={"data": payload}))
    assert read_manifest(tmp_path / "box", Box).path("data").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["../x.bin", "x", "a/b.bin", "x.bin\n", ".hidden", ""])
def test_a_payload_name_that_is_no_plain_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with DirectoryWriter(tmp_path) as writer, pytest.raises(ValueError, match="payload name"):
        writer.add(name, b"x")


def test_no_manifest_is_said_with_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no box\.json there") as caught:
        read_manifest(tmp_path, Box)
    assert not isinstance(caught.value, CorruptError)
    assert "dlops list" in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 20, 100])
def test_a_truncated_manifest_is_corrupt(tmp_path: Path, kept: int) -> None:
    write_box(tmp_path, b"x")
    path = tmp_path / "box.json"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptError, match="truncated or not JSON"):
        read_manifest(tmp_path, Box)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "crate"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"value": "many"}, "value"),
        ({"created": "2026-01-01T00:00:00"}, "created"),
        ({"schema": 0}, "schema"),
        ({"schema": "3"}, "schema"),
        ({"schema": 3.0}, "schema"),
        ({"schema": True}, "schema"),
        ({"schema": None}, "schema"),
        ({"schema_version": 99}, "schema_version"),
        ({"sha256": "0" * 63}, "sha256"),
    ],
)
def test_a_manifest_of_another_shape_is_corrupt_and_the_field_is_named(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    write_box(tmp_path, b"x")
    edit(tmp_path, **changes)
    with pytest.raises(CorruptError, match=rf"not a box that dlops wrote.*{said}"):
        read_manifest(tmp_path, Box)


@pytest.mark.parametrize("key", ["kind", "schema", "sha256"])
def test_a_manifest_without_what_every_manifest_has_is_corrupt(tmp_path: Path, key: str) -> None:
    write_box(tmp_path, b"x")
    edit(tmp_path, key)
    with pytest.raises(CorruptError, match=f"not a box that dlops wrote: {key} is missing"):
        read_manifest(tmp_path, Box)


def test_the_schema_goes_by_one_name_only(tmp_path: Path) -> None:
    write_box(tmp_path, b"x")
    edit(tmp_path, "schema", schema_version=99)
    with pytest.raises(CorruptError, match="schema is missing; schema_version is unknown"):
        read_manifest(tmp_path, Box)


@pytest.mark.parametrize(
    "changes",
    [
        {"value": 0.5},
        {"dlops_version": "0.1.1"},
        {"created": "2026-01-01T13:00:00Z"},
        {"schema": 1},
        {"files": {}},
        {"sha256": "0" * 64},
        {"sha256": None},
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_an_edited_manifest_is_corrupt(tmp_path: Path, changes: dict[str, object], verify: bool) -> None:
    write_box(tmp_path, b"x", value=2.5)
    edit(tmp_path, **changes)
    with pytest.raises(CorruptError, match="altered since it was written"):
        read_manifest(tmp_path, Box, verify=verify)


def test_spaces_and_the_order_of_keys_do_not_count_as_an_edit(tmp_path: Path) -> None:
    written = write_box(tmp_path, b"x", value=1e300, dlops_version="é×\u2028")
    path = tmp_path / "box.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(document.items())), ensure_ascii=True))
    assert read_manifest(tmp_path, Box) == written


def test_a_manifest_without_a_file_that_its_kind_must_have_is_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_box(tmp_path, b"x")
    monkeypatch.setattr(Box, "required_roles", ("data", "lid"))
    with pytest.raises(CorruptError, match="it names no lid file"):
        read_manifest(tmp_path, Box, verify=False)


@pytest.mark.parametrize("text", ["[]", "3", '"box"', "null", "[" * 5000])
def test_a_manifest_that_is_no_object_is_corrupt(tmp_path: Path, text: str) -> None:
    (tmp_path / "box.json").write_text(text)
    with pytest.raises(CorruptError):
        read_manifest(tmp_path, Box)


@pytest.mark.parametrize("where", ["top", "provenance"])
def test_a_newer_schema_names_the_version_that_reads_it(tmp_path: Path, where: str) -> None:
    write_box(tmp_path, b"x")
    version = {"dlops_version": "7.3.1"}
    edit(tmp_path, schema=3, **(version if where == "top" else {"dlops_version": None, "provenance": version}))
    with pytest.raises(CorruptError, match=r"schema 3 is newer than this dlops reads \(2\)") as caught:
        read_manifest(tmp_path, Box)
    assert "7.3.1" in str(caught.value.hint)


def test_an_older_schema_is_read(tmp_path: Path) -> None:
    write_box(tmp_path, b"x", schema_version=1)
    assert read_manifest(tmp_path, Box).schema_version == 1


def test_a_huge_manifest_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "box.json").open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(CorruptError, match="too large for a box"):
        read_manifest(tmp_path, Box)


def payload_of(directory: Path) -> Path:
    return read_manifest(directory, Box, verify=False).path("data")


def test_a_missing_truncated_or_altered_payload_is_corrupt(tmp_path: Path) -> None:
    write_box(tmp_path, b"content")
    path = payload_of(tmp_path)
    path.write_bytes(b"cXntent")
    with pytest.raises(CorruptError, match="SHA-256 differs"):
        read_manifest(tmp_path, Box)
    path.write_bytes(b"con")
    with pytest.raises(CorruptError, match="3 bytes where the manifest says 7"):
        read_manifest(tmp_path, Box)
    path.unlink()
    with pytest.raises(CorruptError, match="the data file is missing"):
        read_manifest(tmp_path, Box)
    path.mkdir()
    with pytest.raises(CorruptError, match="the data file is missing"):
        read_manifest(tmp_path, Box)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "data\n", ".hidden", "a\0b"]
)
def test_a_payload_path_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"content")
    write_box(tmp_path / "box", b"content")
    document = json.loads((tmp_path / "box" / "box.json").read_text())
    document["files"]["data"]["path"] = name
    (tmp_path / "box" / "box.json").write_text(json.dumps(document))
    with pytest.raises(CorruptError, match=r"files\.data\.path"):
        read_manifest(tmp_path / "box", Box, verify=False)


def test_a_link_out_of_the_directory_is_refused_even_with_the_right_content(tmp_path: Path) -> None:
    write_box(tmp_path / "box", b"content")
    path = payload_of(tmp_path / "box")
    outside = path.rename(tmp_path / "outside.bin")
    path.symlink_to(outside)
    with pytest.raises(CorruptError, match="link out of the directory"):
        read_manifest(tmp_path / "box", Box)


def test_a_link_inside_the_directory_and_a_linked_directory_are_read(tmp_path: Path) -> None:
    write_box(tmp_path / "box", b"content")
    path = payload_of(tmp_path / "box")
    path.symlink_to(path.rename(path.with_name("kept.bin")).name)
    (tmp_path / "link").symlink_to(tmp_path / "box", target_is_directory=True)
    assert read_manifest(tmp_path / "link", Box).path("data").read_bytes() == b"content"


def test_a_role_that_the_manifest_lacks_is_named(tmp_path: Path) -> None:
    box = write_box(tmp_path, b"x")
    with pytest.raises(CorruptError, match=r"box\.json: it names no model file"):
        box.path("model")


def test_newest_goes_by_the_moment_and_names_what_it_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    east = timezone(timedelta(hours=9))
    moments = {
        "first": datetime(2026, 1, 1, 20, tzinfo=east),
        "last": datetime(2026, 1, 1, 13, tzinfo=UTC),
        "middle": NOON + timedelta(microseconds=1),
    }
    for name, moment in moments.items():
        write_box(tmp_path / name, b"x", created=moment)
    write_box(tmp_path / "damaged", b"x", created=NOON + timedelta(days=9))
    edit(tmp_path / "damaged", kind="crate")
    assert newest_manifest(tmp_path, Box, make_one="make a box").directory.name == "last"
    assert f"passed over: {tmp_path / 'damaged'}" in capsys.readouterr().err


def test_only_damaged_ones_are_not_called_none(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_box(tmp_path / name, b"x")
        (tmp_path / name / "box.json").write_text("{")
    with pytest.raises(CorruptError, match=r"no box under .* can be read \(2 there\); the first: .*truncated"):
        newest_manifest(tmp_path, Box, make_one="make a box")


def test_there_is_nothing_under_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no box under .*make a box"):
        newest_manifest(tmp_path / "absent", Box, make_one="make a box")
