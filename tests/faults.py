# SPDX-License-Identifier: MIT
"""Workloads in which one call of the file device fails: python -m tests.faults STORY STEP.

Runs with ``tests/c/fail.c`` preloaded. Each call of a workload fails once, in turn, in each way that
makes sense; every case runs in a fork, on an image of its own. Afterwards the image opens, each
sector holds what it may hold, and the checker finds no error.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import vhdx
from vhdx.units import MIB

SECTOR = 512
SIZE = 6 * MIB
EIO, ENOSPC, SHORT = 1, 2, 3
READ, WRITE, BARRIER, ALLOCATE, TRUNCATE, SEEK = range(1, 7)
ZERO = bytes(SECTOR)
MODES = {EIO: "EIO", ENOSPC: "ENOSPC", SHORT: "short"}
_SECONDS = 60


class Model:
    """What each sector may hold: now, and after the image was closed and opened again."""

    def __init__(self, content: bytes) -> None:
        self.now = [{content[at : at + SECTOR]} for at in range(0, len(content), SECTOR)]
        self.later = [set(each) for each in self.now]

    def change(self, do, offset: int, data: bytes, *, fua: bool = False) -> None:
        first = offset // SECTOR
        pieces = [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)]
        for i, piece in enumerate(pieces):
            self.later[first + i].add(piece)
        try:
            do()
        except BaseException:
            for i, piece in enumerate(pieces):
                self.now[first + i].add(piece)
            raise
        for i, piece in enumerate(pieces):
            self.now[first + i] = {piece}
            if fua:
                self.later[first + i] = {piece}

    def flushed(self) -> None:
        self.later = [set(each) for each in self.now]

    def resize(self, size: int) -> None:
        count = size // SECTOR
        for each in (self.now, self.later):
            del each[count:]
            each.extend({ZERO} for _ in range(count - len(each)))

    @staticmethod
    def check(expected: list[set[bytes]], content: bytes, when: str) -> None:
        for i in range(min(len(expected), len(content) // SECTOR)):
            found = content[i * SECTOR : (i + 1) * SECTOR]
            if found not in expected[i]:
                raise AssertionError(f"sector {i} holds {found[:8]!r} {when}")


class Story:
    """One run of a workload; failures that it is told of are what they should be."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.model = Model(content)
        self.failures: list[vhdx.VhdxError] = []
        self.barrier_failed = False
        self.sizes = {len(content)}

    def attempt(self, do, *arguments, **options):
        """Runs ``do``; a failure must be one of ours and say where."""
        try:
            return do(*arguments, **options)
        except vhdx.VhdxError as error:
            self.failures.append(error)
        if self.failures and (self.failures[-1].path is None or not self.failures[-1].message):
            raise AssertionError(f"it does not say what failed: {self.failures[-1]!r}")
        return None

    def write(self, disk, offset, value, length=4096, *, fua=False):
        data = bytes([value]) * length
        self.attempt(
            self.model.change, lambda: disk.pwrite(data, offset, fua=fua), offset, data, fua=fua
        )

    def blank(self, disk, block, *, trim=False):
        do = disk.trim if trim else disk.zero
        before = self.model.now[block * MIB // SECTOR : (block + 1) * MIB // SECTOR]
        self.attempt(self.model.change, lambda: do(block * MIB, MIB), block * MIB, bytes(MIB))
        if trim and self.path.stem == "fixed":  # a hint there: zeros or what there was
            for i, old in enumerate(before):
                self.model.now[block * MIB // SECTOR + i] |= old

    def flush(self, disk):
        before = len(self.failures)
        self.attempt(disk.flush)
        if len(self.failures) == before:
            self.model.flushed()
            return
        if fired() == BARRIER and mode() == EIO and not self.barrier_failed:
            self.barrier_failed = True
            try:
                disk.pwrite(b"late", 0)
            except vhdx.VhdxError as error:
                self.failures.append(error)
            else:
                raise AssertionError("it takes writes after a failed barrier")

    def look(self, disk):
        content = self.attempt(disk.pread, disk.size, 0)
        if content is not None:
            self.model.check(self.model.now, content, "while it is open")

    def resize(self, disk, size):
        self.sizes.add(size)
        before = len(self.failures)
        self.attempt(disk.resize, size, shrink=True, unsafe=True)
        if len(self.failures) == before:
            self.sizes = {size}
            self.model.resize(size)

    def close(self, disk):
        before = len(self.failures)
        self.attempt(disk.close)
        if len(self.failures) == before:
            self.model.flushed()


def _dynamic(story: Story) -> None:
    disk = story.attempt(vhdx.open, story.path, "r+")
    if disk is None:
        return
    for block in (0, 3, 1):
        story.write(disk, block * MIB + 1536, block + 1)
    story.flush(disk)
    story.look(disk)
    story.write(disk, 4 * MIB, 5, fua=True)
    story.write(disk, 1536, 6, 65536, fua=True)
    story.blank(disk, 3)
    story.blank(disk, 1, trim=True)
    story.write(disk, 5 * MIB + 512, 7)
    story.flush(disk)
    story.write(disk, 3 * MIB, 8)
    story.flush(disk)
    story.look(disk)
    story.close(disk)


def _structure(story: Story) -> None:
    disk = story.attempt(vhdx.open, story.path, "r+")
    if disk is None:
        return
    for block in range(5):
        story.write(disk, block * MIB, block + 1)
    story.flush(disk)
    story.resize(disk, SIZE + 3 * MIB + 512)
    story.write(disk, 3 * MIB, 9)
    story.blank(disk, 0, trim=True)
    story.flush(disk)
    story.attempt(disk.compact)
    story.look(disk)
    story.resize(disk, SIZE - 4096)
    story.attempt(disk.snapshot, story.path.with_name("checkpoint.vhdx"))
    story.write(disk, 2 * MIB + 512, 10, 512)
    story.look(disk)
    story.flush(disk)
    story.close(disk)


def _child(story: Story) -> None:
    disk = story.attempt(vhdx.open, story.path, "r+")
    if disk is None:
        return
    for i in range(4):
        story.write(disk, i * MIB + 1024 * i, i + 20, 512)
    story.flush(disk)
    story.write(disk, 2 * MIB, 30, MIB)
    story.blank(disk, 0)
    story.write(disk, MIB + 4096, 31, 1024)
    story.flush(disk)
    story.look(disk)
    story.close(disk)
    story.attempt(vhdx.merge, story.path)


def _replay(story: Story) -> None:
    disk = story.attempt(vhdx.open, story.path, "r+")
    if disk is None:
        return
    story.look(disk)
    story.write(disk, MIB, 40)
    story.close(disk)


def _content(path: Path) -> bytes:
    with vhdx.open(path) as disk:
        return disk.pread(disk.size, 0)


def _made(story: Story) -> None:
    """Create and convert: nothing, or all of it."""
    for name, make in (
        ("made-new.vhdx", lambda path: vhdx.create(path, SIZE, block_size=MIB)),
        ("made-fixed.vhdx", lambda path: vhdx.create(path, SIZE, block_size=MIB, type="fixed")),
        ("made-new.vhd", lambda path: vhdx.create(path, SIZE)),
        ("made-copy.vhdx", lambda path: vhdx.convert(story.path, path, block_size=MIB)),
        ("made-copy.raw", lambda path: vhdx.convert(story.path, path)),
        ("made-child.vhdx", lambda path: vhdx.create(path, parent=story.path)),
    ):
        path = story.path.with_name(name)
        before = len(story.failures)
        story.attempt(make, path)
        made = len(story.failures) == before
        if made != path.exists() and not (fired() == BARRIER and path.exists()):
            raise AssertionError(f"{name}: made {made}, there {path.exists()}")
        left = [each for each in os.listdir(path.parent) if each.endswith(".partial")]
        assert not left, left
        if path.exists() and "copy" in name:
            found = story.attempt(_content, path) or _content(path)  # a call fails only once
            story.model.check(story.model.now, found, f"in {name}")


STORIES = {
    "dynamic": (_dynamic, "empty.vhdx"),
    "fixed": (_dynamic, "fixed.vhdx"),
    "vhd": (_dynamic, "empty.vhd"),
    "structure": (_structure, "empty.vhdx"),
    "child": (_child, "child.vhdx"),
    "replay": (_replay, "dirty.vhdx"),
    "made": (_made, "parent.vhdx"),
}

_shim = ctypes.CDLL(None)
_mode = 0


def fired() -> int:
    """The kind of call that failed, 0 when none did yet."""
    return _shim.fail_fired()


def mode() -> int:
    """How the call fails."""
    return _mode


def prepare(base: Path) -> dict[str, bytes]:
    """The images that stories begin with, and the content of each."""
    vhdx.create(base / "empty.vhdx", SIZE, block_size=MIB)
    vhdx.create(base / "fixed.vhdx", SIZE, block_size=MIB, type="fixed")
    vhdx.create(base / "empty.vhd", SIZE, block_size=MIB)
    vhdx.create(base / "parent.vhdx", SIZE, block_size=MIB)
    with vhdx.open(base / "parent.vhdx", "r+") as disk:
        for block in range(5):
            disk.pwrite(bytes([60 + block]) * 8192, block * MIB)
    vhdx.create(base / "child.vhdx", parent=base / "parent.vhdx", block_size=MIB)
    shutil.copy(base / "empty.vhdx", base / "dirty.vhdx")
    disk = vhdx.open(base / "dirty.vhdx", "r+")
    disk.pwrite(b"d" * 4096, 2 * MIB)
    disk.flush()
    data = (base / "dirty.vhdx").read_bytes()
    disk.close()
    (base / "dirty.vhdx").write_bytes(data)
    return {path.name: _content(path) for path in base.iterdir()}


def run(name: str, base: Path, contents: dict[str, bytes], at: int, how: int) -> tuple[int, int]:
    """One case; returns the calls that it made, and the kind that failed."""
    global _mode
    workload, image = STORIES[name]
    with tempfile.TemporaryDirectory(dir=base.parent) as work:
        for each in base.iterdir():
            shutil.copy(each, work)
        story = Story(Path(work) / image, contents[image])
        _mode = how
        _shim.fail_arm(at, how)
        workload(story)
        calls, kind = _shim.fail_calls(), fired()
        _shim.fail_arm(0, 0)
        if name != "made":
            settle(story)
        if at == 0:
            assert not story.failures, story.failures
        if kind and how == SHORT:
            assert not story.failures, f"a short call or EINTR is no failure: {story.failures}"
        return calls, kind


def settle(story: Story) -> None:
    """The image is opened again, compared, written and checked."""
    with vhdx.open(story.path, "r+", force=True) as disk:
        assert disk.size in story.sizes, f"it has {disk.size} bytes, not {story.sizes}"
        story.model.check(story.model.later, disk.pread(disk.size, 0), "after it was opened again")
        disk.pwrite(b"after", disk.size - 5)
        disk.flush()
    with vhdx.open(story.path) as disk:
        assert disk.pread(5, disk.size - 5) == b"after"
    if story.path.suffix == ".vhdx":
        report = vhdx.check(story.path)
        assert report.errors == 0, report.findings


def forked(name: str, base: Path, contents: dict[str, bytes], at: int, how: int) -> tuple[int, int]:
    """Runs a case in a child; exits of the child that are no success end everything."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(_SECONDS)
            calls, kind = run(name, base, contents, at, how)
            os.write(writer, f"{calls} {kind}".encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    answer = os.read(reader, 64).split()
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        sys.exit(f"{name}: call {at} fails with {MODES.get(how)}: the case ended with {status}")
    return int(answer[0]), int(answer[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("story", choices=STORIES)
    parser.add_argument("step", type=int, help="every how many calls one fails")
    arguments = parser.parse_args()
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as work:
        base = Path(work) / "base"
        base.mkdir()
        pid = os.fork()  # the pool's threads stay there
        if pid == 0:
            contents = prepare(base)
            for name, content in contents.items():
                (Path(work) / f"{name}.content").write_bytes(content)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit("the images cannot be prepared")
        contents = {p.stem: p.read_bytes() for p in Path(work).glob("*.content")}
        total = forked(arguments.story, base, contents, 0, 0)[0]
        cases = 0
        for at in range(1, total + 1, arguments.step):
            for how in MODES:
                kind = forked(arguments.story, base, contents, at, how)[1]
                cases += kind != 0
        print(f"{arguments.story}: {total} calls, {cases} cases")


if __name__ == "__main__":
    main()
