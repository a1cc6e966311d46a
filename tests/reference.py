# SPDX-License-Identifier: MIT
"""A second reader of VHDX, slow and plain, for the fuzzers and models to compare ours with.

Written from the specification for files that fit into memory, sharing no code with the package. It
says the geometry and the content of an image, its log replayed, or why it must be refused.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, field
from uuid import UUID

import google_crc32c

MIB = 1 << 20
NIL = bytes(16)
BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
ITEMS = {
    "file": (UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le, 8),
    "size": (UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le, 8),
    "disk": (UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le, 16),
    "logical": (UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le, 4),
    "physical": (UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le, 4),
}
LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
LOCATOR_TYPE = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913").bytes_le


class Refused(Exception):
    """The image breaks a rule."""


def need(condition: bool, why: str) -> None:
    if not condition:
        raise Refused(why)


def crc_holds(data: bytes) -> bool:
    return google_crc32c.value(data[:4] + bytes(4) + data[8:]) == struct.unpack_from("<I", data, 4)[0]


@dataclass
class Reference:
    """What an image says; ``file`` is its content after replay."""

    file: bytearray
    virtual_size: int = 0
    block_size: int = 0
    logical: int = 0
    physical: int = 0
    has_parent: bool = False
    fixed: bool = False
    bat: int = 0
    has_log: bool = False  # that a writer could use
    linkages: list[UUID] = field(default_factory=list)

    def entry(self, index: int) -> int:
        return int(struct.unpack_from("<Q", self.file, self.bat + 8 * index)[0])

    @property
    def ratio(self) -> int:
        return (1 << 23) * self.logical // self.block_size

    @property
    def blocks(self) -> int:
        return -(-self.virtual_size // self.block_size)

    def read(self, offset: int, length: int) -> bytes | None:
        """Bytes of the disk; None where some of them are the parent's."""
        out = bytearray()
        while length:
            part = min(length, self.logical - offset % self.logical)
            sector = self._part(offset, part)
            if sector is None:
                return None
            out += sector
            offset += part
            length -= part
        return bytes(out)

    def _part(self, offset: int, length: int) -> bytes | None:
        block, within = divmod(offset, self.block_size)
        entry = self.entry(block + block // self.ratio)
        state, place = entry & 7, entry >> 20 << 20
        if state == 7 and self.has_parent:
            chunk, inside = divmod(block, self.ratio)
            bitmap = self.entry((chunk + 1) * self.ratio + chunk)
            need(bitmap & 7 >= 6, "a partial block without a sector bitmap")
            bitmap = bitmap >> 20 << 20
            need(MIB <= bitmap <= len(self.file) - MIB, "a sector bitmap outside the file")
            bit = (inside * self.block_size + within) // self.logical
            if not self.file[bitmap + bit // 8] >> bit % 8 & 1:
                return None
        elif state == 0 and self.has_parent:
            return None
        elif state < 6:
            return bytes(length)
        found = bytes(self.file[place + within : place + within + length])
        return found + bytes(length - len(found))


def read_reference(data: bytearray) -> Reference:
    """Reads the image in ``data``, which is changed by the replay.

    Raises:
        Refused: with the rule that it breaks.
    """
    need(data[:8] == b"vhdxfile", "signature")
    need(len(data) >= MIB, "shorter than its header section")
    header = current_header(data)
    log_guid = header[48:64]
    log_version, version, log_length, log_offset = struct.unpack_from("<HHIQ", header, 64)
    need(version == 1, "version")
    need(log_version == 0 or log_guid == NIL, "log version")
    need(log_length % MIB == 0 and log_offset % MIB == 0, "log alignment")
    need(log_length <= 256 * MIB and log_offset < 1 << 62, "log size")
    need(log_length == 0 or log_offset >= MIB, "log in the header section")
    if log_guid != NIL:
        need(log_length > 0 and log_offset + log_length <= len(data), "no log, or outside")
        replay(data, log_guid, log_offset, log_length)
    image = Reference(data)
    image.has_log = log_length > 0 and log_offset + log_length <= len(data)
    regions = region_table(data, log_offset, log_length)
    parameters(image, *regions[METADATA])
    bat_entries(image, regions, (log_offset, log_length))
    return image


def current_header(data: bytearray) -> bytes:
    copies = [bytes(data[at : at + 4096]) for at in (64 << 10, 128 << 10)]
    good = [c for c in copies if c[:4] == b"head" and crc_holds(c)]
    need(bool(good), "no header is valid")
    numbers = [struct.unpack_from("<Q", c, 8)[0] for c in good]
    if len(good) == 2 and numbers[0] == numbers[1]:
        need(good[0][8:80] == good[1][8:80], "two current headers")
    best = good[numbers.index(max(numbers))]
    need(max(numbers) <= (1 << 64) - (1 << 32), "sequence number")
    return best


def log_entry(log: bytes, at: int, guid: bytes, span: tuple[int, int]):
    """Length, number, tail, flushed and last size, changes; None where no valid entry stands."""
    _, _, length, tail, number, count, _ = struct.unpack_from("<4sIIIQII", log, at)
    owner, flushed, last = struct.unpack_from("<16sQQ", log, at + 32)
    if log[at : at + 4] != b"loge" or owner != guid or number == 0 or count > 1 << 17:
        return None
    if not length or length % 4096 or length > len(log) or tail % 4096 or tail >= len(log):
        return None
    entry = (log + log)[at : at + length]
    first = (64 + 32 * count + 4095) // 4096 * 4096
    if first > length or not crc_holds(entry):
        return None
    changes = []
    for i in range(count):
        kind = entry[64 + 32 * i : 68 + 32 * i]
        if kind == b"desc":
            trailing, leading = entry[68 + 32 * i : 72 + 32 * i], entry[72 + 32 * i : 80 + 32 * i]
            target, owner_number = struct.unpack_from("<QQ", entry, 80 + 32 * i)
            sector = entry[first : first + 4096]
            high_low = sector[4:8] + sector[4092:]
            if sector[:4] != b"data" or struct.unpack("<II", high_low) != (
                number >> 32,
                number & 0xFFFFFFFF,
            ):
                return None
            first += 4096
            size, content = 4096, leading + sector[8:4092] + trailing
        elif kind == b"zero":
            size, target, owner_number = struct.unpack_from("<QQQ", entry, 72 + 32 * i)
            content = None
        else:
            return None
        if owner_number != number or target % 4096 or size % 4096 or target < 192 << 10:
            return None
        if target + size >= 1 << 63 or (target < span[1] and target + size > span[0]):
            return None
        changes.append((target, size, content))
    if first != length:
        return None
    return length, number, tail, flushed, last, changes


def replay(data: bytearray, guid: bytes, offset: int, length: int) -> None:
    log = bytes(data[offset : offset + length])
    span = (offset, offset + length)
    entries = {at: log_entry(log, at, guid, span) for at in range(0, length, 4096)}
    best: list = []
    for start in entries:
        run, at, used = [], start, 0
        while (entry := entries[at]) is not None and used + entry[0] <= length:
            if run and entry[1] != run[-1][1][1] + 1:
                break
            run.append((at, entry))
            used += entry[0]
            at = (at + entry[0]) % length
        if not run:
            continue
        starts = [each[0] for each in run]
        head = run[-1][1]
        if head[2] in starts and (not best or head[1] > best[-1][1][1]):
            best = run[starts.index(head[2]) :]
    need(bool(best), "no active sequence in the log")
    _, _, _, flushed, last, _ = best[-1][1]
    need(len(data) >= flushed, "shorter than when the log was written")
    ends = [t + s for _, entry in best for t, s, _ in entry[5]]
    end = max([last, *ends])
    need(end <= 1 << 48, "the log makes the file too long")
    if end > len(data):
        if end > 1 << 30:
            raise MemoryError("longer than this reader can hold")
        data.extend(bytes(end - len(data)))
    for _, entry in best:
        for target, size, content in entry[5]:
            data[target : target + size] = bytes(size) if content is None else content


def region_table(data: bytearray, log_offset: int, log_length: int) -> dict[bytes, tuple[int, int]]:
    for at in (192 << 10, 256 << 10):
        table = bytes(data[at : at + 65536])
        count = struct.unpack_from("<I", table, 8)[0]
        if table[:4] == b"regi" and count <= 2047 and crc_holds(table):
            break
    else:
        raise Refused("no region table is valid")
    found: dict[bytes, tuple[int, int]] = {}
    spans = [(0, MIB)] + ([(log_offset, log_offset + log_length)] if log_length else [])
    for i in range(count):
        guid, offset, length, required = struct.unpack_from("<16sQII", table, 16 + 32 * i)
        need(offset % MIB == 0 and length % MIB == 0 and length > 0, "region alignment")
        need(offset >= MIB and offset + length < 1 << 63, "region place")
        need(guid not in found, "region twice")
        need(not required & 1 or guid in {BAT, METADATA}, "unknown required region")
        found[guid] = (offset, length)
        spans.append((offset, offset + length))
    spans.sort()
    need(all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "regions overlap")
    for guid in (BAT, METADATA):
        need(guid in found, "region missing")
        need(sum(found[guid]) <= len(data), "region outside the file")
    return found


def parameters(image: Reference, start: int, length: int) -> None:
    table = bytes(image.file[start : start + 65536])
    signature, _, count = struct.unpack_from("<8sHH", table)
    need(signature == b"metadata" and count <= 2047, "metadata table")
    items: dict[tuple[bytes, int], tuple[int, int]] = {}
    known = {guid for guid, _ in ITEMS.values()} | {LOCATOR}
    for i in range(count):
        guid, at, size, flags = struct.unpack_from("<16sIII", table, 32 + 32 * i)
        need(size <= MIB, "item too long")
        need(at >= 65536 and at + size <= length if size else at == 0, "item misplaced")
        need(not flags & 4 or (guid in known and not flags & 1), "unknown required item")
        need((guid, flags & 1) not in items, "item twice")
        items[guid, flags & 1] = (at, size)
    spans = sorted(each for each in items.values() if each[1])
    need(all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(spans)), "items overlap")

    def item(name: str) -> bytes:
        guid, size = ITEMS[name]
        need((guid, 0) in items and items[guid, 0][1] == size, f"{name} missing or of a wrong size")
        at = start + items[guid, 0][0]
        return bytes(image.file[at : at + size])

    image.block_size, flags = struct.unpack("<II", item("file"))
    (image.virtual_size,) = struct.unpack("<Q", item("size"))
    (image.logical,) = struct.unpack("<I", item("logical"))
    (image.physical,) = struct.unpack("<I", item("physical"))
    item("disk")
    image.fixed, image.has_parent = bool(flags & 1), bool(flags & 2)
    need(image.block_size in [MIB << i for i in range(9)], "block size")
    need(image.logical in {512, 4096} and image.physical in {512, 4096}, "sector size")
    need(0 < image.virtual_size <= 64 << 40, "virtual size")
    need(image.virtual_size % image.logical == 0, "virtual size in sectors")
    if image.has_parent:
        need((LOCATOR, 0) in items, "no parent locator")
        at, size = items[LOCATOR, 0]
        parent_locator(image, bytes(image.file[start + at : start + at + size]))


def parent_locator(image: Reference, data: bytes) -> None:
    need(len(data) >= 20 and data[:16] == LOCATOR_TYPE, "locator type")
    (count,) = struct.unpack_from("<H", data, 18)
    need(1 <= count <= 256 and 20 + 12 * count <= len(data), "locator entries")
    pairs: dict[str, str] = {}
    for i in range(count):
        key, value, key_size, value_size = struct.unpack_from("<IIHH", data, 20 + 12 * i)
        need(min(key, value, key_size, value_size) > 0, "locator entry empty")
        need(max(key + key_size, value + value_size) <= len(data), "locator entry outside")
        try:
            name = data[key : key + key_size].decode("utf-16-le")
            text = data[value : value + value_size].decode("utf-16-le")
        except UnicodeDecodeError:
            raise Refused("locator text") from None
        need(name not in pairs, "locator key twice")
        pairs[name] = text
    need("parent_linkage" in pairs, "no linkage")


def bat_entries(image: Reference, regions: dict, log: tuple[int, int]) -> None:
    image.bat, length = regions[BAT]
    bitmaps = -(-image.blocks // image.ratio)
    count = image.blocks + (image.blocks - 1) // image.ratio
    if image.has_parent:
        count = bitmaps * (image.ratio + 1)
    need(count * 8 <= length, "the BAT is too short")
    end = len(image.file)
    taken = {0}
    for offset, size in [*regions.values(), log]:
        if size <= 1 << 40:
            taken.update(range(offset // MIB, min((offset + size) // MIB, end // MIB + 1)))
    for block in range(image.blocks):
        entry = image.entry(block + block // image.ratio)
        state, place = entry & 7, entry >> 20 << 20
        need(state in {0, 1, 2, 3, 6, 7}, "state of a block")
        need(not entry & 0xFFFF8, "reserved bits of an entry")
        stored = min(image.block_size, image.virtual_size - block * image.block_size)
        if state >= 6:
            need(place >= MIB and place + stored <= end, "a block outside the file")
        elif state not in {1, 3} or not MIB <= place <= end - image.block_size:
            continue
        claim(taken, place, image.block_size, end)
    for chunk in range(bitmaps if image.has_parent else (image.blocks - 1) // image.ratio):
        entry = image.entry((chunk + 1) * image.ratio + chunk)
        place = entry >> 20 << 20
        if entry & 7 >= 6 and MIB <= place <= end - MIB:
            claim(taken, place, MIB, end)


def claim(taken: set[int], place: int, size: int, end: int) -> None:
    mibs = range(place // MIB, min((place + size) // MIB, -(-end // MIB)))
    need(taken.isdisjoint(mibs), "two structures in one place")
    taken.update(mibs)
