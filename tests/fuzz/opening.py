# SPDX-License-Identifier: MIT
"""The open path: mutated images, opened, read and written, and a second reader's opinion."""

from __future__ import annotations

import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.reference import Reference, Refused, read_reference

if TYPE_CHECKING:
    import vhdx

MIB = 1 << 20


def base_images(directory: Path) -> list[tuple[bytes, int]]:
    """Small images of every kind: the first MiBs, and the size of the file."""
    import vhdx
    from tests.images import BAT_OFFSET, add_log, make_child, read, set_entry

    found = []

    def note(path: Path) -> None:
        found.append((read(path, 0, 5 * MIB), path.stat().st_size))

    for number, options in enumerate(
        (
            {"block_size": MIB},
            {"block_size": MIB, "logical_sector_size": 4096},
            {"block_size": 2 * MIB, "type": "fixed"},
            {"block_size": 256 * MIB},
        )
    ):
        path = directory / f"{number}.vhdx"
        vhdx.create(path, 8 * MIB, **options)
        with vhdx.open(path, "r+") as disk:
            if disk.block_size < 64 * MIB:  # large files only make it slow
                disk.pwrite(b"x" * 4096, 3 * MIB)
                disk.zero(0, MIB)
        note(path)
    path = directory / "dirty.vhdx"
    shutil.copy(directory / "0.vhdx", path)
    add_log(path, {BAT_OFFSET: read(path, BAT_OFFSET, 4096), BAT_OFFSET + 4096: bytes(4096)})
    note(path)
    set_entry(path, 2, 3 | 4 * MIB)
    note(path)
    child = directory / "child.vhdx"
    make_child(child, directory / "0.vhdx", 8 * MIB, sectors={5: b"s" * 512})
    note(child)
    return found


HEADER_FIELDS = [(0, 4), (4, 4), (8, 8), (48, 8), (64, 2), (66, 2), (68, 4), (72, 8)]
INTERESTING = [0, 1, 2, 3, 5, 6, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 20, (1 << 20) - 1, 1 << 31]
INTERESTING += [(1 << 32) - 1, 1 << 44, 1 << 48, 1 << 62, 1 << 63, (1 << 64) - 1, (1 << 64) - MIB]
# Where a changed field changes a decision: offset and width.
FIELDS = [(0, 8)]
for _header in (65536, 131072):
    FIELDS += [(_header + at, width) for at, width in HEADER_FIELDS]
for _table in (196608, 262144):
    FIELDS += [(_table + 8, 4)]
    for _entry in (16, 48):
        FIELDS += [(_table + _entry + at, w) for at, w in ((0, 8), (16, 8), (24, 4), (28, 4))]
FIELDS += [(2 * MIB, 8), (2 * MIB + 10, 2)] * 3
for _entry in range(32, 32 * 7, 32):
    FIELDS += [(2 * MIB + _entry + at, 4) for at in (0, 16, 20, 24)]
# The values of the items, which Windows and we put behind one another; the locator's entries.
FIELDS += [(2 * MIB + 65536 + at, w) for at, w in ((0, 4), (4, 4), (8, 8), (16, 4), (20, 4))] * 2
FIELDS += [(2 * MIB + 65536 + at, w) for at, w in ((40, 8), (58, 2))]
for _entry in (60, 72, 84):
    FIELDS += [(2 * MIB + 65536 + _entry + at, w) for at, w in ((0, 4), (4, 4), (8, 2), (10, 2))]
FIELDS += [(3 * MIB + at, 8) for at in range(0, 80, 8)]
FIELDS += [(MIB + at, w) for at, w in ((0, 4), (8, 4), (12, 4), (16, 8), (24, 4), (48, 8), (56, 8))]
FIELDS += [(MIB + 64 + at, 8) for at in range(0, 64, 8)]
PLACES = [(0, 700), (65536, 80), (131072, 80), (196608, 120), (262144, 120), (MIB, 4200)]
PLACES += [(MIB + 4096, 8192), (2 * MIB, 300), (2 * MIB + 65536, 1100), (3 * MIB, 80)]


def mutate(data: bytearray, rng: random.Random) -> None:
    """Changes fields, then puts checksums right (most of the time)."""
    from vhdx.format import header, region
    from vhdx.format.checksum import seal

    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        if rng.random() < 0.7:
            at, width = rng.choice(FIELDS)
        else:
            start, length = rng.choice(PLACES)
            at = start + rng.randrange(length)
            width = rng.choice([1, 2, 4, 8])
        choice = rng.random()
        if choice < 0.5:
            value = rng.choice(INTERESTING)
        elif choice < 0.75:
            old = int.from_bytes(data[at : at + width], "little")
            value = old + rng.choice([-1, 1, 8, -8, 512, MIB, -MIB, 1 << 20 << 3, old])
            value ^= rng.choice([0, 0, 0, 1, 2, 8, 512])
        elif choice < 0.9:
            value = rng.getrandbits(64)
        else:
            other, span = rng.choice(PLACES)
            source = other + rng.randrange(span)
            data[at : at + 32] = data[source : source + 32]
            continue
        data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    if rng.random() < 0.1:
        return
    spans = [(o, header.HEADER_SIZE) for o in header.HEADER_OFFSETS]
    spans += [(o, region.TABLE_SIZE) for o in region.TABLE_OFFSETS]
    for offset in range(MIB, MIB + 65536, 4096):
        if data[offset : offset + 4] == b"loge":
            (length,) = struct.unpack_from("<I", data, offset + 8)
            if 0 < length <= MIB:
                spans.append((offset, length))
    for offset, length in spans:
        part = bytearray(data[offset : offset + length])
        if len(part) > 8:
            seal(part)
            data[offset : offset + length] = part


