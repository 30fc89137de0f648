from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dlops.errors import CorruptError, UsageError
from dlops.train.data import archive
from dlops.train.data.folder import IMAGE_SUFFIXES, load_folder


def packed(root: Path, into: Path, mode: str = "w:gz") -> Path:
    with tarfile.open(into, mode) as tar:
        tar.add(root, arcname="around")
    return into


def test_class_folders_alone_are_split_three_ways(write_digits) -> None:
    for digit in ("3", "10"):
        root = write_digits(digit, count=20, digit=3, start=0 if digit == "3" else 40)
    data = load_folder(root, split_seed=0)
    assert data.labels == ("3", "10")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [28, 4, 8]


@pytest.mark.parametrize("archived", [False, True])
def test_images_that_are_damaged_alike_are_no_duplicates(write_digits, tmp_path: Path, archived: bool) -> None:
    for digit in ("3", "7"):
        root = write_digits(digit, count=20, digit=int(digit))
    whole = next((root / "3").glob("*.png")).read_bytes()
    for number in range(10):
        (root / "3" / f"empty{number}.png").write_bytes(b"")
        (root / "7" / f"cut{number}.png").write_bytes(whole[:60])
    data = load_folder(packed(root, tmp_path / "a.tar.gz") if archived else root, split_seed=0)
    assert data.duplicates_dropped == 0
    assert len(data.unreadable) == 10
    assert all("empty" in one and "(an empty file)" in one for one in data.unreadable)
    names = [name for split in (data.train, data.validation, data.test) for name in split.names]
    assert sum("cut" in name for name in names) == 10


def test_a_class_that_cannot_be_read_is_told_with_its_files(write_digits) -> None:
    root = write_digits("3", count=20)
    (root / "7").mkdir()
    for number in range(3):
        (root / "7" / f"{number}.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"3 of its images cannot be read: 7/0.png \(an empty file\)"):
        load_folder(root, split_seed=0)


@pytest.mark.parametrize("second", ["test", "val"])
def test_a_second_split_is_the_test_split_and_validation_comes_off_train(write_digits, second: str) -> None:
    for digit in ("0", "1"):
        write_digits("train", digit, count=20)
        root = write_digits(second, digit, count=5, start=30)
    data = load_folder(root, split_seed=0)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [34, 6, 10]
    assert all(name.startswith(second) for name in data.test.names)
    assert all(name.startswith("train") for name in data.validation.names)


def test_three_given_splits_are_used_as_they_are(write_digits) -> None:
    for digit in ("0", "1"):
        write_digits("train", digit, count=10)
        write_digits("val", digit, count=4, start=20)
        root = write_digits("test", digit, count=5, start=30)
    data = load_folder(root, split_seed=0)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [20, 8, 10]


def test_an_archive_gives_the_same_data_set_as_its_folder(write_digits, tmp_path: Path) -> None:
    for digit in ("0", "1"):
        write_digits("train", digit, count=10)
        root = write_digits("test", digit, count=5, start=30)
    (root / "README.md").write_text("not an image")
    (root / "train" / ".DS_Store").write_text("nor this")
    expected = load_folder(root, split_seed=0).digest()
    assert load_folder(packed(root, tmp_path / "a.tar.gz"), split_seed=0).digest() == expected
    assert load_folder(packed(root, tmp_path / "a.tar", "w:"), split_seed=0).digest() == expected


def test_layouts_that_cannot_be_meant_are_refused(write_digits, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="no image in it"):
        load_folder(empty, split_seed=0)
    root = write_digits("only", count=10, digit=0)
    with pytest.raises(UsageError, match=r"1 class \('only'\)"):
        load_folder(root, split_seed=0)
    with pytest.raises(UsageError, match=r"10 images are in no class folder \(0000.png"):
        load_folder(root / "only", split_seed=0)
    write_digits("train", "0", count=5)
    with pytest.raises(UsageError, match="only beside train"):
        load_folder(root, split_seed=0)


def test_a_test_class_that_train_lacks_is_refused(write_digits) -> None:
    write_digits("train", "0", count=5)
    write_digits("train", "1", count=5)
    root = write_digits("test", "2", count=5)
    with pytest.raises(UsageError, match="the class '2' is in test but not in train"):
        load_folder(root, split_seed=0)


def test_a_test_folder_without_train_is_refused(write_digits) -> None:
    write_digits("val", "0", count=5)
    root = write_digits("test", "0", count=5)
    with pytest.raises(UsageError, match="test, val but no train"):
        load_folder(root, split_seed=0)


def test_a_folder_that_is_met_twice_is_refused(write_digits) -> None:
    for digit in ("0", "1"):
        root = write_digits(digit, count=10)
    (root / "0" / "loop").symlink_to("..")
    with pytest.raises(UsageError, match=r"images/0/loop: the same folder as .*images"):
        load_folder(root, split_seed=0)


def test_a_linked_folder_or_image_is_read(write_digits, tmp_path: Path) -> None:
    elsewhere = write_digits("0", count=10).rename(tmp_path / "elsewhere")
    root = write_digits("1", count=10)
    (root / "0").symlink_to(elsewhere / "0")
    (root / "1" / "linked.png").symlink_to(write_digits("1", count=1, start=30) / "1" / "0030.png")
    assert len(load_folder(root, split_seed=0).labels) == 2


@pytest.mark.parametrize("parts", [(b"K\xe4fer", b"0.png"), (b"0", b"\xff.png")])
def test_a_name_that_is_no_text_is_refused(write_digits, parts: tuple[bytes, bytes]) -> None:
    for digit in ("0", "1"):
        root = write_digits(digit, count=10)
    path = root.joinpath(*(os.fsdecode(part) for part in parts))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((root / "0" / "0000.png").read_bytes())
    with pytest.raises(UsageError, match=r"is not UTF-8 \(rename it\)"):
        load_folder(root, split_seed=0)


def tar_of(*members: tarfile.TarInfo, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../a/x.png"), "leads out"),
        (member("/etc/x.png"), "leads out"),
        (member("a/x.png", tarfile.SYMTYPE, "/etc/passwd"), "a link or a device"),
        (member("a/x.png", tarfile.LNKTYPE, "../../secret"), "a link or a device"),
        (member("a/x.png", tarfile.FIFOTYPE), "a link or a device"),
    ],
)
def test_an_archive_whose_names_or_links_lead_out_is_refused(
    tmp_path: Path, info: tarfile.TarInfo, message: str
) -> None:
    path = tmp_path / "bad.tar.gz"
    path.write_bytes(tar_of(info))
    with pytest.raises(CorruptError, match=message):
        load_folder(path, split_seed=0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_total_bytes": 5_000}, "unpacks to over 5000"),
        ({"max_file_bytes": 999}, "has 1000 bytes"),
        ({"max_members": 9}, "over 9 entries"),
    ],
)
def test_an_archive_over_a_limit_is_refused(tmp_path: Path, limits: dict[str, int], message: str) -> None:
    path = tmp_path / "big.tar.gz"
    path.write_bytes(tar_of(*(member(f"a/{i}.png") for i in range(10)), content=b"\0" * 1000))
    with pytest.raises(UsageError, match=message):
        archive.read_images(path, suffixes=IMAGE_SUFFIXES, **limits)
    assert len(archive.read_images(path, suffixes=IMAGE_SUFFIXES)[0]) == 10


