# SPDX-License-Identifier: MIT
"""What others refuse is read, reported by check, and never written."""

from __future__ import annotations

import struct
import subprocess
from uuid import UUID, uuid4

import pytest

import vhdx
from tests.images import edit, make_child, read
from vhdx.format import checksum, locator, metadata, region
from vhdx.units import MIB

SIZE = 8 * MIB
METADATA = 2 * MIB


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.vhdx"
    vhdx.create(path, SIZE, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"data" * 128, 0)
    return path


def edit_table(path, at: int, data: bytes, copies=region.TABLE_OFFSETS) -> None:
    for offset in copies:
        table = bytearray(read(path, offset, region.TABLE_SIZE))
        table[at : at + len(data)] = data
        checksum.seal(table)
        edit(path, offset, bytes(table))


def region_header(path):
    edit_table(path, 12, b"\1")


def region_entry(path):
    edit_table(path, 16 + 28, struct.pack("<I", 3))


def metadata_header(path):
    edit(path, METADATA + 8, b"\1")


def metadata_header_tail(path):
    edit(path, METADATA + 20, b"\1")


def metadata_flags(path):
    flags = struct.unpack("<I", read(path, METADATA + 32 + 24, 4))[0]
    edit(path, METADATA + 32 + 24, struct.pack("<I", flags | 8))


def metadata_reserved(path):
    edit(path, METADATA + 32 + 28, b"\1")


def file_parameters(path):
    at = METADATA + metadata.TABLE_SIZE + 4
    flags = struct.unpack("<I", read(path, at, 4))[0]
    edit(path, at, struct.pack("<I", flags | 4))


@pytest.mark.parametrize(
    "change",
    [
        region_header,
        region_entry,
        metadata_header,
        metadata_header_tail,
        metadata_flags,
        metadata_reserved,
        file_parameters,
    ],
)
def test_reserved_bits(image, change):
    change(image)
    before = image.read_bytes()
    with vhdx.open(image) as disk:
        assert disk.pread(4, 0) == b"data"
    with pytest.raises(vhdx.DamagedError, match="reserved bits"):
        vhdx.open(image, "r+")
    with pytest.raises(vhdx.DamagedError, match="reserved bits"):
        vhdx.compact(image)
    report = vhdx.check(image)
    assert [f.message for f in report.findings if "reserved bits" in f.message]
    assert report.errors
    assert image.read_bytes() == before


def test_a_key_of_the_locator_with_a_nul(tmp_path):
    parent, child = tmp_path / "parent.vhdx", tmp_path / "child.vhdx"
    vhdx.create(parent, SIZE)
    make_child(child, parent, SIZE)
    at = METADATA + metadata.TABLE_SIZE
    item = read(child, at, 4096)
    start = item.index("relative_path".encode("utf-16-le"))
    edit(child, at + start + 2 * len("relative"), b"\0\0")
    found = locator.parse_locator(read(child, at + item.index(locator.VHDX_TYPE.bytes_le), 1024), 0)
    assert "relative\0path" in found.entries
    with pytest.raises(vhdx.DamagedError, match="NUL"):
        vhdx.open(child, "r+", chain=False)
    with vhdx.open(child, chain=False) as disk:
        assert disk.size == SIZE
    assert any("NUL" in finding.message for finding in vhdx.check(child).findings)


def test_region_tables_that_disagree_are_not_settled_by_a_write(image):
    edit_table(image, 16 + 16, struct.pack("<Q", 64 * MIB), copies=region.TABLE_OFFSETS[1:])
    before = image.read_bytes()
    with pytest.raises(
        vhdx.DamagedError, match=r"0x300000 in the first and .* at 0x4000000"
    ) as error:
        vhdx.open(image, "r+")
    assert "check --repair" in str(error.value)
    assert image.read_bytes() == before
    assert vhdx.repair(image).findings == []
    vhdx.open(image, "r+").close()


