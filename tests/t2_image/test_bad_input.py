# SPDX-License-Identifier: MIT
"""Damaged and hostile images: the right refusal, with path, offset and reason; nothing changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

import vhdx
from tests.images import (
    BAT_OFFSET,
    LOG_OFFSET,
    PAYLOAD,
    add_log,
    edit,
    edit_headers,
    edit_regions,
    read,
    set_entry,
)
from vhdx.errors import Reason
from vhdx.format import header, metadata, region
from vhdx.units import MIB, TIB

FULL = 6


@pytest.fixture
def image(fast_path):
    """Six blocks of 1 MiB, the first two written."""
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 6 * MIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"A" * MIB, 0)
        disk.pwrite(b"B" * MIB, MIB)
    return path


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bad_header_crc(path):
    for offset in header.HEADER_OFFSETS:
        edit(path, offset + 100, b"x")


def header_change(**changes):
    return lambda path: edit_headers(path, lambda h: replace(h, **changes))


def regions_changed(*regions):
    return lambda path: edit_regions(path, list(regions))


def bad_region_tables(path):
    for offset in region.TABLE_OFFSETS:
        edit(path, offset + 20, b"xx")


def entry(index, value):
    return lambda path: set_entry(path, index, value)


def cut(length):
    return lambda path: os.truncate(path, length)


def dirty_without_entry(path):
    edit_headers(path, lambda h: replace(h, log_guid=uuid4()))


def torn_log(path):
    add_log(path, {BAT_OFFSET: bytes(4096)})
    edit(path, LOG_OFFSET + 5000, b"torn")


def shorter_than_flushed(path):
    add_log(path, {BAT_OFFSET: bytes(4096)}, flushed=64 * MIB, last=64 * MIB)


def metadata_bytes(offset, data):
    return lambda path: edit(path, 2 * MIB + offset, data)


BAT = region.Region(region.BAT, BAT_OFFSET, MIB, True)
META = region.Region(region.METADATA, 2 * MIB, MIB, True)

DAMAGE = [
    ("empty file", cut(0), Reason.UNKNOWN_FORMAT),
    ("signature alone", cut(8), Reason.TRUNCATED),
    ("cut in the header section", cut(300_000), Reason.TRUNCATED),
    ("cut before the BAT", cut(3 * MIB), Reason.TRUNCATED),
    ("cut in a block", cut(PAYLOAD + MIB // 2), Reason.BAT_OFFSET),
    ("wrong signature", lambda p: edit(p, 0, b"vhdxfilm"), Reason.UNKNOWN_FORMAT),
    ("both headers bad", bad_header_crc, Reason.HEADERS),
    ("version", header_change(version=2), Reason.HEADER_VERSION),
    ("log outside", header_change(log_offset=1 << 40, log_guid=UUID(int=1)), Reason.TRUNCATED),
    ("log over the BAT", header_change(log_offset=BAT_OFFSET), Reason.REGION_OVERLAP),
    ("log longer than all", header_change(log_length=4095 * MIB), Reason.LOG_LOCATION),
    ("region tables bad", bad_region_tables, Reason.REGION_TABLE),
    ("regions overlap", regions_changed(BAT, replace(META, offset=3 * MIB)), Reason.REGION_OVERLAP),
    ("region outside", regions_changed(replace(BAT, offset=1 << 50), META), Reason.TRUNCATED),
    ("no BAT", regions_changed(META), Reason.REGION_MISSING),
    (
        "unknown required region",
        regions_changed(BAT, META, region.Region(UUID(int=9), 8 * MIB, MIB, True)),
        Reason.REGION_UNKNOWN_REQUIRED,
    ),
    ("metadata signature", metadata_bytes(0, b"metabata"), Reason.METADATA_TABLE),
    ("metadata count", metadata_bytes(10, b"\xff\xff"), Reason.METADATA_TABLE),
    ("disk of no size", metadata_bytes(65536 + 8, bytes(8)), Reason.METADATA_ITEM),
    ("disk of all sizes", metadata_bytes(65536 + 8, b"\xff" * 8), Reason.METADATA_ITEM),
    ("BAT too small", metadata_bytes(65536 + 8, (1 << 40).to_bytes(8, "little")), Reason.BAT_SIZE),
    ("block of 3 bytes", metadata_bytes(65536, b"\x03\0\0\0"), Reason.METADATA_ITEM),
    ("state 4", entry(2, 4), Reason.BAT_STATE),
    ("state 5", entry(2, 5), Reason.BAT_STATE),
    ("reserved bits", entry(2, 1 << 10), Reason.BAT_RESERVED),
    ("block in the header", entry(2, FULL), Reason.BAT_OFFSET),
    ("block past the end", entry(2, FULL | 1 << 40), Reason.BAT_OFFSET),
    ("block at the end of numbers", entry(2, FULL | ((1 << 44) - 1) << 20), Reason.BAT_OFFSET),
    ("block twice", entry(2, FULL | PAYLOAD), Reason.BAT_OVERLAP),
    ("block over the log", entry(2, FULL | LOG_OFFSET), Reason.BAT_OVERLAP),
    ("block over the BAT", entry(2, FULL | BAT_OFFSET), Reason.BAT_OVERLAP),
    ("LogGuid without a log", dirty_without_entry, Reason.LOG_EMPTY),
    ("torn log", torn_log, Reason.LOG_EMPTY),
    ("file shorter than logged", shorter_than_flushed, Reason.TRUNCATED),
]


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE, ids=[row[0] for row in DAMAGE])
def test_damage_is_refused_and_nothing_changes(name, damage, reason, mode, image):
    damage(image)
    before = sha(image)
    with pytest.raises(vhdx.VhdxError) as caught:
        vhdx.open(image, mode, format="vhdx")
    error = caught.value
    assert error.reason == reason, str(error)
    assert error.path == str(image)
    assert str(image) in str(error)
    if reason is not Reason.UNKNOWN_FORMAT:
        assert error.offset is not None
        assert f"{error.offset:#x}" in str(error)
    assert sha(image) == before
    # The image is not held: somebody else may lock it for writing.
    damage_again = os.open(image, os.O_RDWR)
    os.close(damage_again)


def test_one_bad_copy_is_enough(image):
    edit(image, header.HEADER_OFFSETS[1] + 9, b"!")
    edit(image, region.TABLE_OFFSETS[0] + 20, b"!!")
    with vhdx.open(image, "r+") as disk:
        assert disk.pread(4, 0) == b"AAAA"
        disk.pwrite(b"new", 0)
    with vhdx.open(image) as disk:
        assert disk.pread(4, 0) == b"newA"


def test_unknown_optional_structures_are_kept(image):
    """An unknown region and item survive writing, and no block lands on them."""
    os.truncate(image, 12 * MIB)
    extra = region.Region(UUID(int=77), 8 * MIB, MIB, False)
    edit_regions(image, [BAT, META, extra])
    edit(image, 8 * MIB, b"keep" * (MIB // 4))
    table = bytearray(read(image, 2 * MIB, 65536))
    count = table[10]
    row = UUID(int=78).bytes_le + (65536 + 4096).to_bytes(4, "little") + (4).to_bytes(4, "little")
    table[32 + 32 * count : 32 + 32 * count + 24] = row
    table[10] += 1
    edit(image, 2 * MIB, bytes(table))
    edit(image, 2 * MIB + 65536 + 4096, b"item")
    with vhdx.open(image, "r+") as disk:
        disk.pwrite(b"C" * (6 * MIB), 0)
    assert read(image, 8 * MIB, MIB) == b"keep" * (MIB // 4)
    assert read(image, 2 * MIB + 65536 + 4096, 4) == b"item"
    assert len(metadata.parse_table(read(image, 2 * MIB, 65536), 0, MIB)) == count + 1


def test_log_is_replayed_in_memory_and_then_into_the_file(image):
    bat_page = bytearray(read(image, BAT_OFFSET, 4096))
    bat_page[:8] = bytes(8)  # block 0 becomes not present
    add_log(image, {BAT_OFFSET: bytes(bat_page)})
    before = sha(image)
    for _ in range(2):
        with vhdx.open(image) as disk:
            assert disk.pread(MIB, 0) == bytes(MIB)
            assert disk.pread(4, MIB) == b"BBBB"
            assert disk.describe()["log_dirty"]
    assert sha(image) == before
    with vhdx.open(image, "r+") as disk:
        assert disk.pread(MIB, 0) == bytes(MIB)
    with vhdx.open(image) as disk:
        assert not disk.describe()["log_dirty"]
        assert disk.pread(MIB, 0) == bytes(MIB)


def test_unmapped_anchor_reads_zeros_and_is_not_reused_early(image):
    """A block that is UNMAPPED and keeps its offset: its space is nobody else's."""
    anchored = int.from_bytes(read(image, BAT_OFFSET, 8), "little")
    set_entry(image, 0, anchored & ~7 | 3)
    with vhdx.open(image, "r+") as disk:
        assert disk.pread(MIB, 0) == bytes(MIB)
        disk.pwrite(b"C" * MIB, 3 * MIB)
        disk.flush()
        assert read(image, anchored & ~7, 4) == b"AAAA"
        disk.pwrite(b"new", 0)
        disk.flush()
        assert disk.pread(MIB, 0) == b"new" + bytes(MIB - 3)
        disk.pwrite(b"D" * MIB, 4 * MIB)
    with vhdx.open(image) as disk:
        assert disk.pread(MIB, 0) == b"new" + bytes(MIB - 3)
        assert disk.pread(MIB, 4 * MIB) == b"D" * MIB


