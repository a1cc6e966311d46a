# SPDX-License-Identifier: MIT
"""Maps from Python: lower devices that come and go, identity placement, tracking, access counts."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stacks import Store
from vhdx import plane
from vhdx.errors import InvalidArgumentError, NoSpaceError
from vhdx.units import MIB

PAGE = 64 << 10


class Handler:
    """Answers faults of a map whose pages are all holes at first."""

    def __init__(self) -> None:
        self.map = None
        self.commits: list[plane.Changes] = []

    def load(self, first, count):
        self.map.install(first, np.full(count, plane.entries(plane.Kind.HOLE, 0, 0, 0), np.uint64))

    def grant(self, wanted):
        raise NoSpaceError("there is none")

    def open_gate(self):
        self.map.set_gate(is_open=True)

    def change_range(self, operation, first, count, size):
        pages = np.arange(first, first + count, dtype=np.uint64)
        old = self.map.read_entries(first, count)
        hole = np.full(count, plane.entries(plane.Kind.HOLE, 0, 0, 0), np.uint64)
        assert not self.map.replace(pages, old, hole).any()

    def commit(self, changes):
        self.commits.append(changes)


def make(lowers, size=16 * PAGE, **options):
    handler = Handler()
    pool = plane.shared_pool(plane.Level.VOLUME)
    handler.map = plane.Map(handler, size, size, PAGE, lowers, pool=pool, **options)
    return handler


def test_identity_placement_needs_no_grants_and_shows_nothing_old():
    lower = plane.Memory(16 * PAGE)
    lower.write(b"\xaa" * (16 * PAGE), 0)
    handler = make([lower], identity_placed=True)
    handler.map.write(b"x" * 512, 3 * PAGE + 512)
    assert handler.map.read(PAGE, 3 * PAGE) == bytes(512) + b"x" * 512 + bytes(PAGE - 1024)
    assert handler.map.read(PAGE, 4 * PAGE) == bytes(PAGE)
    handler.map.flush()
    (changes,) = handler.commits
    _, offsets, _ = plane.fields(changes.entries)
    assert (changes.pages.tolist(), offsets.tolist()) == ([3], [3 * PAGE])
    handler.map.zero(3 * PAGE, PAGE)
    handler.map.write(b"y", 3 * PAGE)  # the place is used again, and is clean
    assert handler.map.read(PAGE, 3 * PAGE) == b"y" + bytes(PAGE - 1)
    with pytest.raises(InvalidArgumentError):
        handler.map.grant(0, np.array([0], np.uint64), 0)
    with pytest.raises(InvalidArgumentError):
        handler.map.clear_lower(0)


def test_lower_devices_join_and_leave():
    first, second = plane.Memory(16 * PAGE), plane.Memory(16 * PAGE)
    handler = make([first, None])
    on_second = plane.entries(plane.Kind.DATA, 1, 5 * PAGE, 0)
    with pytest.raises(InvalidArgumentError):
        handler.map.install(0, np.array([on_second], np.uint64))
    with pytest.raises(InvalidArgumentError):
        handler.map.grant(1, np.array([0], np.uint64), 0)
    handler.map.set_lower(1, second)
    handler.map.install(0, np.array([on_second], np.uint64))
    handler.map.write(b"data", 0)
    assert second.read(4, 5 * PAGE) == b"data"
    with pytest.raises(InvalidArgumentError):
        handler.map.clear_lower(1)  # a page is there
    handler.map.grant(1, np.array([9 * PAGE], np.uint64), 0)
    hole = plane.entries(plane.Kind.HOLE, 0, 0, 0)
    page = np.zeros(1, np.uint64)
    handler.map.replace(page, np.array([on_second], np.uint64), np.array([hole], np.uint64))
    with pytest.raises(InvalidArgumentError):
        handler.map.clear_lower(1)  # space is granted there
    handler.map.revoke()
    commits = len(handler.commits)
    handler.map.clear_lower(1)
    assert len(handler.commits) == commits + 1  # no entry on disk names it any more
    with pytest.raises(InvalidArgumentError):
        handler.map.clear_lower(1)
    assert handler.map.read(4, 0) == bytes(4)
    handler.map.set_lower(1, plane.Memory(PAGE))


def test_a_map_notes_changes_of_the_tracked_page_in_64ths():
    handler = make([plane.Memory(16 * PAGE)], identity_placed=True)
    handler.map.write(bytes(16 * PAGE), 0)
    part = PAGE // 64
    with handler.map.tracking(2) as take_changes:
        assert take_changes() == []
        handler.map.write(b"x", 2 * PAGE)
        handler.map.write(b"x" * (2 * part), 2 * PAGE + 10 * part + 1)
        handler.map.write(b"x", 3 * PAGE - 1)
        handler.map.write(b"x", 3 * PAGE)
        handler.map.read(PAGE, 2 * PAGE)
        assert take_changes() == [0, 10, 11, 12, 63]
        assert take_changes() == []
        handler.map.write(b"x" * (2 * PAGE), PAGE)
        assert take_changes() == list(range(64))
    handler.map.write(b"x", 2 * PAGE)
    with handler.map.tracking(3) as take_changes:
        assert take_changes() == []


def test_a_write_takes_the_watched_mark_away():
    handler = make([plane.Memory(16 * PAGE)], identity_placed=True)
    handler.map.write(b"old", 0)
    page, entry = np.zeros(1, np.uint64), handler.map.read_entries(0, 1)
    watched = entry | np.uint64(plane.WATCHED)
    assert not handler.map.replace(page, entry, watched, publish=False).any()
    assert handler.map.read(3, 0) == b"old"
    assert handler.map.read_entries(0, 1) == watched
    handler.map.write(b"new", 0)
    assert handler.map.read_entries(0, 1) == entry
    elsewhere = np.array([plane.entries(plane.Kind.DATA, 0, 8 * PAGE, 0)], np.uint64)
    assert handler.map.replace(page, watched, elsewhere).all()
    assert handler.map.read(3, 0) == b"new"


def test_accesses_are_counted_by_page():
    handler = make([plane.Memory(16 * PAGE)], identity_placed=True)
    handler.map.write(bytes(16 * PAGE), 0)
    assert not any(counts.any() for counts in handler.map.take_accesses(0, 16))
    handler.map.count_accesses(on=True)
    for at in (4096, 8192, 512):
        handler.map.read(512, at)
    handler.map.read(512, 1024)  # goes on where the last one ended
    handler.map.write(b"x" * 512, 5 * PAGE)
    handler.map.write(b"x" * 512, 5 * PAGE + 512)
    handler.map.read(2 * PAGE, 7 * PAGE)  # large: sequential
    taken = handler.map.take_accesses(0, 16)
    assert taken.random_reads.tolist() == [3, *[0] * 15]
    assert taken.sequential_reads.tolist() == [1, *[0] * 6, 1, 1, *[0] * 7]
    assert taken.random_writes[5] == taken.sequential_writes[5] == 1
    assert not any(counts.any() for counts in handler.map.take_accesses(0, 16))
    handler.map.count_accesses(on=False)
    handler.map.read(512, 0)
    assert not any(counts.any() for counts in handler.map.take_accesses(0, 16))


def test_time_of_a_fault_and_a_commit_is_handed_up():
    clock = plane.Clock()
    clock.advance(1 << 62)  # a sleep until a time of this clock would never end
    model = plane.Model(plane.ModelKind.HDD, 1 << 40)
    pool = plane.shared_pool(plane.Level.SPACE)
    slow = plane.Delay(plane.Memory(64 * MIB), model, pool, clock=clock)
    store = Store([slow], 32 * MIB, plane.Level.VOLUME, ahead=False)
    store.device.write(b"x", 0)
    store.device.flush()  # nobody sleeps until a virtual time
    assert store.commits == 1
