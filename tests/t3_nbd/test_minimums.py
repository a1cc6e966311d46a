# SPDX-License-Identifier: MIT
"""Minimums that were admitted are kept: random sets, clients and places, in virtual time.

A window that begins and ends at any moment has a request more or less, so one is allowed for.
"""

from __future__ import annotations

import random
import re

import pytest

from vhdx import plane
from vhdx.errors import InvalidArgumentError
from vhdx.plane import ModelKind
from vhdx.qos import Domain, Scheduling, Settings
from vhdx.units import MIB

KIB = 1024
UNIT = 8192


@pytest.fixture
def pool():
    pool = plane.Pool(2)
    yield pool
    pool.close()


class Set:
    """Disks with minimums that are as high as admission takes, or a part of that."""

    def __init__(self, pool: plane.Pool, kind: ModelKind, seed: int) -> None:
        self.pool, self.kind, self.random = pool, kind, random.Random(seed)
        chosen = self.random
        self.size, self.depth = chosen.choice([16, 64]) * MIB, chosen.choice([4, 8, 16, 32])
        self.disks = []
        for number in range(chosen.randint(2, 6)):
            depth = chosen.choice([1, 1, 2, 4, 8, 16])
            part = chosen.uniform(0.1, 1) if number == 0 or chosen.random() < 0.75 else 0
            self.disks.append((part, depth, chosen.choice([1, 100, 300, 1000, 10000])))
        low, high = 0.0, 1e5
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._is_admitted(middle) else (low, middle)
        self.most, self.above = low, high
        self.factor = low * chosen.choice([1, 1, chosen.uniform(0.3, 1)])

    def wanted(self, factor: float) -> list[Settings]:
        return [
            Settings(minimum_iops=max(1, int(part * factor)), minimum_depth=depth, weight=weight)
            if part
            else Settings(weight=weight)
            for part, depth, weight in self.disks
        ]

    def domain(self, factor: float, size: int) -> tuple[Domain, plane.Clock]:
        clock = plane.Clock()
        clock.advance(10**12)
        scheduling = Scheduling(keep_minimums=True, depth=self.depth, model=self.kind)
        sizes = [self.size] * len(self.disks)
        domain = Domain(self.pool, scheduling=scheduling, sizes=sizes, clock=clock)
        for number, settings in enumerate(self.wanted(factor)):
            domain.add_disk(str(number), f"/{number}", plane.Memory(size), settings)
        domain.subscribe(1e9)
        return domain, clock

    def _is_admitted(self, factor: float) -> bool:
        domain, _ = self.domain(factor, MIB)
        try:
            return domain.report().scheduling.admitted
        finally:
            domain.close()

    def client(self, depth: int) -> dict:
        chosen = self.random
        flushes = depth == 1 and chosen.random() < 0.5
        return {
            "length": chosen.choice([4, 8, 16, 64, 256]) * KIB,
            "least": chosen.choice([None, 4 * KIB]),
            "depth": depth if chosen.random() < 0.6 else min(32, depth * chosen.choice([2, 4])),
            "write_percent": 100 if flushes else chosen.choice([0, 30, 100]),
            "flushes": flushes,
            "pause": chosen.choice([0, 50e-6, 200e-6]),
            "in_a_row": chosen.random() < 0.1,
            "span": MIB if chosen.random() < 0.25 else None,
        }

    def run(self, seconds: float) -> None:
        domain, clock = self.domain(self.factor, self.size)
        loads, flows = [], []
        clients = [self.client(depth) for _, depth, _ in self.disks]
        for number, terms in enumerate(clients):
            flow = domain.connect(str(number), "client")
            flow.meter.switch(on=True)
            load = plane.Load(
                flow.throttle, self.pool, seed=number + 1, meter=flow.meter, clock=clock, **terms
            )
            flow.set_under_way(lambda load=load: load.read().under_way)
            load.start()
            loads.append(load)
            flows.append(flow)
        domain.advance(1)
        before = [sum(flow.meter.read().units) for flow in flows]
        domain.advance(seconds)
        for flow, had, settings, terms in zip(
            flows, before, self.wanted(self.factor), clients, strict=True
        ):
            got = sum(flow.meter.read().units) - had + max(1, terms["length"] // UNIT)
            least = 0.99 * seconds * (settings.minimum_iops or 0)
            assert got >= least, (settings, terms, got / seconds)
        with domain.listening(lambda _: None) as alerts:
            assert alerts == []
        for load in loads:
            load.stop()
        clock.advance(clock.now + 10**14)
        domain.close()


@pytest.mark.parametrize(
    ("kind", "sets", "seconds"),
    [
        (ModelKind.HDD, 10, 120),
        (ModelKind.SSD, 5, 5),
        (ModelKind.NVME, 5, 2),
        pytest.param(ModelKind.HDD, 300, 120, marks=pytest.mark.soak),
        pytest.param(ModelKind.SSD, 100, 20, marks=pytest.mark.soak),
        pytest.param(ModelKind.NVME, 100, 5, marks=pytest.mark.soak),
    ],
)
def test_what_was_admitted_is_kept(pool, kind, sets, seconds):
    for seed in range(sets):
        Set(pool, kind, seed).run(seconds)


def test_just_above_is_refused_with_figures(pool):
    for seed in range(5):
        each = Set(pool, ModelKind.HDD, seed)
        domain, _ = each.domain(each.most, MIB)
        number = next(n for n, disk in enumerate(each.disks) if disk[0])
        settings = each.wanted(each.most)[number]
        refused = None
        for more in range(1, 10):  # parts are whole numbers
            try:
                domain.set_disk(str(number), {"minimum_iops": settings.minimum_iops + more})
            except InvalidArgumentError as error:
                refused = str(error)
                break
        domain.close()
        assert refused is not None
        assert re.search(r"under way the device does \d+ in the worst case", refused)
