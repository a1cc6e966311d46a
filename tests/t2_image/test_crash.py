# SPDX-License-Identifier: MIT
"""Order of the engine's writes, and every crash state of an allocating workload."""

from __future__ import annotations

import random

import pytest

import vhdx
from tests.recording import Recorder, crash_states, open_recorded
from vhdx.errors import VhdxError
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


def test_barriers_of_a_guest_flush_are_two_dirty_and_one_clean(fast_path):
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
        assert leaf.barriers - before == 6


class Model:
    """What each sector may hold after a crash at a moment: its content at the last flush, or any
    content that it got since."""

    def __init__(self) -> None:
        self.now = bytearray(SIZE)
        self.flushed = bytearray(SIZE)
        self.since: dict[int, list[bytes]] = {}
        self.history: list[tuple[int, bytes, dict[int, list[bytes]]]] = []

    def change(self, offset: int, data: bytes) -> None:
        self.now[offset : offset + len(data)] = data
        for at in range(offset // SECTOR * SECTOR, offset + len(data), SECTOR):
            self.since.setdefault(at, []).append(bytes(self.now[at : at + SECTOR]))

    def flush(self) -> None:
        self.flushed[:] = self.now
        self.since = {}

    def snapshot(self, events: int) -> None:
        copied = {at: list(values) for at, values in self.since.items()}
        self.history.append((events, bytes(self.flushed), copied))


def workload(recorder: Recorder, model: Model, rng: random.Random, steps: int) -> None:
    """Allocating writes, overwrites, trims, zeroes, reuse of space and flushes."""
    disk = open_recorded(recorder)
    model.snapshot(0)
    for step in range(steps):
        offset = rng.randrange(SIZE // SECTOR) * SECTOR
        length = min(rng.choice([512, 4096, 16384]), SIZE - offset)
        choice = rng.randrange(10)
        # Until it has returned, the change may be there or not: both snapshots allow it.
        if choice < 6:
            data = bytes([step % 255 + 1]) * length
            model.change(offset, data)
            model.snapshot(len(recorder.events))
            disk.pwrite(data, offset)
        elif choice < 8:
            block = offset // BLOCK * BLOCK
            model.change(block, bytes(BLOCK))
            model.snapshot(len(recorder.events))
            (disk.zero if choice == 6 else disk.trim)(block, BLOCK)
        else:
            disk.flush()
            model.flush()
        model.snapshot(len(recorder.events))
    model.snapshot(len(recorder.events))
    disk.close()
    model.flush()
    model.snapshot(len(recorder.events))


def verdict(model: Model, number: int, data: bytearray) -> str | None:
    """None, or what is wrong with the state after ``number`` events had begun."""
    before = [entry for entry in model.history if entry[0] < number]
    _, flushed, _ = before[-1]
    # What was under way when the last event began: everything noted up to the next return.
    _, _, since = before[-1]
    try:
        disk = open_recorded(Recorder(bytes(data), recording=False), write=number % 2 == 0)
    except VhdxError as error:
        return f"it does not open: {error}"
    with disk:
        content = disk.pread(SIZE, 0)
    if content == flushed:
        return None
    for at in range(0, SIZE, SECTOR):
        found = content[at : at + SECTOR]
        if found != flushed[at : at + SECTOR] and found not in since.get(at, ()):
            return f"sector at {at:#x} holds what was never there ({found[:4].hex()})"
    return None


def failures(empty, seed, steps, subsets, without=frozenset(), limit=None):
    rng = random.Random(seed)
    recorder, model = Recorder(empty), Model()
    workload(recorder, model, rng, steps)
    states, seen = 0, set()
    found = []
    for number, data in crash_states(recorder, rng, subsets, without=without):
        key = hash(bytes(data))
        if (number, key) in seen:
            continue
        seen.add((number, key))
        states += 1
        wrong = verdict(model, number, data)
        if wrong is not None:
            found.append((number, wrong))
            if limit is not None and len(found) >= limit:
                break
    return recorder, states, found


def test_every_crash_state_of_an_allocating_workload(empty):
    recorder, states, found = failures(empty, seed=3, steps=40, subsets=5)
    assert found == []
    assert states > 120
    assert sum(event.kind == "flush" for event in recorder.events) > 12


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(12))
def test_crash_states_long(empty, seed):
    _, states, found = failures(empty, seed=seed, steps=60, subsets=8)
    assert found == []
    assert states > 300


def barrier_roles(recorder) -> dict[int, str]:
    """What each barrier stands between, by its number."""
    roles: dict[int, str] = {}
    previous, number = "", 0
    events = [event for event in recorder.events if event.kind != "mark"]
    for i, event in enumerate(events):
        if event.kind == "flush":
            following = next((region_of(e) for e in events[i + 1 :] if e.kind != "flush"), "end")
            roles[number] = f"{previous} | {following}"
            number += 1
        else:
            previous = region_of(event)
    return roles


# Each of these, taken away, must be seen. (The second of the two header updates of an open and of a
# close only makes the other copy current, too; without it nothing is lost.)
GUARDS = ["data | log", "log | header", "log | bat"]


@pytest.mark.parametrize("guard", GUARDS)
def test_a_removed_barrier_is_seen(empty, guard):
    """All barriers of one role do nothing: at least one crash state must fail."""
    for seed in range(3, 9):
        rng = random.Random(seed)
        recorder = Recorder(empty)
        workload(recorder, Model(), rng, 26)
        chosen = frozenset(n for n, role in barrier_roles(recorder).items() if role == guard)
        assert chosen, barrier_roles(recorder)
        _, _, found = failures(empty, seed, 26, 10, without=chosen, limit=1)
        if found:
            return
    pytest.fail(f"nothing failed without the barriers of {guard}")