def facts(disk: vhdx.Disk) -> tuple:
    """What the second reader must say, too."""
    return (disk.size, disk.block_size, disk.logical_sector_size, disk.physical_sector_size)


def exercise(path: Path, rng: random.Random, write: bool, reference: Reference) -> None:
    """What a user would do with an image; what it reads must be what the second reader reads."""
    import vhdx

    with vhdx.open(path, "r+" if write else "r", chain=False) as disk:
        theirs = reference.virtual_size, reference.block_size, reference.logical, reference.physical
        if facts(disk) != theirs:
            raise AssertionError(f"{facts(disk)} is not {theirs}")
        for _ in range(3):
            length = min(rng.choice([1, 512, 70000]), disk.size)
            offset = rng.randrange(disk.size - length + 1)
            if rng.random() < 0.5:
                offset = min(offset, rng.randrange(5 * MIB), disk.size - length)
            try:
                expected = reference.read(offset, length)
            except Refused:
                expected = None
            try:
                data = disk.pread(length, offset)
                if data != expected:
                    raise AssertionError(f"{length} bytes at {offset:#x} differ")
            except vhdx.MissingParentError:
                if expected is not None:
                    raise AssertionError("it is in this layer") from None
        disk.describe()
        at = 0
        for number, extent in enumerate(disk.extents()):
            if extent.offset != at or extent.length <= 0:
                raise AssertionError("extents with gaps")
            at += extent.length
            if number > 1000:
                break
        if write:
            try:
                disk.pwrite(b"w" * length, offset)
            except vhdx.MissingParentError:
                if not reference.has_parent:
                    raise
                return  # a part of a sector needs the rest of it
            if disk.pread(length, offset) != b"w" * length:
                raise AssertionError("a write did not stay")
    if write:
        with vhdx.open(path, chain=False) as disk:
            if disk.pread(length, offset) != b"w" * length:
                raise AssertionError("a write is gone after the close")


def second_opinion(data: bytes, size: int) -> Reference | str:
    """The second reader's image, or why it refuses."""
    whole = bytearray(data[:size]) + bytes(max(0, size - len(data)))
    try:
        return read_reference(whole)
    except Refused as error:
        return str(error)


ONLY_READ = ("reserved bits", "region tables disagree", "NUL character")
"""Of what is refused to a writer only."""


def evaluate(path: Path, data: bytes, size: int, rng: random.Random, write: bool) -> bool:
    """Whether it opened. Raises on a bug."""
    import vhdx

    try:
        theirs = second_opinion(data, size)
    except MemoryError:
        return False
    try:
        exercise(
            path, rng, write, theirs if isinstance(theirs, Reference) else Reference(bytearray())
        )
    except vhdx.UnsupportedError:
        if not isinstance(theirs, str) and not (write and theirs.has_parent):
            raise
        return False
    except vhdx.VhdxError as error:
        if error.reason in {"internal", "no_progress", "no_memory"}:
            raise
        if write and any(words in error.message for words in ONLY_READ):
            return evaluate(path, data, size, rng, False)  # what is only read must be read right
        no_log = not isinstance(theirs, str) and write and not theirs.has_log
        if not isinstance(theirs, str) and error.reason != "sector_bitmap" and not no_log:
            raise AssertionError("it is refused without need") from error
        return False
    except AssertionError:
        if isinstance(theirs, str):
            raise AssertionError(f"it opened in spite of: {theirs}") from None
        raise
    return True


def fuzz_open(seconds: float, seed: int) -> int:
    """Rounds done; raises on a bug."""
    rng = random.Random(seed)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="vhdx-fuzz-", dir=base))
    rounds, opened = 0, 0
    try:
        images = base_images(directory)
        path = directory / "case.vhdx"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            content, size = rng.choice(images)
            data = bytearray(content)
            mutate(data, rng)
            if rng.random() < 0.05:
                size = rng.choice([rng.randrange(6 * MIB), size + 512, size - MIB])
            size = max(0, size)
            with path.open("wb") as file:
                file.write(data[:size])
                file.truncate(size)
            write = rng.random() < 0.4
            before = None if write else (data[:size], path.stat().st_size, path.stat().st_blocks)
            began, blocks = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            opened += evaluate(path, data, size, rng, write)
            took = time.monotonic() - began
            if took > 5:
                raise AssertionError(f"it took {took:.1f} s")
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - blocks > 640 << 10:
                raise AssertionError("it took more than 640 MiB")
            if before is not None:
                with path.open("rb") as file:
                    now = file.read(len(data))
                if (now, path.stat().st_size, path.stat().st_blocks) != before:
                    raise AssertionError("reading changed the file")
            rounds += 1
    except BaseException:
        keep = Path(tempfile.gettempdir()) / f"vhdx-fuzz-open-{seed}.vhdx"
        if (directory / "case.vhdx").exists():
            shutil.copy(directory / "case.vhdx", keep)
            print(f"round {rounds} of seed {seed}; the image is {keep}", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"open: {rounds} images, {opened} of them opened")
    return rounds
