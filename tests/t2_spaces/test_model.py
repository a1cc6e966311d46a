# SPDX-License-Identifier: MIT
"""Pools against a model: random I/O, disks that fail, return and are replaced, crashes in between."""

from __future__ import annotations

import os
import random

import pytest

from tests.disk_place import DiskPlace
from vhdx import plane
from vhdx.errors import NoSpaceError, VhdxError
from vhdx.spaces import DiskSpec, Pool, Provisioning, Resiliency, RetirePolicy, Usage

KIB = 1 << 10
SLAB = 64 * KIB
DISK = 2 << 20

READ, WRITE, FLUSH = plane.Operation.READ, plane.Operation.WRITE, plane.Operation.FLUSH


class Model:
    """A pool with one space, and what the space must hold.

    Args:
        disks: how many.
        copies: of the mirror.
        columns: of the space.
        seed: of everything random.
    """

    def __init__(self, disks: int, copies: int, columns: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.copies = copies
        self.place = DiskPlace({f"d{i}": bytes(DISK) for i in range(disks)})
        specs = [DiskSpec(path.rsplit("/", 1)[1], path) for path in self.place.paths()]
        self.pool = Pool.create(
            "p", specs, slab=SLAB, retire=RetirePolicy.ALWAYS, retire_seconds=1e6, known=False
        )
        self.size = 6 * SLAB * columns
        self.pool.create_space(
            "s",
            self.size,
            resiliency=Resiliency.MIRROR,
            copies=copies,
            columns=columns,
            interleave=self.rng.choice([4, 16, 64]) * KIB,
            provisioning=self.rng.choice(list(Provisioning)),
        )
        self.content = bytearray(self.size)
        self.away: dict[str, tuple[int, int]] = {}  # vanished disks, with their keys
        self.failed: set[str] = set()  # disks that fail requests
        self.number = disks

    # ---- steps ----

    def write(self) -> None:
        with self.pool.lease("s") as device:
            offset = self.rng.randrange(self.size)
            length = min(self.size - offset, self.rng.choice([1, 512, 4096, 70_000, 200_000]))
            kind = self.rng.randrange(4)
            if kind < 3:
                data = self.rng.randbytes(length)
                device.write(data, offset, fua=kind == 2)
            else:
                data = bytes(length)
                self.rng.choice([device.zero, device.trim])(offset, length)
            self.content[offset : offset + length] = data

    def read(self) -> None:
        with self.pool.lease("s") as device:
            offset = self.rng.randrange(self.size)
            length = min(self.size - offset, self.rng.choice([1, 4096, 300_000]))
            assert device.read(length, offset) == self.content[offset : offset + length]

    def flush(self) -> None:
        with self.pool.lease("s") as device:
            device.flush()

    def _takes_part(self) -> list[str]:
        return [disk.name for disk in self.pool.report().disks if disk.reason is None]

    def _can_lose(self) -> bool:
        """Whether a disk may fail: the copies and the quorum survive it."""
        report = self.pool.report()
        out = sum(disk.reason is not None for disk in report.disks)
        stale = any(space.stale_slabs or space.unreconciled_rows for space in report.spaces)
        return not stale and out + 1 <= self.copies - 1 and 2 * (out + 1) < len(report.disks)

    def vanish(self) -> None:
        if self._can_lose():
            name = self.rng.choice(self._takes_part())
            self.away[name] = self.place.take_away(name)
            self.pool.settle(0)
            assert name not in self._takes_part()

    def fail(self) -> None:
        """A disk fails every request from now on; the next one takes it out."""
        if self._can_lose():
            name = self.rng.choice(self._takes_part())
            self.place.hold(name).set(fail=[READ, WRITE, FLUSH])
            self.failed.add(name)
            for _ in range(4):
                self.write()
            self.flush()

    def come_back(self) -> None:
        """A disk returns, perhaps with other content where the pool keeps data."""
        if self.away:
            name = self.rng.choice(sorted(self.away))
            memory = self.place.memories[name]
            if self.rng.random() < 0.5:  # written over while it was away
                at = DISK - 512 * KIB
                memory.write(self.rng.randbytes(256 * KIB), at)
            self.place.bring_back(name, self.away.pop(name))
            self.pool.settle(0)
            assert self.pool.settle(60)
            assert name in self._takes_part()

    def replace(self) -> None:
        """Disks that failed are rebuilt elsewhere, and removed."""
        gone = sorted(self.failed | set(self.away))
        if not gone:
            return
        name = f"d{self.number}"
        self.number += 1
        self.place.add(name, bytes(DISK))
        self.pool.add_disk(DiskSpec(name, f"disks:/{name}"))
        report = self.pool.repair()
        assert not report.jobs, report.refused
        for each in gone:
            if each not in self._takes_part():
                self.pool.remove_disk(each)
            self.failed.discard(each)
            self.away.pop(each, None)

    def retire(self) -> None:
        """A disk that works is emptied."""
        if self.away or self.failed:
            return
        name = self.rng.choice(self._takes_part())
        self.pool.set_usage(name, Usage.RETIRED)
        try:
            report = self.pool.repair()
            assert not report.jobs or report.refused
        finally:
            self.pool.set_usage(name, Usage.AUTO_SELECT)

    def reopen(self, *, cleanly: bool) -> None:
        """Closes the pool, or loses the process; memory is what the disks hold."""
        if self.failed:
            return
        if cleanly:
            self.pool.close()
        else:
            contents = {name: memory.read(DISK, 0) for name, memory in self.place.memories.items()}
            old, keys = self.pool, self.place.keys
            self.place = DiskPlace(contents)
            self.place.keys = keys
            old.abandon()
        self.pool = Pool.open(disks=self.place.paths(), known=False)

    def check(self) -> None:
        assert self.pool.settle(60)
        with self.pool.lease("s") as device:
            assert device.read(self.size, 0) == self.content
        assert self.pool.scrub().different == 0
        status = self.pool.report().spaces[0].status
        behind = bool(self.away or self.failed)
        assert status in ({"Incomplete", "Degraded", "OK"} if behind else {"OK"}), status


STEPS = {
    "write": 12, "read": 6, "flush": 3, "vanish": 2, "fail": 1, "come_back": 3, "replace": 1,
    "retire": 1, "reopen": 1, "crash": 1, "check": 2,
}  # fmt: skip


def run(model: Model, count: int) -> None:
    names = [name for name, weight in STEPS.items() for _ in range(weight)]
    done = []
    for _ in range(count):
        name = model.rng.choice(names)
        done.append(name)
        try:
            if name in {"reopen", "crash"}:
                model.reopen(cleanly=name == "reopen")
            else:
                getattr(model, name)()
        except (AssertionError, VhdxError) as error:
            raise AssertionError(f"after {done[-12:]}: {error!r}") from error
    model.check()
    if model.away or model.failed:
        model.replace()
        model.check()
    model.pool.close()


SHAPES = [(4, 2, 1), (6, 2, 2), (6, 3, 1)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("disks", "copies", "columns"), SHAPES)
def test_model(disks, copies, columns, seed):
    run(Model(disks, copies, columns, seed), 80)


@pytest.mark.soak
def test_model_long():
    for seed in range(100, int(os.environ.get("VHDX_TEST_SEEDS", "160"))):
        disks, copies, columns = random.Random(seed).choice(SHAPES)
        run(Model(disks, copies, columns, seed), 400)


def test_a_full_pool_fails_only_the_write_that_finds_no_slab():
    place = DiskPlace({f"d{i}": bytes(1 << 20) for i in range(3)})
    specs = [DiskSpec(f"d{i}", path) for i, path in enumerate(place.paths())]
    pool = Pool.create("p", specs, slab=SLAB, known=False)
    pool.create_space("s", 4 << 20, copies=2, columns=1)
    done = 0
    with pool.lease("s") as device:
        with pytest.raises(NoSpaceError, match="needs a free slab on 2 different disks"):  # noqa: PT012
            for done in range(0, 4 << 20, SLAB):
                device.write(b"x" * SLAB, done)
        assert done > 10 * SLAB
        assert device.read(done, 0) == b"x" * done
        device.write(b"y" * SLAB, 0)
        device.flush()
        device.trim(SLAB, SLAB)  # a row becomes free
        device.write(b"z" * SLAB, done)
        assert device.read(SLAB, done) == b"z" * SLAB
        assert device.read(SLAB, SLAB) == bytes(SLAB)
    pool.close()