def header_bomb(kind: bytes, *, size: int, count: int) -> bytes:
    """A .tar.gz with `count` headers of `size` bytes, which belong to no entry yet."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    padding = -size % tarfile.BLOCKSIZE
    return gzip.compress((info.tobuf(tarfile.GNU_FORMAT) + b"a" * size + b"\0" * padding) * count, compresslevel=1)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize(("size", "count"), [(64 << 20, 1), (1 << 19, 40), (1, 3_000)])
def test_a_header_that_is_a_bomb_is_refused_before_it_fills_the_memory(
    tmp_path: Path, kind: bytes, size: int, count: int
) -> None:
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(header_bomb(kind, size=size, count=count))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match=r"bomb\.tar\.gz: "):
            archive.read_images(path, suffixes=IMAGE_SUFFIXES)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_long_names_and_other_compressions_are_read(write_digits, tmp_path: Path) -> None:
    long = "n" * 200
    for digit in ("0", "1"):
        root = write_digits(long, digit, count=10)
    for ending in ("gz", "bz2", "xz"):
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            with tarfile.open(tmp_path / "a.tar.gz", f"w:{ending}", format=form) as tar:
                tar.add(root, arcname="around")
            names, contents = archive.read_images(tmp_path / "a.tar.gz", suffixes=IMAGE_SUFFIXES)
            assert len(names) == 20
            assert contents[0] == root.joinpath(*Path(names[0]).parts[1:]).read_bytes()


def test_a_truncated_or_foreign_archive_is_refused(write_digits, tmp_path: Path) -> None:
    write_digits("0", count=20)
    path = packed(write_digits("1", count=20), tmp_path / "a.tar.gz")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for content in (whole[: len(whole) // 2], b"", rng.bytes(2000), b"\x1f\x8b\x08\x00" + rng.bytes(500)):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"a\.tar\.gz: "):
            load_folder(path, split_seed=0)
