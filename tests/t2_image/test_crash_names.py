# SPDX-License-Identifier: MIT
"""Crash states of what changes names: create, convert, snapshot, merge, repair, undo."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import vhdx
from tests import memory_place
from tests.images import edit, edit_headers, read
from tests.namespace import Directory, written
from vhdx import place
from vhdx.format import header
from vhdx.image.vhd import image as vhd_image
from vhdx.image.vhdx import allocator
from vhdx.units import MIB

SIZE = 4 * MIB


@pytest.fixture(autouse=True)
def small_grants(monkeypatch):
    monkeypatch.setattr(allocator, "_FIRST_GRANT", 2 * MIB)
    monkeypatch.setattr(allocator, "_LARGEST_GRANT", 2 * MIB)
    monkeypatch.setattr(vhd_image, "_GRANT_BYTES", 2 * MIB)


@dataclass
class Story:
    """A workload on a directory, and what must be there after a crash in it.

    Attributes:
        path: of the directory.
        rng: chooses.
        old, new: what the disk may hold, and what it holds when all is done.
        kept: what else a check needs.
    """

    path: Path
    rng: random.Random
    old: bytes = b""
    new: bytes = b""
    kept: dict = field(default_factory=dict)

    @property
    def disk(self) -> Path:
        return self.path / "disk.vhdx"


def content(path: Path, *, write: bool = False) -> bytes:
    with vhdx.open(path, "r+" if write else "r", force=write) as disk:
        return disk.pread(disk.size, 0)


def fill(story: Story, path: Path, blocks=(0, 2)) -> None:
    with vhdx.open(path, "r+") as disk:
        for block in blocks:
            length = story.rng.choice([512, 4096, 70000])
            at = block * MIB + story.rng.randrange((MIB - length) // 512) * 512
            disk.pwrite(story.rng.randbytes(64) * (length // 64), at)


# ---- workloads: what is there before, what is done, and what is right afterwards ----


def prepare_plain(story: Story) -> None:
    vhdx.create(story.disk, SIZE, block_size=MIB)
    fill(story, story.disk)
    story.old = story.new = content(story.disk)


def prepare_child(story: Story) -> None:
    base = story.path / "base.vhdx"
    vhdx.create(base, SIZE, block_size=MIB)
    fill(story, base, (0, 1))
    vhdx.create(story.disk, parent=base, block_size=MIB)
    fill(story, story.disk, (1, 3))
    story.old = story.new = content(story.disk)


def create(story: Story) -> None:
    kind = story.rng.choice(["dynamic", "fixed"])
    vhdx.create(story.path / "new.vhdx", SIZE, block_size=MIB, type=kind)
    vhdx.create(story.path / "new.vhd", SIZE)
    vhdx.create(story.path / "child.vhdx", parent=story.disk, block_size=MIB)


def after_create(story: Story, path: Path) -> None:
    for name, expected in (
        ("new.vhdx", bytes(SIZE)),
        ("new.vhd", bytes(SIZE)),
        ("child.vhdx", story.old),
    ):
        if (path / name).exists():
            assert content(path / name, write=True) == expected, name


def convert(story: Story) -> None:
    for name in ("copy.raw", "copy.vhdx", "copy.vhd"):
        vhdx.convert(story.disk, story.path / name)
    vhdx.convert(story.path / "copy.raw", story.path / "copy.vhdx", block_size=MIB, force=True)


def after_convert(story: Story, path: Path) -> None:
    for name in ("copy.raw", "copy.vhdx", "copy.vhd"):
        if (path / name).exists():
            assert content(path / name, write=True) == story.old, name


def snapshot(story: Story) -> None:
    with vhdx.open(story.disk, "r+") as disk:
        for number in range(2):
            disk.snapshot(story.path / f"checkpoint{number}.vhdx")
            disk.flush()


def after_snapshot(story: Story, path: Path) -> None:
    assert content(path / "disk.vhdx", write=True) == story.old
    for each in path.glob("checkpoint*"):
        assert content(each) == story.old, each.name


def merge(story: Story) -> None:
    vhdx.merge(story.disk)


def after_merge(story: Story, path: Path) -> None:
    assert content(path / "disk.vhdx", write=True) == story.old
    if (path / "base.vhdx").exists():
        vhdx.merge(path / "disk.vhdx", force=True)  # done again, it comes to its end
        assert content(path / "disk.vhdx", write=True) == story.old


def merge_down(story: Story) -> None:
    vhdx.merge(story.disk, keep_parent_name=True)


def after_merge_down(story: Story, path: Path) -> None:
    if (path / "disk.vhdx").exists():
        assert content(path / "disk.vhdx") == story.old
        vhdx.merge(path / "disk.vhdx", keep_parent_name=True)  # done again, it comes to its end
    assert content(path / "base.vhdx", write=True) == story.old


def prepare_damaged(story: Story) -> None:
    prepare_plain(story)
    edit(story.disk, 3 * MIB + 8, b"\2\0\x70\0")  # an offset that a ZERO entry must not have
    edit_headers(story.disk, lambda h: h)
    edit(story.disk, header.HEADER_OFFSETS[story.rng.randrange(2)], b"gone")
    edit(story.disk, 192 << 10, b"gone")
    story.old = story.new = content(story.disk)
    story.kept["before"] = story.disk.read_bytes()
    assert read(story.disk, 0, 8) == b"vhdxfile"


def repair(story: Story) -> None:
    assert vhdx.repair(story.disk).repaired


def after_repair(story: Story, path: Path) -> None:
    disk = path / "disk.vhdx"
    before = disk.read_bytes()
    assert content(disk) == story.old
    if before != story.kept["before"]:
        vhdx.undo(disk)
        assert disk.read_bytes() == story.kept["before"]
    elif (path / "disk.vhdx.undo").exists():
        report = vhdx.repair(disk)  # the undo file of a repair that changed nothing is no hindrance
        assert report.errors == 0
        assert report.repaired
    assert content(disk, write=True) == story.old


def prepare_repaired(story: Story) -> None:
    prepare_damaged(story)
    repair(story)
    story.kept["repaired"] = story.disk.read_bytes()


def undo(story: Story) -> None:
    vhdx.undo(story.disk)


def after_undo(story: Story, path: Path) -> None:
    disk = path / "disk.vhdx"
    if (path / "disk.vhdx.undo").exists() or list(path.glob("*.active")):
        vhdx.undo(disk)
    assert disk.read_bytes() == story.kept["before"]


STORIES: dict[str, tuple[Callable, Callable, Callable]] = {
    "create": (prepare_plain, create, after_create),
    "convert": (prepare_plain, convert, after_convert),
    "snapshot": (prepare_plain, snapshot, after_snapshot),
    "snapshot of a child": (prepare_child, snapshot, after_snapshot),
    "merge": (prepare_child, merge, after_merge),
    "merge under the parent's name": (prepare_child, merge_down, after_merge_down),
    "repair": (prepare_damaged, repair, after_repair),
    "undo": (prepare_repaired, undo, after_undo),
}


def enumerate_states(tmp: Path, name: str, seed: int, subsets: int, every: int = 1) -> int:
    prepare, work, after = STORIES[name]
    path = tmp / "disks"
    path.mkdir(parents=True)
    story = Story(path, random.Random(seed))
    prepare(story)
    directory = Directory(path)
    with directory.recorded():
        work(story)
    written(path, {p.name: p.read_bytes() for p in path.iterdir()})  # the last state as it is
    after(story, path)
    count = 0
    for number, files in directory.states(random.Random(seed), subsets):
        count += 1
        if count % every:
            continue
        written(path, files)  # under the same path: names in locators stay true
        try:
            after(story, path)
        except Exception as error:
            raise AssertionError(
                f"{name}, seed {seed}, state {count}, after change {number}: "
                f"{directory.changes[number - 1]!r:.200}; {sorted(files)}"
            ) from error
    return count


def enumerate_in_memory(tmp: Path, name: str, seed: int, subsets: int, every: int = 1) -> int:
    """The same in a place in memory; what is there before is prepared on the host."""
    prepare, work, after = STORIES[name]
    host = tmp / "disks"
    host.mkdir(parents=True)
    story = Story(host, random.Random(seed))
    prepare(story)
    prepared = {p.name: p.read_bytes() for p in host.iterdir()}
    directory = f"{memory_place.SCHEME}:/disks"
    story.path = memory_place.PlacePath(directory)

    def hold(files: dict[str, bytes]) -> memory_place.MemoryPlace:
        made = memory_place.MemoryPlace(directory, files)
        place.register(memory_place.SCHEME, made)
        return made

    there = hold(prepared)
    changes = there.recording()
    work(story)
    hold(there.content())
    after(story, story.path)
    count = 0
    for number, files in changes.states(random.Random(seed), subsets):
        count += 1
        if count % every:
            continue
        hold(files)
        try:
            after(story, story.path)
        except Exception as error:
            raise AssertionError(
                f"{name}, seed {seed}, state {count}, after change {number}: "
                f"{changes.changes[number - 1]!r:.200}; {sorted(files)}"
            ) from error
    return count


@pytest.mark.parametrize("name", STORIES)
def test_crash_states_of_names_in_another_place(fast_path, name):
    every = 4 if name == "convert" else 1
    assert enumerate_in_memory(fast_path, name, 1, subsets=1, every=every) > 3


@pytest.mark.soak
@pytest.mark.parametrize("name", STORIES)
def test_crash_states_of_names_in_another_place_long(fast_path, name):
    count = seed = 0
    while count < 3000:
        seed += 1
        count += enumerate_in_memory(fast_path / str(seed), name, seed, subsets=12)
    print(f"{name}: {count} states of {seed} runs")


@pytest.mark.parametrize("name", STORIES)
def test_crash_states_of_names(fast_path, name):
    every = 8 if name == "convert" else 2
    assert enumerate_states(fast_path, name, 1, subsets=1, every=every) > 5


@pytest.mark.soak
@pytest.mark.parametrize("name", STORIES)
def test_crash_states_of_names_long(fast_path, name):
    count = seed = 0
    while count < 3000:
        seed += 1
        count += enumerate_states(fast_path / str(seed), name, seed, subsets=12)
    print(f"{name}: {count} states of {seed} runs")