@pytest.mark.parametrize("copy", [0, 1])
def test_a_damaged_region_table_is_mended_by_a_writable_open(image, copy, peer):
    guid = vhdx.info(image)["data_write_id"]
    edit(image, region.TABLE_OFFSETS[copy] + 100, b"x")
    with vhdx.open(image) as disk:
        assert disk.pread(4, 0) == b"data"
    assert region.parse_table(read(image, region.TABLE_OFFSETS[copy], region.TABLE_SIZE)) is None
    vhdx.open(image, "r+").close()
    tables = [read(image, at, region.TABLE_SIZE) for at in region.TABLE_OFFSETS]
    assert tables[0] == tables[1]
    assert vhdx.check(image).findings == []
    assert vhdx.info(image)["data_write_id"] == guid
    peer("qemu-img")
    subprocess.run(["qemu-img", "check", "-q", "-f", "vhdx", image], check=True)


def add_item(path, guid: UUID, value: bytes, flags: int) -> None:
    """Adds a metadata item behind all others."""
    table = bytearray(read(path, METADATA, metadata.TABLE_SIZE))
    count = struct.unpack_from("<H", table, 10)[0]
    struct.pack_into("<H", table, 10, count + 1)
    struct.pack_into(
        "<16sIIII", table, 32 + 32 * count, guid.bytes_le, 512 << 10, len(value), flags, 0
    )
    edit(path, METADATA, bytes(table))
    edit(path, METADATA + (512 << 10), value)


def items_of(path) -> dict[UUID, bytes]:
    data = read(path, METADATA, MIB)
    return {
        item.guid: data[item.offset : item.offset + item.length]
        for item in metadata.parse_table(data[: metadata.TABLE_SIZE], METADATA, MIB)
    }


def test_unknown_metadata_are_kept_and_those_of_the_disk_inherited(image, tmp_path):
    user, of_disk, of_file = uuid4(), uuid4(), uuid4()
    add_item(image, user, b"user's", 1 | 2)
    table = bytearray(read(image, METADATA, metadata.TABLE_SIZE))
    count = struct.unpack_from("<H", table, 10)[0]
    for i, (guid, flags) in enumerate(((of_disk, 2), (of_file, 0))):
        struct.pack_into(
            "<16sIIII", table, 32 + 32 * (count + i), guid.bytes_le, (600 + i) << 10, 4, flags, 0
        )
    struct.pack_into("<H", table, 10, count + 2)
    edit(image, METADATA, bytes(table))
    edit(image, METADATA + (600 << 10), b"disk")
    edit(image, METADATA + (601 << 10), b"file")
    child = tmp_path / "child.vhdx"
    vhdx.create(child, parent=image)
    assert items_of(child)[user] == b"user's"
    assert items_of(child)[of_disk] == b"disk"
    assert of_file not in items_of(child)
    vhdx.snapshot(child, tmp_path / "older.vhdx")
    assert items_of(child)[user] == b"user's"
    child.unlink()
    (tmp_path / "older.vhdx").unlink()
    vhdx.resize(image, 16 * MIB)
    vhdx.compact(image)
    kept = items_of(image)
    assert (kept[user], kept[of_disk], kept[of_file]) == (b"user's", b"disk", b"file")


def test_an_unknown_region_is_kept(image, tmp_path):
    """Its bytes stay where they are, whatever is allocated, trimmed, compacted or resized."""
    end = image.stat().st_size
    guid = uuid4()
    tables = region.parse_table(read(image, region.TABLE_OFFSETS[0], region.TABLE_SIZE))
    at = -(-end // MIB) * MIB
    table = region.pack_table([*tables, region.Region(guid, at, MIB, False)])
    with image.open("r+b") as file:
        file.truncate(at + MIB)
    for offset in region.TABLE_OFFSETS:
        edit(image, offset, table)
    edit(image, at, b"unknown!" * 1024)
    with vhdx.open(image, "r+") as disk:
        disk.pwrite(b"x" * SIZE, 0)
        disk.trim(0, SIZE)
        disk.flush()
        disk.compact()
        disk.resize(1 << 40)
    assert read(image, at, 8192) == b"unknown!" * 1024
    found = region.parse_table(read(image, region.TABLE_OFFSETS[0], region.TABLE_SIZE))
    assert region.Region(guid, at, MIB, False) in found