def test_released_space_never_shows_old_bytes(image):
    for round_number in range(4):
        with vhdx.open(image, "r+") as disk:
            disk.trim(0, MIB)
            disk.flush()
            disk.pwrite(b"x", 5 * MIB)
            disk.flush()
            assert disk.pread(MIB, 5 * MIB) == b"x" + bytes(MIB - 1)
            disk.trim(5 * MIB, MIB)
            disk.pwrite(b"S" * MIB, 0)
        with vhdx.open(image) as disk:
            assert disk.pread(MIB, 5 * MIB) == bytes(MIB), round_number


def test_space_is_given_back_to_the_host(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 64 * MIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x" * (32 * MIB), 0)
        disk.flush()
        full = path.stat().st_blocks
        disk.trim(0, 32 * MIB)
        disk.flush()
        assert path.stat().st_blocks * 512 < full * 512 - 30 * MIB


def test_no_sparse_allocates_and_keeps(tmp_path):
    path = tmp_path / "disk.vhdx"
    vhdx.create(path, 16 * MIB, block_size=MIB)
    with vhdx.open(path, "r+", sparse=False) as disk:
        disk.pwrite(b"x", 0)
        disk.flush()
        assert path.stat().st_blocks * 512 >= 4 * MIB
        disk.trim(0, MIB)
        disk.flush()
    assert path.stat().st_blocks * 512 >= path.stat().st_size - MIB


@pytest.mark.parametrize("sparse", [True, False])
def test_fixed_is_really_allocated(tmp_path, sparse):
    path = tmp_path / "disk.vhdx"
    vhdx.create(path, 16 * MIB, type="fixed", block_size=MIB, sparse=sparse)
    assert path.stat().st_blocks * 512 >= 16 * MIB
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x" * MIB, 0)
        disk.zero(0, MIB)
        disk.trim(MIB, MIB)
        disk.flush()
        assert disk.pread(2 * MIB, 0) == bytes(2 * MIB)
        assert disk.describe()["blocks"]["fully_present"] == 16
    assert path.stat().st_blocks * 512 >= 16 * MIB
    assert path.stat().st_size == 20 * MIB


# ---- arguments ----


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"size": -512},
        {"size": 513},
        {"size": 64 * TIB + 512},
        {"size": 512, "logical_sector_size": 4096},
        {"size": MIB, "logical_sector_size": 520},
        {"size": MIB, "physical_sector_size": 0},
        {"size": MIB, "block_size": 3 * MIB},
        {"size": MIB, "block_size": 512 << 10},
        {"size": MIB, "block_size": 512 * MIB},
        {"size": MIB, "type": "elastic"},
    ],
)
def test_create_refuses(arguments, tmp_path):
    with pytest.raises(vhdx.InvalidArgumentError):
        vhdx.create(tmp_path / "disk.vhdx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_create_and_open_of_what_is_not_there_or_is_no_file(tmp_path, image):
    with pytest.raises(vhdx.ExistsError):
        vhdx.create(image, MIB)
    with pytest.raises(vhdx.NotFoundError):
        vhdx.create(tmp_path / "no" / "disk.vhdx", MIB)
    with pytest.raises(vhdx.HostIOError):
        vhdx.create(tmp_path, MIB, force=True)
    with pytest.raises(vhdx.NotFoundError):
        vhdx.open(tmp_path / "nothing.vhdx")
    with pytest.raises(vhdx.HostIOError) as caught:
        vhdx.open(tmp_path)
    assert caught.value.reason == Reason.NOT_A_FILE
    os.mkfifo(tmp_path / "fifo.raw")
    with pytest.raises(vhdx.HostIOError) as caught:
        vhdx.open(tmp_path / "fifo.raw")
    assert caught.value.reason == Reason.NOT_A_FILE
    with pytest.raises(vhdx.InvalidArgumentError):
        vhdx.open(image, "w")
    (tmp_path / "text").write_text("not an image")
    with pytest.raises(vhdx.UnsupportedError):
        vhdx.open(tmp_path / "text")


def test_read_only_disk_refuses_changes(image):
    before = sha(image)
    with vhdx.open(image) as disk:
        for change in (
            lambda: disk.pwrite(b"x", 0),
            lambda: disk.zero(0, 1),
            lambda: disk.trim(0, 1),
        ):
            with pytest.raises(vhdx.ReadOnlyError):
                change()
        disk.flush()
    assert sha(image) == before


def test_opening_for_writing_alone_changes_nothing(image):
    before = sha(image)
    with vhdx.open(image, "r+") as disk:
        disk.pread(MIB, 0)
        disk.flush()
    assert sha(image) == before


def test_closed_disk_refuses(image):
    disk = vhdx.open(image)
    disk.close()
    disk.close()
    with pytest.raises(vhdx.ClosedError):
        disk.pread(1, 0)


# ---- a full host ----


@pytest.fixture
def small_host(tmp_path):
    """A file system of 16 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "x", mount]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_full_host_fails_the_request_alone(small_host):
    path, ballast = small_host / "disk.vhdx", small_host / "ballast"
    vhdx.create(path, 64 * MIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"A" * MIB, 0)
        disk.flush()
        ballast.write_bytes(b"x" * (8 * MIB))
        with pytest.raises(vhdx.NoSpaceError) as caught:  # noqa: PT012
            for block in range(1, 20):
                disk.pwrite(b"B" * MIB, block * MIB)
                written = block
        assert caught.value.reason == Reason.NO_SPACE
        assert disk.pread(MIB, 0) == b"A" * MIB
        for block in range(1, written + 1):
            assert disk.pread(MIB, block * MIB) == b"B" * MIB
        ballast.unlink()
        disk.pwrite(b"C" * MIB, 30 * MIB)
        disk.flush()
    with vhdx.open(path) as disk:
        assert disk.pread(MIB, 0) == b"A" * MIB
        assert disk.pread(MIB, 30 * MIB) == b"C" * MIB
        for block in range(1, written + 1):
            assert disk.pread(MIB, block * MIB) == b"B" * MIB


def test_full_host_leaves_nothing_of_create_and_convert(small_host, image):
    with pytest.raises(vhdx.NoSpaceError):
        vhdx.create(small_host / "fixed.vhdx", 64 * MIB, type="fixed")
    with vhdx.open(image, "r+") as disk:
        disk.pwrite(b"x" * (6 * MIB), 0)
    (small_host / "ballast").write_bytes(b"x" * (13 * MIB))
    with pytest.raises(vhdx.NoSpaceError):
        vhdx.convert(image, small_host / "copy.raw")
    assert [path.name for path in small_host.iterdir()] == ["ballast"]


# ---- locks ----


def test_locks_between_ours(image):
    with vhdx.open(image) as first, vhdx.open(image) as second:
        assert first.pread(1, 0) == second.pread(1, 0)
        with pytest.raises(vhdx.InUseError, match="opened for writing"):
            vhdx.open(image, "r+")
    with vhdx.open(image, "r+"):
        for mode in ("r", "r+"):
            with pytest.raises(vhdx.InUseError, match=rf"process {os.getpid()}"):
                vhdx.open(image, mode)
    vhdx.open(image, "r+").close()


def test_locks_against_qemu(image, peer):
    peer("qemu-img", "qemu-io")
    with vhdx.open(image, "r+"):
        result = subprocess.run(["qemu-img", "info", image], capture_output=True, text=True)
        assert result.returncode != 0
        assert "lock" in result.stderr
    with vhdx.open(image):
        subprocess.run(["qemu-img", "info", image], check=True, capture_output=True)
        write = ["qemu-io", "-c", "write 0 512", image]
        assert "lock" in subprocess.run(write, capture_output=True, text=True).stderr
    holder = subprocess.Popen(
        ["qemu-io", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        holder.stdin.write("read 0 512\n")
        holder.stdin.flush()
        assert "read 512" in holder.stdout.readline()
        for mode in ("r", "r+"):
            with pytest.raises(vhdx.InUseError, match="qemu-io"):
                vhdx.open(image, mode)
    finally:
        holder.communicate("quit\n")
    vhdx.open(image, "r+").close()


# ---- size ----


def test_largest_image_opens_fast_and_small(fast_path):
    """64 TiB of 1 MiB blocks: what is read is what is needed, and memory stays bounded."""
    path = fast_path / "large.vhdx"
    vhdx.create(path, 64 * TIB, block_size=MIB)
    script = f"""
import random, resource, vhdx
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
import numpy
before = resident()
disk = vhdx.open({str(path)!r})
disk.pread(512, disk.size - 512)
opened = resident() - before
rng = random.Random(1)
for _ in range(20000):
    disk.pread(512, rng.randrange(disk.size // 512) * 512)
assert [(e.length, e.state) for e in disk.extents()] == [(disk.size, "hole")]
print(opened, resident() - before)
"""
    text = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    opened, walked = map(int, text.split())
    assert opened < 64 * MIB
    assert walked < 128 * MIB


def test_descriptors_are_not_leaked(image):
    before = len(os.listdir("/proc/self/fd"))
    set_entry(image, 2, 4)
    for _ in range(20):
        with pytest.raises(vhdx.DamagedError):
            vhdx.open(image, "r+")
    set_entry(image, 2, 0)
    for _ in range(20):
        vhdx.open(image, "r+").close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", ["64M", 10.5, True, 64, 0, -512])
def test_sizes_that_cannot_be_are_refused(tmp_path, size):
    with pytest.raises(vhdx.InvalidArgumentError, match="the size"):
        vhdx.create(tmp_path / "disk.vhdx", size)
    with pytest.raises(vhdx.InvalidArgumentError, match="taken for a raw one"):
        vhdx.create(tmp_path / "disk.img", 1 << 20)
    assert list(tmp_path.iterdir()) == []
