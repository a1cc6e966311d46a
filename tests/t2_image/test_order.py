# SPDX-License-Identifier: MIT
"""Order of the engine's writes, and how many barriers they cost."""

from __future__ import annotations

import pytest

import vhdx
from tests.recording import Recorder, open_recorded
from vhdx.units import MIB

SIZE = 12 * MIB
BLOCK = 1 * MIB
SECTOR = 512
BAT = (3 * MIB, 4 * MIB)
LOG = (1 * MIB, 2 * MIB)
HEADERS = (64 << 10, 192 << 10)
PAYLOAD = 4 * MIB


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.vhdx"
    vhdx.create(path, SIZE, block_size=BLOCK)
    return path.read_bytes()


def region_of(event) -> str:
    for name, (start, end) in {"header": HEADERS, "log": LOG, "bat": BAT}.items():
        if event.kind in {"write", "zero"} and start <= event.offset < end:
            return name
    if event.kind in {"write", "zero"}:
        assert event.offset >= PAYLOAD
        return "data"
    return event.kind


def kinds(recorder) -> list[str]:
    """Regions of the events in order, neighbours of one kind once."""
    found: list[str] = []
    for event in recorder.events:
        name = region_of(event)
        if name != "trim" and (not found or found[-1] != name or name == "flush"):
            found.append(name)
    return found


def test_first_allocating_write_and_flush_come_in_order(empty):
    recorder = Recorder(empty)
    with open_recorded(recorder) as disk:
        disk.pwrite(b"x" * 4096, 5 * MIB)
        recorder.mark("written")
        disk.flush()
        recorder.mark("flushed")
    assert kinds(recorder) == [
        # the gate: new GUIDs, an empty log entry, and only then the LogGuid
        "header", "flush", "log", "flush", "header", "flush", "header",
        "resize", "data", "mark",
        # data, barrier, log, barrier, apply
        "flush", "log", "flush", "bat", "mark",
        # the close: applied durable, LogGuid away in both headers, only then shorter
        "flush", "flush", "header", "flush", "header", "resize", "flush",
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["overwrite", "zero", "trim", "allocate"])
def test_changes_after_the_first_come_in_order(empty, change):
    recorder = Recorder(empty)
    with open_recorded(recorder) as disk:
        disk.pwrite(b"x" * (2 * BLOCK), 0)
        disk.flush()
        recorder.events.clear()
        if change == "overwrite":
            disk.pwrite(b"y" * 4096, 512)
        elif change == "zero":
            disk.zero(0, BLOCK)
        elif change == "trim":
            disk.trim(0, BLOCK)
        else:
            disk.pwrite(b"z" * 4096, 4 * BLOCK)
        disk.flush()
        order = [name for name in kinds(recorder) if name != "resize"]
        trims = [i for i, event in enumerate(recorder.events) if event.kind == "trim"]
        applied = [i for i, event in enumerate(recorder.events) if region_of(event) == "bat"]
    expected = {
        "overwrite": ["data", "flush"],
        "zero": ["flush", "log", "flush", "bat"],
        "trim": ["flush", "log", "flush", "bat"],
        "allocate": ["data", "flush", "log", "flush", "bat"],
    }
    assert order == expected[change]
    if change in {"zero", "trim"}:
        assert len(trims) == 1
        assert trims[0] > applied[-1]  # released only when the BAT says so durably


def test_barriers_of_a_guest_flush_are_two_dirty_one_after_writes_and_none_of_nothing(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, SIZE, block_size=BLOCK)
    with vhdx.open(path, "r+") as disk:
        leaf = disk._image.engine.host.leaf
        disk.pwrite(b"x", 0)
        disk.flush()
        for block in range(1, 12):
            disk.pwrite(b"x", block * BLOCK)
        before = leaf.barriers
        disk.flush()
        assert leaf.barriers - before == 2  # however many blocks
        disk.pwrite(b"y", 0)
        disk.flush()
        assert leaf.barriers - before == 3
        disk.pwrite(b"z", 0, fua=True)
        assert leaf.barriers - before == 4
        disk.flush()
        disk.flush()
        assert leaf.barriers - before == 4  # nothing was written that is not durable
