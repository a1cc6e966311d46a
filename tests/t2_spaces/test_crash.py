# SPDX-License-Identifier: MIT
"""Crash states of pools, with disks lost or old: no byte is lost, no stale copy is read."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import pytest

from tests.disk_place import DiskPlace
from tests.recording import Crash, History, Log, crash_states_of_several
from vhdx import plane
from vhdx.errors import VhdxError
from vhdx.ledger import Member
from vhdx.ledger.members import read_area
from vhdx.spaces import (
    DiskSpec,
    Event,
    Pool,
    Provisioning,
    Resiliency,
    RetirePolicy,
    allocating,
    watching,
)
from vhdx.spaces.core import Core
from vhdx.spaces.label import place_parts
from vhdx.spaces.state import PoolState

KIB = 1 << 10
SLAB = 64 * KIB
DISK = 1 << 20
SECTOR = 512


@pytest.fixture(autouse=True)
def _hints(tmp_path, monkeypatch):
    monkeypatch.setenv("VHDX_POOLS", str(tmp_path))


class Life:
    """A recorded life of a pool with one space.

    Args:
        disks: how many.
        copies: of the mirror; 1: a simple space.
        seed: of what is done.
    """

    def __init__(self, disks: int, copies: int, columns: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.names = [f"d{i}" for i in range(disks)]
        self.bases = [bytes(DISK)] * disks
        self.log = Log()
        self.log.site = "a barrier"
        self.place = DiskPlace(dict(zip(self.names, self.bases, strict=True)), self.log)
        self.size = 5 * SLAB * columns
        specs = [DiskSpec(n, p) for n, p in zip(self.names, self.place.paths(), strict=True)]
        self.pool = Pool.create("p", specs, slab=SLAB, retire=RetirePolicy.NEVER, known=False)
        self.pool.create_space(
            "s",
            self.size,
            resiliency=Resiliency.SIMPLE if copies == 1 else Resiliency.MIRROR,
            copies=copies,
            columns=columns,
            interleave=self.rng.choice([4 * KIB, 16 * KIB]),
            provisioning=self.rng.choice(list(Provisioning)),
        )
        self.since = self.log.now
        self.history = History(self.place.recorders["d0"], bytes(self.size))

    def write(self) -> None:
        """One write, zero, trim of whole rows, or flush."""
        with self.pool.lease("s") as device:
            kind = self.rng.randrange(9)
            if kind == 8:  # a whole row is given back, and what it had must not show again
                row = self.size // 5
                offset = self.rng.randrange(5) * row
                self.history.change(offset, bytes(row), lambda: device.trim(offset, row))
                return
            offset = self.rng.randrange(self.size // SECTOR) * SECTOR
            length = min(self.size - offset, self.rng.choice([1, 3, 9, 40, 130]) * SECTOR)
            fua = self.rng.random() < 0.2
            if kind < 5:
                data = self.rng.randbytes(length)
                self.history.change(
                    offset, data, lambda: device.write(data, offset, fua=fua), fua=fua
                )
            elif kind == 5:
                self.history.change(
                    offset, bytes(length), lambda: device.zero(offset, length, fua=fua), fua=fua
                )
            else:
                self.history.flush(device.flush)

    def crashes(self, rng: random.Random, subsets: int, faulty: int, **how) -> Iterator[Crash]:
        return crash_states_of_several(
            self.log, self.bases, rng, subsets, faulty=faulty, since=self.since, **how
        )

    def contents(self, crash: Crash) -> dict[str, bytes]:
        return {
            name: bytes(content)
            for name, content in zip(self.names, crash.contents, strict=True)
            if content is not None
        }

    def lies(self, crash: Crash) -> bool:
        """Whether an old disk has all of the ledger: it lost data that it had said was durable.

        Nobody can tell that without checksums.
        """
        found = {}
        for index, content in enumerate(crash.contents):
            device = plane.Memory(DISK)
            device.write(bytes(content or bytes(DISK)), 0)
            region, _, _ = place_parts(DISK, SLAB)
            found[index] = read_area(Member(device, 64 * KIB, region))
        best = max((a for a in found.values() if a is not None), key=lambda area: area.position)
        return any(
            is_old and area is not None and not best.has_succeeded_since(area.position)
            for is_old, area in zip(crash.is_old, found.values(), strict=True)
        )

    def wrong(self, crash: Crash) -> str | None:
        """None, or what is wrong when the pool is opened after a crash."""
        place = DiskPlace(self.contents(crash))
        try:
            pool = Pool.open(disks=place.paths(), known=False)
        except VhdxError as error:
            return f"it does not open: {error}"
        try:
            report = pool.report()
            if not report.spaces or not report.spaces[0].attached:
                return f"the space is not attached: {report.spaces}"
            with pool.lease("s") as device:
                found = device.read(self.size, 0)
                failure = self.history.wrong(found, crash.now)
                if failure is not None:
                    return failure
                if not pool.settle(30):
                    return "the repair does not end"
                if device.read(self.size, 0) != found:
                    return "the content changed by itself"
            scrubbed = pool.scrub()
            if scrubbed.different:
                return f"copies differ after the repair: {scrubbed.differences[:3]}"
            states = {disk.status for disk in pool.report().disks if disk.path in place.paths()}
            if states - {"OK"}:
                return f"disks that are there: {states}"
            return None
        finally:
            pool.close()


def lives(seed: int, disks: int, copies: int, columns: int, steps: int = 20) -> Life:
    life = Life(disks, copies, columns, seed)
    for _ in range(steps):
        life.write()
    if life.rng.random() < 0.5:
        life.pool.close()
        life.pool = Pool.open(disks=life.place.paths(), known=False)
        life.pool.settle(30)
        for _ in range(6):
            life.write()
    life.pool.close()
    return life


SHAPES = [(3, 1, 2), (3, 2, 1), (5, 2, 2), (5, 3, 1)]


@pytest.mark.parametrize(("disks", "copies", "columns"), SHAPES)
def test_every_crash_state(disks, copies, columns):
    rng = random.Random(disks * copies)
    seen = 0
    life = lives(disks + copies, disks, copies, columns)
    for crash in life.crashes(rng, 3, faulty=copies - 1):
        if life.lies(crash):
            continue
        failure = life.wrong(crash)
        assert failure is None, (crash.now, crash.is_old, failure)
        seen += 1
    assert seen > 80


@contextlib.contextmanager
def _at_site(log: Log, name: str) -> Iterator[None]:
    before, log.site = log.site, name
    try:
        yield
    finally:
        log.site = before


def _log_of(core: Core) -> Log:
    backend = getattr(next(iter(core.disks.values())).file.leaf, "backend", None)
    return Log() if backend is None else backend.log


def _finds_something(copies: int, seeds: int, without: str | None = None) -> bool:
    for seed in range(seeds):
        rng = random.Random(seed)
        life = lives(seed, 3, copies, 1, steps=30)
        for crash in life.crashes(rng, 3, faulty=0, without=without):
            if life.wrong(crash) is not None:
                return True
    return False


def test_new_slabs_must_read_zeros_durably(monkeypatch):
    """Else a crash shows what was there before."""
    zero = allocating.zero_slabs

    def named(core, taken):
        with _at_site(_log_of(core), "zero"):
            return zero(core, taken)

    monkeypatch.setattr(allocating, "zero_slabs", named)
    # A trim is only a hint: these disks keep what they had.
    monkeypatch.setattr(Core, "give_back_space", lambda self, index, slab: None)
    life = Life(3, 1, 1, seed=1)
    whole = b"secret!!" * (life.size // 8)
    with life.pool.lease("s") as device:
        life.history.change(0, whole, lambda: device.write(whole, 0))
        life.history.flush(device.flush)
        for row in range(5):
            at = row * SLAB
            life.history.change(at, bytes(SLAB), lambda at=at: device.trim(at, SLAB))
            life.history.flush(device.flush)
            data = bytes([row + 1]) * SECTOR
            life.history.change(at, data, lambda at=at, data=data: device.write(data, at))
    life.pool.close()
    crashes = list(life.crashes(random.Random(1), 4, faulty=0, without="zero"))
    assert any(life.wrong(crash) for crash in crashes)
    crashes = list(life.crashes(random.Random(1), 2, faulty=0))
    assert not any(life.wrong(crash) for crash in crashes)


def test_rows_must_be_marked_before_they_are_changed(monkeypatch):
    """Else copies that a crash left different are not made equal."""
    monkeypatch.setattr(
        PoolState, "marks_records", staticmethod(lambda space, rows, marked: [event(space)])
    )

    def event(space):
        return PoolState.event_record(Event(1, 0, "nothing", "instead of a mark"))

    assert _finds_something(2, 10)


def test_marks_go_away_only_when_all_copies_are_durable(monkeypatch):
    clean = watching.clean_marks

    def named(core, space, rows, **how):
        with _at_site(_log_of(core), "clean"):
            return clean(core, space, rows, **how)

    monkeypatch.setattr("vhdx.spaces.pool.clean_marks", named)
    assert _finds_something(2, 30, without="clean")


@pytest.mark.soak
def test_crash_states_long():
    wanted = int(os.environ.get("VHDX_TEST_STATES", "100000"))
    seen = 0
    for seed in range(1 << 30):
        rng = random.Random(seed)
        disks, copies, columns = rng.choice(SHAPES)
        life = lives(seed, disks, copies, columns)
        for crash in life.crashes(rng, 4, faulty=copies - 1):
            if life.lies(crash):
                continue
            failure = life.wrong(crash)
            assert failure is None, (seed, crash.now, crash.is_old, failure)
            seen += 1
        if seen >= wanted:
            break
    print(seen, "crash states")
