# SPDX-License-Identifier: MIT
"""Crash states of a VHDX image on a volume on a mirror, with a disk lost at any moment."""

from __future__ import annotations

import os
import random

import pytest

import vhdx
from tests.disk_place import DiskPlace
from tests.recording import Crash, History, Log, crash_states_of_several
from vhdx.errors import VhdxError
from vhdx.spaces import DiskSpec, Pool, RetirePolicy
from vhdx.volume import list_files, place

MIB = 1 << 20
DISK = 11 * MIB
SIZE = 5 * MIB
IMAGE = "space://p/s/disk.vhdx"
SECTOR = 512


@pytest.fixture(autouse=True)
def _hints(tmp_path, monkeypatch):
    monkeypatch.setenv("VHDX_POOLS", str(tmp_path))
    yield
    place._pools.close_all()


class Life:
    """A recorded life of an image.

    Args:
        seed: of what is done.
        steps: how much.
    """

    def __init__(self, seed: int, steps: int) -> None:
        self.rng = random.Random(seed)
        self.names = [f"d{i}" for i in range(3)]
        self.bases = [bytes(DISK)] * 3
        self.log = Log()
        self.log.site = "a barrier"
        self.place = DiskPlace(dict(zip(self.names, self.bases, strict=True)), self.log)
        specs = [DiskSpec(n, p) for n, p in zip(self.names, self.place.paths(), strict=True)]
        place._pools.close_all()
        with Pool.create("p", specs, slab=MIB, retire=RetirePolicy.NEVER) as pool:
            pool.create_space("s", 13 * MIB, copies=2, columns=1)
        vhdx.create(IMAGE, SIZE, block_size=MIB)
        self.since = self.log.now
        self.history = History(self.place.recorders["d0"], bytes(SIZE))
        for _ in range(2):
            with vhdx.open(IMAGE, "r+") as disk:
                for _ in range(steps):
                    self._write(disk)
        place._pools.close_all()

    def _write(self, disk) -> None:
        kind = self.rng.randrange(6)
        offset = self.rng.randrange(SIZE // SECTOR) * SECTOR
        length = min(SIZE - offset, self.rng.choice([1, 8, 100]) * SECTOR)
        if kind < 4:
            data, fua = self.rng.randbytes(length), kind == 3
            self.history.change(offset, data, lambda: disk.pwrite(data, offset, fua=fua), fua=fua)
        elif kind == 4:
            self.history.change(offset, bytes(length), lambda: disk.zero(offset, length))
        else:
            self.history.flush(disk.flush)

    def wrong(self, crash: Crash) -> str | None:
        """None, or what is wrong when the image is opened after a crash."""
        contents = {
            name: bytes(content)
            for name, content in zip(self.names, crash.contents, strict=True)
            if content is not None
        }
        place._pools.close_all()
        DiskPlace(contents)
        try:
            with vhdx.open(IMAGE, "r+") as disk:
                found = disk.pread(SIZE, 0)
                failure = self.history.wrong(found, crash.now)
                if failure is not None:
                    return failure
                disk.pwrite(b"x" * SECTOR, 0)
                disk.flush()
            if vhdx.check(IMAGE).errors:
                return "the image is damaged"
            names = [each.name for each in list_files("space://p/s")]
            return None if names == ["disk.vhdx"] else f"files: {names}"
        except VhdxError as error:
            return f"it does not open: {error}"
        finally:
            place._pools.close_all()


def test_every_crash_state_of_an_image():
    life = Life(1, 7)
    rng = random.Random(1)
    seen = 0
    for crash in crash_states_of_several(life.log, life.bases, rng, 1, faulty=1, since=life.since):
        if any(crash.is_old):
            continue  # lies that only checksums would show; see test_crash.py
        failure = life.wrong(crash)
        assert failure is None, (crash.now, failure)
        seen += 1
    assert seen > 50


@pytest.mark.soak
def test_crash_states_of_images_long():
    wanted = int(os.environ.get("VHDX_TEST_STATES", "5000"))
    seen = 0
    for seed in range(1 << 30):
        life = Life(seed, 10)
        rng = random.Random(seed)
        for crash in crash_states_of_several(
            life.log, life.bases, rng, 2, faulty=1, since=life.since
        ):
            if any(crash.is_old):
                continue
            failure = life.wrong(crash)
            assert failure is None, (seed, crash.now, failure)
            seen += 1
        if seen >= wanted:
            break
    print(seen, "crash states")
