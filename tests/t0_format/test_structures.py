# SPDX-License-Identifier: MIT
"""On-disk structures: golden bytes, refusals with their reasons, and the log's active sequence."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdx.errors import DamagedError, InvalidArgumentError, Reason
from vhdx.format import bat, header, locator, log, metadata, region, vhd
from vhdx.format.checksum import crc32c, seal
from vhdx.units import GIB, MIB, TIB, format_size, parse_size

GUID = UUID("00112233-4455-6677-8899-aabbccddeeff")
HEADER = header.Header(0, 7, GUID, GUID, header.NIL, 0, 1, 1 * MIB, 1 * MIB)
FOOTER = vhd.new_footer(10 * MIB, vhd.DiskType.DYNAMIC, GUID)
PARAMETERS = metadata.DiskParameters(10 * GIB, 32 * MIB, 512, 4096, GUID, False, False)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def test_crc32c_check_value():
    assert crc32c(b"123456789") == 0xE3069283


def test_packed_structures_never_change():
    """Golden: images in the world depend on these bytes."""
    pages = np.arange(2 * 4096, dtype=np.uint32).astype(np.uint8).reshape(2, 4096)
    offsets = np.array([3 * MIB, 3 * MIB + 4096], np.uint64)
    entry = log.pack_entry(
        GUID,
        5 << 32 | 9,
        4096,
        offsets,
        pages,
        flushed_file_offset=8 * MIB,
        last_file_offset=8 * MIB,
    ).tobytes()
    found = {
        "identifier": digest(header.pack_identifier("vhdx 0.1.0")),
        "header": digest(HEADER.pack()),
        "regions": digest(region.pack_table([region.Region(region.BAT, 3 * MIB, MIB, True)])),
        "metadata": digest(metadata.pack_metadata(PARAMETERS)),
        "locator": digest(locator.pack_locator(locator.ParentLocator({"parent_linkage": "{x}"}))),
        "log entry": digest(entry),
        "vhd footer": digest(replace(FOOTER, timestamp=1).pack()),
        "vhd header": digest(vhd.DynamicHeader(1536, 5, 2 * MIB).pack()),
    }
    assert found == GOLDEN


GOLDEN = {
    "identifier": "4388ef7404dc8722",
    "header": "8f33425b0079fc68",
    "regions": "34d61786f73a538d",
    "metadata": "0e3040c541fc03dc",
    "locator": "fc58920ce1ba4680",
    "log entry": "341ded4e4b3973e1",
    "vhd footer": "2c97b75e114a18ab",
    "vhd header": "26684ab478cea7d1",
}


def test_header_round_trip_and_damage():
    data = HEADER.pack()
    assert header.parse_header(data, 0) == HEADER
    for at in (0, 5, 8, 79, 4095):
        bad = bytearray(data)
        bad[at] ^= 1
        assert header.parse_header(bytes(bad), 0) is None


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (HEADER, None, 0),
        (None, replace(HEADER, slot=1), 1),
        (HEADER, replace(HEADER, slot=1, sequence_number=8), 1),
        (HEADER, replace(HEADER, slot=1, sequence_number=6), 0),
        (HEADER, replace(HEADER, slot=1), 0),
    ],
)
def test_current_header(first, second, expected):
    assert header.choose_header(first, second).slot == expected


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (None, None, Reason.HEADERS),
        (HEADER, replace(HEADER, slot=1, log_guid=GUID), Reason.HEADERS),
        (replace(HEADER, version=2), None, Reason.HEADER_VERSION),
        (replace(HEADER, log_version=1, log_guid=GUID), None, Reason.LOG_VERSION),
        (replace(HEADER, log_offset=MIB + 1), None, Reason.LOG_LOCATION),
        (replace(HEADER, log_length=1 << 31), None, Reason.LOG_LOCATION),
        (replace(HEADER, log_length=0, log_guid=GUID), None, Reason.LOG_LOCATION),
    ],
)
def test_refused_headers(first, second, reason):
    with pytest.raises(DamagedError) as caught:
        header.choose_header(first, second)
    assert caught.value.reason == reason


BAT = region.Region(region.BAT, 3 * MIB, MIB, True)
METADATA = region.Region(region.METADATA, 2 * MIB, MIB, True)


@pytest.mark.parametrize(
    ("regions", "reason"),
    [
        ([BAT], Reason.REGION_MISSING),
        ([BAT, replace(METADATA, offset=3 * MIB)], Reason.REGION_OVERLAP),
        ([BAT, replace(METADATA, offset=MIB)], Reason.REGION_OVERLAP),
        ([BAT, replace(METADATA, offset=2 * MIB + 1)], Reason.REGION_TABLE),
        ([BAT, replace(METADATA, length=0)], Reason.REGION_TABLE),
        ([BAT, replace(METADATA, offset=(1 << 64) - MIB)], Reason.REGION_TABLE),
        ([BAT, METADATA, BAT], Reason.REGION_TABLE),
        (
            [BAT, METADATA, region.Region(GUID, 8 * MIB, MIB, True)],
            Reason.REGION_UNKNOWN_REQUIRED,
        ),
    ],
)
def test_refused_regions(regions, reason):
    with pytest.raises(DamagedError) as caught:
        region.check_regions(regions, region.TABLE_OFFSETS[0], MIB, MIB)
    assert caught.value.reason == reason


def test_qemu_regions_without_required_and_unknown_optional_ones_are_accepted():
    regions = [replace(BAT, required=False), replace(METADATA, required=False)]
    regions.append(region.Region(GUID, 8 * MIB, MIB, False))
    table = region.parse_table(region.pack_table(regions))
    assert table == regions
    assert region.check_regions(table, 0, MIB, MIB) == (regions[0], regions[1])


def metadata_table(*rows: tuple[UUID, int, int, int]) -> bytes:
    table = bytearray(metadata.TABLE_SIZE)
    struct.pack_into("<8sHH", table, 0, b"metadata", 0, len(rows))
    for i, (guid, offset, length, flags) in enumerate(rows):
        struct.pack_into("<16sIIII", table, 32 + 32 * i, guid.bytes_le, offset, length, flags, 0)
    return bytes(table)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(GUID, 65536, 8, 4)], Reason.METADATA_UNKNOWN_REQUIRED),
        ([(metadata.INCOMPLETE, 0, 0, 4)], Reason.INCOMPLETE),
        ([(GUID, 65535, 8, 0)], Reason.METADATA_TABLE),
        ([(GUID, 65536, MIB + 1, 0)], Reason.METADATA_TABLE),
        ([(GUID, MIB - 4, 8, 0)], Reason.METADATA_TABLE),
        ([(GUID, 65536, 8, 0), (GUID, 65544, 8, 0)], Reason.METADATA_TABLE),
        ([(GUID, 65536, 8, 0), (UUID(int=5), 65540, 8, 0)], Reason.METADATA_TABLE),
    ],
)
def test_refused_metadata(rows, reason):
    with pytest.raises(DamagedError) as caught:
        metadata.parse_table(metadata_table(*rows), 2 * MIB, MIB)
    assert caught.value.reason == reason


def values_of(packed: bytes) -> dict[UUID, bytes]:
    items = metadata.parse_table(packed[: metadata.TABLE_SIZE], 0, MIB)
    return {item.guid: packed[item.offset : item.offset + item.length] for item in items}


def test_parameters_round_trip():
    assert metadata.parse_parameters(values_of(metadata.pack_metadata(PARAMETERS)), 0) == PARAMETERS


@pytest.mark.parametrize(
    "changes",
    [
        {"virtual_size": 0},
        {"virtual_size": 513},
        {"virtual_size": 64 * TIB + 512},
        {"block_size": MIB // 2},
        {"block_size": 3 * MIB},
        {"block_size": 512 * MIB},
        {"logical_sector_size": 1024},
        {"physical_sector_size": 0},
    ],
)
def test_refused_parameters(changes):
    packed = metadata.pack_metadata(replace(PARAMETERS, **changes))
    with pytest.raises(DamagedError) as caught:
        metadata.parse_parameters(values_of(packed), 0)
    assert caught.value.reason == Reason.METADATA_ITEM


def test_locator_round_trip_and_nil_linkage():
    entries = {
        "parent_linkage": f"{{{GUID}}}",
        "parent_linkage2": f"{{{header.NIL}}}",
        "relative_path": r".\parent.vhdx",
    }
    found = locator.parse_locator(locator.pack_locator(locator.ParentLocator(entries)), 0)
    assert found.entries == entries
    assert found.linkages == (GUID,)
    assert found.paths == (("relative_path", r".\parent.vhdx"),)


@given(st.binary(max_size=200))
def test_locator_of_garbage_is_refused(data):
    with pytest.raises(DamagedError):
        locator.parse_locator(locator.VHDX_TYPE.bytes_le + data, 0)


@pytest.mark.parametrize(
    ("size", "block", "sector", "ratio", "entries"),
    [
        (64 * TIB, MIB, 512, 4096, 64 * MIB + 64 * MIB // 4096 - 1),
        (10 * GIB, 32 * MIB, 512, 128, 322),
        (1 * GIB, 256 * MIB, 512, 16, 4),
        (1 * GIB, 256 * MIB, 4096, 128, 4),
        (512, MIB, 512, 4096, 1),
    ],
)
def test_geometry(size, block, sector, ratio, entries):
    geometry = bat.Geometry(size, block, sector, False)
    assert (geometry.chunk_ratio, geometry.entries) == (ratio, entries)
    last = geometry.blocks - 1
    assert geometry.index(last) == entries - 1
    assert int(geometry.indices(np.array([last], np.uint64))[0]) == entries - 1
    with_parent = replace(geometry, has_parent=True)
    assert with_parent.entries == with_parent.bitmap_index(with_parent.bitmaps - 1) + 1


# ---- the log ----


def entry_of(number: int, tail: int, pages: int, guid: UUID = GUID) -> bytes:
    content = np.full((pages, 4096), number % 251, np.uint8)
    offsets = np.arange(pages, dtype=np.uint64) * np.uint64(4096) + np.uint64(3 * MIB)
    return log.pack_entry(
        guid, number, tail, offsets, content, flushed_file_offset=4 * MIB, last_file_offset=4 * MIB
    ).tobytes()


def place(buffer: bytearray, at: int, data: bytes) -> int:
    first = min(len(data), len(buffer) - at)
    buffer[at : at + first] = data[:first]
    buffer[: len(data) - first] = data[first:]
    return (at + len(data)) % len(buffer)


def test_sequence_starts_at_the_tail_of_its_head():
    buffer = bytearray(MIB)
    at = place(buffer, 0, entry_of(1, 0, 0))
    second = at
    at = place(buffer, at, entry_of(2, second, 2))
    place(buffer, at, entry_of(3, second, 1))
    found = log.find_active_sequence(bytes(buffer), GUID, MIB)
    assert [entry.sequence_number for entry in found.entries] == [2, 3]
    assert [len(entry.patches) for entry in found.entries] == [2, 1]


def test_sequence_across_the_wrap():
    buffer = bytearray(MIB)
    start = MIB - 8192
    at = place(buffer, start, entry_of(8, start, 3))
    place(buffer, at, entry_of(9, start, 1))
    found = log.find_active_sequence(bytes(buffer), GUID, MIB)
    assert [entry.sequence_number for entry in found.entries] == [8, 9]
    assert found.entries[0].patches[2].data == bytes([8]) * 4096


def test_torn_head_falls_back_to_the_entry_before():
    buffer = bytearray(MIB)
    at = place(buffer, 0, entry_of(1, 0, 1))
    place(buffer, at, entry_of(2, at, 3))
    buffer[at + 3 * 4096] ^= 1
    found = log.find_active_sequence(bytes(buffer), GUID, MIB)
    assert found.head.sequence_number == 1


def test_other_guid_and_tail_outside_are_no_sequence():
    buffer = bytearray(MIB)
    place(buffer, 0, entry_of(1, 0, 1, UUID(int=9)))
    assert log.find_active_sequence(bytes(buffer), GUID, MIB) is None
    place(buffer, 0, entry_of(1, 4096, 1))
    assert log.find_active_sequence(bytes(buffer), GUID, MIB) is None


def test_entry_that_changes_the_log_or_the_headers_is_invalid():
    for target in (MIB, 0, 128 * 1024):
        offsets = np.array([target], np.uint64)
        data = log.pack_entry(
            GUID,
            1,
            0,
            offsets,
            np.zeros((1, 4096), np.uint8),
            flushed_file_offset=0,
            last_file_offset=0,
        ).tobytes()
        assert log.parse_entry(data + bytes(MIB), 0, GUID, MIB) is None


def test_log_made_to_be_slow_ends():
    """Every sector claims an entry as long as the log."""
    sector = bytearray(4096)
    struct.pack_into(
        "<4sIIIQII16sQQ", sector, 0, b"loge", 0, 8 * MIB, 0, 1, 0, 0, GUID.bytes_le, 0, 0
    )
    assert log.find_active_sequence(bytes(sector) * 2048, GUID, MIB) is None


@given(st.integers(0, 24 * 4096 - 1), st.integers(1, 255))
def test_damaged_log_never_yields_changed_content(at, change):
    buffer = bytearray(24 * 4096)
    second = place(buffer, 0, entry_of(1, 0, 5))
    place(buffer, second, entry_of(2, 0, 5))
    buffer[at] ^= change
    found = log.find_active_sequence(bytes(buffer), GUID, MIB)
    for entry in found.entries if found else ():
        for patch in entry.patches:
            assert patch.data == bytes([entry.sequence_number]) * 4096


def test_seal_is_what_verify_wants():
    data = bytearray(b"head" + bytes(4092))
    seal(data)
    assert (
        crc32c(bytes(data[:4]) + bytes(4) + bytes(data[8:])) == struct.unpack_from("<I", data, 4)[0]
    )


# ---- sizes ----


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64G", 64 * GIB), ("512m", 512 * MIB), ("1.5T", 3 * TIB // 2), ("1KiB", 1024)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.3", "1X", "0x10", "1e3", "\u0661"])
def test_refused_sizes(text):
    with pytest.raises(InvalidArgumentError):
        parse_size(text)


def test_format_size():
    assert [format_size(n) for n in (0, 1023, 1024, 1536 * MIB, 64 * TIB)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 GiB",
        "64 TiB",
    ]
