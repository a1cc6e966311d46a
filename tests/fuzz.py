# SPDX-License-Identifier: MIT
"""Fuzzers: ``python -m tests.fuzz open|handshake|nbd|all|planted --seconds 600 [--seed N]``.

open       structures of real images, mutated with their checksums put right, opened and read;
           anything but a VhdxError, a hang or a memory bomb is a bug
handshake  option streams into the handshake; anything but a ProtocolError is a bug
nbd        request streams into the transmission phase, in C under sanitizers
planted    ten bugs planted into each of the three, one at a time: each must be found
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


# ---- the open path ----


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
            {"block_size": 2 * MIB, "kind": "fixed"},
            {"block_size": 256 * MIB},
        )
    ):
        path = directory / f"{number}.vhdx"
        vhdx.create(path, 8 * MIB, **options)
        with vhdx.open(path, "r+") as disk:
            disk.pwrite(b"x" * 4096, 3 * MIB)
            disk.zero(0, MIB)
            disk.flush()
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


INTERESTING = [0, 1, 2, 3, 5, 6, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 20, (1 << 20) - 1, 1 << 31]
INTERESTING += [(1 << 32) - 1, 1 << 44, 1 << 48, 1 << 62, 1 << 63, (1 << 64) - 1, (1 << 64) - MIB]
PLACES = [(0, 700), (65536, 80), (131072, 80), (196608, 120), (262144, 120), (MIB, 4200)]
PLACES += [(MIB + 4096, 8192), (2 * MIB, 300), (2 * MIB + 65536, 1100), (3 * MIB, 80)]


def mutate(data: bytearray, rng: random.Random) -> None:
    """Changes fields, then puts checksums right (most of the time)."""
    from vhdx.format import header, region
    from vhdx.format.checksum import seal

    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        start, length = rng.choice(PLACES)
        at = start + rng.randrange(length)
        width = rng.choice([1, 2, 4, 8])
        if rng.random() < 0.6:
            at -= at % width
        choice = rng.random()
        if choice < 0.5:
            value = rng.choice(INTERESTING)
        elif choice < 0.75:
            old = int.from_bytes(data[at : at + width], "little")
            value = old + rng.choice([-1, 1, 8, -8, MIB, -MIB, 1 << 20 << 3])
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


def exercise(path: Path, rng: random.Random, write: bool) -> None:
    """What a user would do with an image."""
    import vhdx

    with vhdx.open(path, "r+" if write else "r", chain=False) as disk:
        for _ in range(3):
            length = min(rng.choice([1, 512, 70000]), disk.size)
            offset = rng.randrange(disk.size - length + 1)
            try:
                data = disk.pread(length, offset)
                if len(data) != length:
                    raise AssertionError("short read")
                if write:
                    disk.pwrite(b"w" * length, offset)
                    if disk.pread(length, offset) != b"w" * length:
                        raise AssertionError("a write did not stay")
            except vhdx.MissingParentError:
                pass
        at = 0
        for number, extent in enumerate(disk.extents()):
            if extent.offset != at or extent.length <= 0:
                raise AssertionError("extents with gaps")
            at += extent.length
            if number > 1000:
                break
        disk.describe()
    if write:
        with vhdx.open(path) as disk:
            disk.pread(1, 0)


def fuzz_open(seconds: float, seed: int) -> int:
    """Rounds done; raises on a bug."""
    import vhdx

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
            with path.open("wb") as file:
                file.write(data)
                file.truncate(max(0, size))
            write = rng.random() < 0.4
            before = None if write else path.read_bytes()
            began, blocks = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                exercise(path, rng, write)
                opened += 1
            except vhdx.VhdxError as error:
                if error.reason in {"internal", "no_progress", "no_memory"}:
                    raise
            took = time.monotonic() - began
            if took > 5:
                raise AssertionError(f"it took {took:.1f} s")
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - blocks > 512 << 10:
                raise AssertionError("it took more than 512 MiB")
            if before is not None and path.read_bytes() != before:
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


# ---- the handshake ----


def option_stream(rng: random.Random) -> bytes:
    """A stream of options, good and bad."""
    stream = struct.pack(">I", rng.choice([3, 3, 3, 1, 0, 7, rng.getrandbits(32)]))
    for _ in range(rng.randrange(40)):
        number = rng.choice([*range(13), rng.getrandbits(32)])
        name = rng.choice([b"disk", b"", b"other", b"x" * rng.randrange(5000), rng.randbytes(9)])
        data = b""
        if number in {6, 7}:
            wishes = [rng.randrange(6) for _ in range(rng.randrange(4))]
            data = struct.pack(">I", len(name)) + name
            data += struct.pack(f">H{len(wishes)}H", len(wishes), *wishes)
        elif number in {9, 10}:
            queries = [rng.choice([b"base:allocation", b"base:", rng.randbytes(5)])] * rng.randrange(
                3
            )
            data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
            for query in queries:
                data += struct.pack(">I", len(query)) + query
        elif number == 1:
            data = name
        elif rng.random() < 0.2:
            data = rng.randbytes(rng.randrange(300))
        if rng.random() < 0.15 and data:
            at = rng.randrange(len(data))
            data = data[:at] + rng.choice([b"", b"\xff\xff\xff\xff", b"\0"]) + data[at + 1 :]
        length = len(data) if rng.random() < 0.97 else rng.getrandbits(rng.choice([8, 17, 32]))
        stream += b"IHAVEOPT" + struct.pack(">II", number, length) + data
    return stream


def check_replies(answer: bytes) -> None:
    """The answers of the option phase are well formed."""
    while answer:
        if len(answer) < 20:
            raise AssertionError("a piece of a reply")
        magic, _, kind, length = struct.unpack_from(">QIII", answer)
        if magic != 0x3E889045565A9 or len(answer) < 20 + length or length > 8300:
            raise AssertionError("a malformed reply")
        if kind not in {1, 2, 3, 4} and not kind >> 31:
            raise AssertionError("a reply of an unknown type")
        answer = answer[20 + length :]


def fuzz_handshake(seconds: float, seed: int) -> int:
    """Rounds done; raises on a bug."""
    from vhdx.errors import ProtocolError
    from vhdx.nbd import ExportTerms, Handshake

    rng, rounds, done = random.Random(seed), 0, 0
    exports = {
        "disk": ExportTerms("disk", "d", 1 << 30, False),
        "other": ExportTerms("other", "", 1, True),
    }
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        machine = Handshake(exports.get, lambda: exports)
        stream = option_stream(rng)
        size = rng.choice([1, 7, 100, len(stream) + 1])
        answer, old = bytearray(), False
        sent = 0
        try:
            for at in range(0, len(stream), size):
                sent = at + size
                got = machine.receive(stream[at : at + size])
                if machine.negotiated is not None and not got.endswith(struct.pack(">III", 7, 1, 0)):
                    old = True  # EXPORT_NAME: its answer is no option reply
                else:
                    answer += got
                if len(machine._input) > (64 << 10) + 16 + size:
                    raise AssertionError("it hoards what it receives")
                if machine.finished or machine.negotiated is not None:
                    break
            else:
                if len(stream) > 20 and machine._flags is None:
                    raise AssertionError("it did not take the flags")
        except ProtocolError:
            pass
        if not old:
            check_replies(bytes(answer))
        if machine.negotiated is not None:
            done += 1
            early = machine.negotiated.early
            if early != stream[sent - len(early) : sent] and early != stream[-len(early) :]:
                raise AssertionError("bytes after the handshake were lost or changed")
            if machine.negotiated.context_id is not None and not machine.negotiated.structured:
                raise AssertionError("a context without structured replies")
            if machine.negotiated.export not in exports:
                raise AssertionError("an export that is not there")
        if machine._options > machine.most_options + 1:
            raise AssertionError("too many options were answered")
        rounds += 1
    print(f"handshake: {rounds} streams, {done} of them to the end")
    return rounds


# ---- the transmission phase ----


def build_nbd(source: Path, target: Path) -> Path:
    """The fuzzer of the transmission phase, under sanitizers."""
    program = target / "fuzz_nbd"
    command = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fsanitize=address,undefined"]
    command += ["-fno-sanitize-recover=all", f"-I{source}", f"-I{ROOT / 'tests' / 'c'}"]
    command += [*map(str, sorted(source.glob("*.c"))), str(ROOT / "tests" / "c" / "fuzz_nbd.c")]
    subprocess.run([*command, "-o", str(program), "-lpthread"], check=True)
    return program


def fuzz_nbd(seconds: float, seed: int) -> None:
    """Raises on a bug."""
    with tempfile.TemporaryDirectory() as directory:
        program = build_nbd(ROOT / "csrc", Path(directory))
        subprocess.run([program, str(int(seconds)), str(seed)], check=True)


# ---- planted bugs ----

# File, text, and what a tired programmer might have written instead.
PLANTED: dict[str, list[tuple[str, str, str]]] = {
    "open": [
        ("vhdx/format/header.py", "data[:4] != b\"head\" or not verify(data)", "data[:4] != b\"head\""),
        ("vhdx/format/region.py", "if count > _MOST_ENTRIES:\n        return None", "pass"),
        ("vhdx/format/metadata.py", "or count > _MOST_ENTRIES", ""),
        ("vhdx/format/metadata.py", "if len(data) != struct.calcsize(layout):", "if False:"),
        ("vhdx/format/metadata.py", "size == 0 or size > LARGEST_DISK or size % logical", "size % 512"),
        ("vhdx/format/metadata.py", "if not _power_of_two(block_size, MIB, 256 * MIB):", "if False:"),
        ("vhdx/format/locator.py", "at == 0 or length == 0 or at + length > len(data)", "False"),
        ("vhdx/format/log.py", "        or length > len(log)\n", "        or length > 1 << 40\n"),
        ("vhdx/image/structure.py", "if geometry.entries * 8 > bat.length:", "if False:"),
        ("vhdx/image/allocation.py", "bad = bad_state | bad_reserved | bad_offset", "bad = bad_state"),
    ],
    "handshake": [
        ("vhdx/nbd/handshake.py", "if length > self.option_bytes:", "if length > 1 << 40:"),
        ("vhdx/nbd/handshake.py", "if self._options > self.most_options:", "if False:"),
        ("vhdx/nbd/handshake.py", "if length <= len(data) - 6 and length <= _LONGEST_STRING:", "if True:"),
        ("vhdx/nbd/handshake.py", "if len(data) - at < 4:\n            return None", "pass"),
        ("vhdx/nbd/handshake.py", "if name is None or len(data) - name[1] < 4:", "if name is None:"),
        ("vhdx/nbd/handshake.py", "except UnicodeDecodeError:", "except KeyError:"),
        ("vhdx/nbd/handshake.py", "if len(data) >= 6:", "if True:"),
        ("vhdx/nbd/handshake.py", "if terms is None:\n            return _refuse(option, ERR_UNKNOWN", "if False:\n            return _refuse(option, ERR_UNKNOWN"),
        ("vhdx/nbd/handshake.py", "self._structured and self._contexts.allocation and", "self._contexts.allocation or"),
        ("vhdx/nbd/handshake.py", "bytes(self._input)\n        )\n        self._input.clear()", "b\"\"\n        )\n        self._input.clear()"),
    ],
    "nbd": [
        ("nbd_wire.c", "request->offset > terms->size || request->length > terms->size - request->offset", "request->offset + request->length > terms->size"),
        ("nbd_wire.c", "return outside ? NBD_EINVAL : NBD_OK;\n    case NBD_WRITE:", "return NBD_OK;\n    case NBD_WRITE:"),
        ("nbd_wire.c", "nbd_put_chunk(out, last, NBD_CHUNK_HOLE, cookie, 12)", "nbd_put_chunk(out, last, NBD_CHUNK_HOLE, cookie, 8)"),
        ("nbd_wire.c", "!terms->block_status || request->length == 0", "!terms->block_status"),
        ("nbd.c", "if (wire->length <= present && write_inline(c, wire, payload)) {\n        c->begin += wire->length;", "if (wire->length <= present && write_inline(c, wire, payload)) {\n        c->begin += wire->length + 1;"),
        ("nbd.c", "size_t part = present < wire->length ? present : wire->length;", "size_t part = present;"),
        ("nbd.c", "wire->length <= INLINE_READ && read_inline", "read_inline"),
        ("nbd.c", "reply_status(c, nbd_error_of(request.result, wire), wire);\n        return true;\n    }\n    if (request.extent_count", "reply_status(c, NBD_OK, wire);\n        return true;\n    }\n    if (request.extent_count"),
        ("nbd.c", "bool last = stop == length;", "bool last = true;"),
        ("nbd.c", "    c->discard = nbd_payload_of(wire);", "    c->discard = 0;"),
    ],
}  # fmt: skip


def planted_trees(kind: str) -> Iterator[tuple[str, Path]]:
    """A copy of the sources for each planted bug."""
    for file, old, new in PLANTED[kind]:
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name)
            if kind == "nbd":
                shutil.copytree(ROOT / "csrc", tree / "csrc")
                path = tree / "csrc" / file
            else:
                for part in ("vhdx", "tests"):
                    shutil.copytree(ROOT / part, tree / part)
                path = tree / file
            text = path.read_text()
            if text.count(old) < 1:
                raise AssertionError(f"{file} has no {old!r} any more: renew the planted bugs")
            path.write_text(text.replace(old, new, 1))
            yield f"{file}: {old.splitlines()[0].strip()[:60]}", tree


def find_planted(kind: str, seconds: float) -> list[str]:
    """The planted bugs that were not found."""
    missed = []
    for what, tree in planted_trees(kind):
        began = time.monotonic()
        if kind == "nbd":
            program = build_nbd(tree / "csrc", tree)
            command = [str(program), str(int(seconds)), "1"]
        else:
            command = [sys.executable, "-m", "tests.fuzz", kind, "--seconds", str(seconds)]
        result = subprocess.run(
            command, cwd=tree, capture_output=True, env=os.environ | {"PYTHONPATH": str(tree)}
        )
        found = result.returncode != 0
        print(
            f"{'found' if found else 'MISSED'} in {time.monotonic() - began:5.1f} s  {what}",
            flush=True,
        )
        if not found:
            missed.append(what)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("what", choices=["open", "handshake", "nbd", "all", "planted"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(PLANTED))
    arguments = parser.parse_args()
    if arguments.what == "planted":
        kinds = [arguments.only] if arguments.only else list(PLANTED)
        missed = [each for kind in kinds for each in find_planted(kind, arguments.seconds)]
        return 1 if missed else 0
    run = {"open": fuzz_open, "handshake": fuzz_handshake, "nbd": fuzz_nbd}
    for name in run if arguments.what == "all" else [arguments.what]:
        run[name](arguments.seconds, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
