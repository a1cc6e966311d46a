# SPDX-License-Identifier: MIT
"""The log, check and repair: unusual images, damaged, with a second reader's opinion.

A check changes nothing, and says that there are no errors only where the second reader finds none and
an open succeeds. A repair never changes what the disk holds, leaves less to mend, and is taken back
to the last byte by an undo.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.opening import INTERESTING, base_images, evaluate, mutate, second_opinion
from tests.reference import ITEMS, Reference, Refused
from tests.unusual import MIB, generate, seal

if TYPE_CHECKING:
    import vhdx

MOST = 24 * MIB


def header_of(data: bytearray) -> tuple[int, int]:
    """Offset and length of the log, as a header says."""
    for at in (64 << 10, 128 << 10):
        if data[at : at + 4] == b"head":
            length, offset = struct.unpack_from("<IQ", data, at + 68)
            if offset + length <= len(data):
                return offset, length
    return MIB, MIB


def damage_log(data: bytearray, rng: random.Random) -> None:
    """Changes entries, most of them with right checksums afterwards."""
    base, length = header_of(data)
    starts = [
        base + at for at in range(0, length, 4096) if data[base + at : base + at + 4] == b"loge"
    ]
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not starts:
            break
        start = rng.choice(starts)
        fields = [(8, 4), (12, 4), (16, 8), (24, 4), (32, 8), (48, 8), (56, 8)]
        descriptor = 64 + 32 * rng.randrange(3)
        fields += [(descriptor + at, width) for at, width in ((0, 4), (8, 8), (16, 8), (24, 8))]
        fields += [(4096 * rng.randrange(1, 4) + at, 4) for at in (0, 4, 4092)]
        at, width = rng.choice(fields)
        at = min(start + at, len(data) - 8)
        old = int.from_bytes(data[at : at + width], "little")
        value = rng.choice(
            [*INTERESTING, old + 1, old - 1, old + 4096, old - 4096, old ^ 1, rng.getrandbits(64)]
            + [base, base + 4096] * 3
        )
        data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    if rng.random() < 0.9:
        for start in starts:
            (size,) = struct.unpack_from("<I", data, start + 8)
            if 64 <= size <= length and size % 4096 == 0:
                whole = bytearray(
                    (data[base : base + length] * 2)[start - base : start - base + size]
                )
                seal(whole)
                data[start + 4 : start + 8] = whole[4:8]


def renumber(data: bytearray, rng: random.Random) -> None:
    """One entry of the log gets another sequence number, everywhere where it stands."""
    base, length = header_of(data)
    log = data[base : base + length]
    starts = [at for at in range(0, length, 4096) if log[at : at + 4] == b"loge"]
    if not starts:
        return
    start = rng.choice(starts)
    size, _, number, count = struct.unpack_from("<IIQI", log, start + 8)
    if not 4096 <= size <= length - start or size % 4096 or count > 100:
        return
    number = max(1, number + rng.choice([-2, -1, 1, 2, 100])) & ((1 << 64) - 1)
    entry = bytearray(log[start : start + size])
    struct.pack_into("<Q", entry, 16, number)
    for at in range(64, 64 + 32 * count, 32):
        struct.pack_into("<Q", entry, at + 24, number)
    for at in range(4096, size, 4096):
        if entry[at : at + 4] == b"data":
            struct.pack_into("<I", entry, at + 4, number >> 32)
            struct.pack_into("<I", entry, at + 4092, number & 0xFFFFFFFF)
    data[base + start : base + start + size] = seal(entry)


def grow(data: bytearray, rng: random.Random) -> None:
    """The disk is said to be larger than its table."""
    name = ITEMS["size"][0]
    for start in range(MIB, len(data), MIB):
        if data[start : start + 8] != b"metadata":
            continue
        at = data.find(name, start, start + 65536)
        if at >= 0:
            where = start + struct.unpack_from("<I", data, at + 16)[0]
            value = rng.choice([1 << 37, 1 << 38, 1 << 40, 1 << 46, (1 << 46) + 4096])
            data[where : where + 8] = value.to_bytes(8, "little")


def lose_log(data: bytearray, rng: random.Random) -> None:
    """Headers without a log, or with one outside the file."""
    fields = rng.choice([(0, MIB), (MIB, len(data) // MIB * MIB + MIB), (0, 0)])
    for at in (64 << 10, 128 << 10):
        if data[at : at + 4] == b"head":
            struct.pack_into("<16s", data, at + 48, bytes(16))
            struct.pack_into("<IQ", data, at + 68, *fields)
            data[at : at + 4096] = seal(data[at : at + 4096])


def damage_table(data: bytearray, rng: random.Random) -> None:
    """Changes entries of the BAT, flags of regions and items, or one of two copies."""
    first = (192 << 10) + 16
    regions = [struct.unpack_from("<QI", data, first + at + 16) for at in range(0, 32 * 6, 32)]
    tables = [at for at, length in regions if length and at + length <= len(data)]
    what = rng.random()
    if what < 0.5 and tables:
        base = rng.choice(tables)
        at = base + 8 * rng.randrange(12)
        old = int.from_bytes(data[at : at + 8], "little")
        place = rng.randrange(40) * MIB
        value = rng.choice(
            [old ^ 1, old ^ 4, old & 7, old | MIB, place | 6, place | 7, place | 2, 7, 6]
        )
        data[at : at + 8] = (value & ((1 << 64) - 1)).to_bytes(8, "little")
    elif what < 0.65:
        at = rng.choice([64 << 10, 128 << 10, 192 << 10, 256 << 10])
        data[at : at + 64] = rng.randbytes(64)
    elif what < 0.8:  # a region that is not marked as required, in one or both copies
        slot = rng.randrange(3)
        for at in (192 << 10, 256 << 10)[: rng.choice([1, 2])]:
            data[at + 44 + 32 * slot] ^= 1
            table = bytearray(data[at : at + 65536])
            data[at : at + 65536] = seal(table)
    else:  # a log that is set, and not there
        for at in (64 << 10, 128 << 10)[: rng.choice([1, 2])]:
            data[at + 48 : at + 64] = rng.randbytes(16)
            data[at : at + 4096] = seal(bytearray(data[at : at + 4096]))


def cases(directory: Path) -> Callable[[random.Random], tuple[bytearray, int]]:
    """Gives an image, damaged or not, and the size of its file."""
    bases = base_images(directory)

    def case(rng: random.Random) -> tuple[bytearray, int]:
        if rng.random() < 0.4:
            content, size = rng.choice(bases)
            if size <= MOST:
                data = bytearray(content) + bytes(max(0, size - len(content)))
                mutate(data, rng)
                del data[size:]
                return data, size
        data = generate(rng.getrandbits(40)).data
        for _ in range(rng.choice([0, 1, 1, 2])):
            rng.choice([damage_log, damage_table, damage_table, grow, lose_log])(data, rng)
        if rng.random() < 0.05:
            del data[rng.choice([rng.randrange(len(data)), rng.randrange(MIB)]) :]
        return data, len(data)

    return case


def content_of(opinion: Reference | str) -> list[bytes | None] | None:
    """What the second reader finds, by 64 KiB; None where it refuses or cannot tell."""
    if isinstance(opinion, str) or opinion.virtual_size > MOST:
        return None
    size, step = opinion.virtual_size, 1 << 16
    try:
        return [opinion.read(at, min(step, size - at)) for at in range(0, size, step)]
    except Refused:
        return None


def opinion_of(data: bytes) -> Reference | str:
    try:
        return second_opinion(bytes(data), len(data))
    except MemoryError:
        return "too large"


def examine(path: Path, data: bytearray, rng: random.Random) -> bool:
    """Checks an image; whether it is clean."""
    import vhdx

    try:
        report = vhdx.check(path)
    except vhdx.UnsupportedError:
        if data[:8] == b"vhdxfile" and not isinstance(opinion_of(data), str):
            raise
        return False
    if path.read_bytes() != data:
        raise AssertionError("the check changed the file")
    for finding in report.findings:
        if not (finding.code and finding.message and finding.severity):
            raise AssertionError(f"it does not say what is wrong: {finding}")
    opinion = opinion_of(data)
    if report.errors:
        codes = {finding.code for finding in report.findings if finding.severity == "error"}
        if codes == {"sector_bitmap"}:
            return False  # nobody reads it as long as no block is partially present
        if opened(path, write=True) and content_of(opinion) is not None and opinion.has_log:
            raise AssertionError(f"all is well, and there are errors: {report.findings}")
        return False
    if isinstance(opinion, str) and opinion != "too large":
        raise AssertionError(f"it is clean in spite of: {opinion}")
    if not opened(path, write=rng.random() < 0.5):
        raise AssertionError("it is clean, and does not open")
    return True


def opened(path: Path, *, write: bool) -> bool:
    """Whether it opens, and all of it can be read."""
    import vhdx

    copy = path.with_name("copy.vhdx")
    shutil.copy(path, copy)
    try:
        with vhdx.open(copy, "r+" if write else "r", chain=False, force=True) as disk:
            for extent in disk.extents(0, min(disk.size, MOST)):
                if extent.state == "data" and extent.depth == 0:
                    disk.pread(min(extent.length, MOST), extent.offset)
    except vhdx.MissingParentError:
        return True
    except vhdx.VhdxError:
        return False
    return True


def has_log(data: bytes) -> bool:
    """Whether the current header says that there is a log to replay."""
    from vhdx.format import header

    copies = [
        header.parse_header(bytes(data[at : at + header.HEADER_SIZE]), slot)
        for slot, at in enumerate(header.HEADER_OFFSETS)
    ]
    return header.choose_header(copies[0], copies[1]).log_guid != header.NIL


def log_stays(report: vhdx.Report) -> bool:
    """Whether a repair must leave the log alone, because it may hold changes that matter."""
    logs = [each for each in report.findings if each.code.startswith("log_")]
    beside_others = report.errors > 1 and any(each.code == "log_empty" for each in logs)
    return beside_others or any(not each.repair for each in logs)


def mend(path: Path, data: bytearray, rng: random.Random) -> bool:
    """Repairs an image; whether something was repaired."""
    import vhdx

    kept = path.with_name(path.name + ".undo")
    kept.unlink(missing_ok=True)
    before = content_of(opinion_of(data))
    try:
        first = vhdx.check(path)
        report = vhdx.repair(path)
    except vhdx.UnsupportedError:
        if path.read_bytes() != data:
            raise AssertionError("what is no image was changed") from None
        return False
    if path.stat().st_size > 1 << 30:  # its log says so; too large to be compared here
        vhdx.undo(path)
        if path.read_bytes() != data:
            raise AssertionError("the undo does not bring back what there was")
        return True
    now = path.read_bytes()
    if not report.repaired and now != data and not any(f.repair for f in first.findings):
        raise AssertionError("nothing was to be repaired, and the file was changed")
    if report.errors > first.errors:
        raise AssertionError(f"{first.errors} errors became {report.errors}: {report.findings}")
    if now != data and has_log(data) and log_stays(first):
        raise AssertionError("an image whose log was not dealt with was changed")
    after = content_of(opinion_of(now))
    if before is not None and after != before:
        raise AssertionError("the repair changed what the disk holds")
    if not report.errors and after is None and opinion_of(now) != "too large":
        opinion = opinion_of(now)
        if isinstance(opinion, str):
            raise AssertionError(f"it is clean afterwards, in spite of: {opinion}")
    if [f for f in report.findings if f.repair and f in report.repaired]:
        raise AssertionError("it says that it mended what it did not")
    if now == data:
        return False
    if not kept.exists():
        raise AssertionError("it changed the file and kept nothing")
    if rng.random() < 0.2:  # a second repair has nothing to do
        kept.rename(path.with_name("kept"))
        vhdx.repair(path)
        if path.read_bytes() != now and not report.errors:
            raise AssertionError("a second repair changes the file again")
        path.write_bytes(now)
        kept.unlink(missing_ok=True)
        path.with_name("kept").rename(kept)
    vhdx.undo(path)
    if path.read_bytes() != data:
        raise AssertionError("the undo does not bring back what there was")
    return True


def run(name: str, seconds: float, seed: int, one: Callable) -> int:
    """Rounds done; raises on a bug, and keeps the image."""
    rng = random.Random(seed)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="vhdx-fuzz-", dir=base))
    rounds, counted = 0, 0
    try:
        case = cases(directory)
        path = directory / "case.vhdx"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if name == "log":
                data = generate(rng.getrandbits(40)).data
                if rng.random() < 0.85:
                    rng.choice([damage_log, damage_log, renumber])(data, rng)
            else:
                data, _ = case(rng)
            path.write_bytes(data)
            (directory / "before").write_bytes(data)
            began = time.monotonic()
            counted += one(path, data, rng)
            if time.monotonic() - began > 20:
                raise AssertionError("it took more than 20 s")
            rounds += 1
    except BaseException:
        keep = Path(tempfile.gettempdir()) / f"vhdx-fuzz-{name}-{seed}.vhdx"
        if (directory / "before").exists():
            shutil.copy(directory / "before", keep)
            print(f"round {rounds} of seed {seed}; the image is {keep}", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"{name}: {rounds} images, {counted} of them {COUNTED[name]}")
    return rounds


COUNTED = {"log": "opened", "check": "clean", "repair": "mended"}


def fuzz_log(seconds: float, seed: int) -> int:
    """Replays of damaged logs, in memory and into the file."""

    def one(path: Path, data: bytearray, rng: random.Random) -> bool:
        return evaluate(path, bytes(data), len(data), rng, rng.random() < 0.5)

    return run("log", seconds, seed, one)


def fuzz_check(seconds: float, seed: int) -> int:
    """Checks of damaged images."""
    return run("check", seconds, seed, examine)


def fuzz_repair(seconds: float, seed: int) -> int:
    """Repairs of damaged images, and undoes them."""
    return run("repair", seconds, seed, mend)
