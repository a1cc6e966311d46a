# SPDX-License-Identifier: MIT
"""Minimums that are kept: on a modelled disk in virtual time, and through NBD.

The arithmetic is tested against water filling in tests/c/test_schedule.c; here a server's QoS as a
whole, with its figures and alerts.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import vhdx
from tests.t3_nbd.client import Client
from vhdx import plane
from vhdx.errors import InvalidArgumentError
from vhdx.plane import ModelKind
from vhdx.qos import Domain, Policy, PolicyKind, Scheduling, Settings
from vhdx.units import MIB

GREEDY = 7
HDD_40 = Settings(minimum_iops=40)


class Experiment:
    """Clients of disks on one modelled device, in virtual time."""

    def __init__(self, pool: plane.Pool, scheduling: Scheduling, wanted: dict[str, Settings]) -> None:
        self.clock, self.pool = plane.Clock(), pool
        self.clock.advance(10**12)
        sizes = [16 * MIB] * len(wanted)
        self.domain = Domain(pool, scheduling=scheduling, sizes=sizes, clock=self.clock)
        for name, settings in wanted.items():
            self.domain.add_disk(name, f"/{name}", plane.Memory(16 * MIB), settings)
        self.loads: dict[str, plane.Load] = {}

    def begin(self, name: str, *, length: int = 8192, depth: int = 16) -> None:
        flow = self.domain.connect(name, f"client of {name}")
        load = plane.Load(
            flow.throttle, self.pool, length=length, depth=depth, seed=len(self.loads) + 1,
            meter=flow.meter, clock=self.clock,
        )  # fmt: skip
        flow.set_under_way(lambda: load.read().under_way)
        self.loads[name] = load
        load.start()

    def iops(self, name: str, window: str = "300") -> float:
        for disk in self.domain.report().disks:
            if disk.disk == name:
                return disk.windows[window].normalized_iops
        raise AssertionError(name)

    def status(self, name: str) -> str:
        return next(d.status for d in self.domain.report().disks if d.disk == name)

    def alerts(self) -> list:
        with self.domain.listening(lambda _: None) as before:
            return before

    def end(self) -> None:
        for load in self.loads.values():
            load.stop()
        self.clock.advance(self.clock.now + 10**14)
        assert all(load.read().under_way == 0 for load in self.loads.values())
        assert not any(load.read().failed for load in self.loads.values())
        self.domain.close()


@pytest.fixture
def pool():
    pool = plane.Pool(2)
    yield pool
    pool.close()


@pytest.fixture
def experiment(pool):
    made = []

    def make(scheduling, wanted):
        made.append(Experiment(pool, scheduling, wanted))
        return made[-1]

    yield make
    for each in made:
        each.end()


def noisy(experiment, *, keep):
    """One disk that is to get 40, and seven that take what they can."""
    wanted = {"quiet": HDD_40} | {f"greedy{n}": Settings() for n in range(GREEDY)}
    made = experiment(Scheduling(keep_minimums=keep, model=ModelKind.HDD), wanted)
    made.domain.subscribe(1e9)
    for n in range(GREEDY):
        made.begin(f"greedy{n}", length=(8192, 65536, 262144)[n % 3], depth=32)
    made.begin("quiet", depth=4)
    return made


@pytest.mark.parametrize("minutes", [2, pytest.param(60, marks=pytest.mark.soak)])
def test_a_minimum_is_kept_and_the_alert_stays_silent(experiment, minutes):
    made = noisy(experiment, keep=True)
    made.domain.advance(5)
    for _ in range(minutes):
        made.domain.advance(60)
        assert made.iops("quiet", "60") >= 0.98 * 40
    assert made.alerts() == []
    assert made.status("quiet") == "Ok"
    assert min(made.iops(f"greedy{n}", "60") for n in range(GREEDY)) > 1


def test_without_scheduling_the_alert_comes_and_goes(experiment):
    made = noisy(experiment, keep=False)
    began = made.clock.now
    while not made.alerts():
        made.domain.advance(0.05)
        assert made.clock.now - began < 60e9
    assert made.clock.now - began <= 2e9
    (alert,) = made.alerts()
    assert (alert.disk, alert.begins, len(alert.top_consumers)) == ("quiet", True, 3)
    assert made.status("quiet") == "InsufficientThroughput"
    for n in range(GREEDY):
        made.loads[f"greedy{n}"].stop()
    # What they have under way has to end first: 32 requests each of up to 256 KiB.
    while any(made.loads[f"greedy{n}"].read().under_way for n in range(GREEDY)):
        made.domain.advance(0.05)
    quiet = made.clock.now
    while len(made.alerts()) < 2:
        made.domain.advance(0.05)
        assert made.clock.now - quiet < 60e9
    assert made.clock.now - quiet <= 5e9
    assert not made.alerts()[1].begins


def test_weights_and_groups(experiment):
    weights = {"a": 100, "b": 300, "c": None, "d": None}
    wanted = {name: Settings(weight=weight) for name, weight in weights.items()}
    made = experiment(Scheduling(keep_minimums=True, model=ModelKind.SSD, depth=16), wanted)
    made.domain.set_policy(Policy("group", PolicyKind.AGGREGATED, Settings(weight=200)))
    for name in "cd":
        made.domain.set_disk(name, {}, "group")
    made.domain.subscribe(1e9)
    for name in "abcd":
        made.begin(name, depth=64)
    made.domain.advance(20)
    got = {name: made.iops(name, "1") for name in "abcd"}
    together = got["c"] + got["d"]
    assert got["b"] / got["a"] == pytest.approx(3, rel=0.02)
    assert together / got["a"] == pytest.approx(2, rel=0.02)
    assert got["c"] / got["d"] == pytest.approx(1, rel=0.05)
    made.domain.set_disk("a", {"weight": 600}, None)  # live
    made.domain.advance(20)
    assert made.iops("a", "1") / made.iops("b", "1") == pytest.approx(2, rel=0.02)


def test_what_the_device_cannot_carry_is_refused(experiment):
    made = experiment(
        Scheduling(keep_minimums=True, capacity_iops=1000),
        {"a": Settings(minimum_iops=500), "b": Settings(), "c": Settings()},
    )
    made.domain.set_disk("b", {"minimum_iops": 400})
    with pytest.raises(InvalidArgumentError, match=r"901 normalised IOPS.*does 1000, of which 90%"):
        made.domain.set_disk("b", {"minimum_iops": 401})
    group = Policy("g", PolicyKind.AGGREGATED, Settings(minimum_iops=9))
    made.domain.set_policy(group)  # of no disk yet
    with pytest.raises(InvalidArgumentError, match="cannot be kept"):
        made.domain.set_disk("c", {}, "g")
    assert made.domain.report().scheduling.reserved_iops == 900
    made.domain.set_disk("a", {"minimum_iops": 300}, "g")
    made.domain.set_disk("a", {"minimum_iops": None})
    bigger = Policy("g", PolicyKind.AGGREGATED, Settings(minimum_iops=501), group.policy_id)
    with pytest.raises(InvalidArgumentError, match="cannot be kept"):
        made.domain.set_policy(bigger)
    device = made.domain.report().scheduling
    assert (device.reserved_iops, device.admitted, device.capacity_measured) == (409, True, False)


def test_what_stands_in_a_file_is_flagged(experiment, caplog):
    wanted = {"a": Settings(minimum_iops=500), "b": Settings(minimum_iops=700)}
    made = experiment(Scheduling(keep_minimums=True, capacity_iops=1000), wanted)
    assert not caplog.text
    made.domain.begin()
    assert "1200 normalised IOPS in all cannot be kept" in caplog.text
    assert not made.domain.report().scheduling.admitted
    made.domain.set_disk("a", {"minimum_iops": 400})  # better than before


def test_more_than_there_is_starves_nobody(experiment):
    wanted = {"a": Settings(minimum_iops=500), "b": Settings(), "c": Settings()}
    made = experiment(Scheduling(keep_minimums=True, model=ModelKind.HDD), wanted)
    made.domain.subscribe(1e9)
    for name in "abc":
        made.begin(name, depth=32)
    made.domain.advance(60)
    a, b, c = (made.iops(name) for name in "abc")
    assert b == pytest.approx(c, rel=0.1)
    assert (b + c) / (a + b + c) == pytest.approx(0.1, rel=0.1)
    assert made.status("a") == "InsufficientThroughput"


def test_the_minimum_of_a_group_is_watched(experiment):
    made = experiment(Scheduling(model=ModelKind.HDD), {n: Settings() for n in "abcd"})
    made.domain.set_policy(Policy("pair", PolicyKind.AGGREGATED, Settings(minimum_iops=70)))
    for name in "ab":
        made.domain.set_disk(name, {}, "pair")
        made.begin(name, depth=4)
    made.domain.set_disk("d", {"minimum_iops": 1}, "pair")  # has no part of that
    made.domain.advance(10)
    assert made.alerts() == []
    made.begin("c", depth=64)
    made.domain.advance(10)
    (alert,) = made.alerts()
    assert (alert.disk, [each.disk for each in alert.top_consumers]) == ("policy pair", ["c"])
    assert [made.status(name) for name in "abcd"] == ["InsufficientThroughput"] * 2 + ["Ok"] * 2


def test_alerts_end_with_their_minimum(experiment):
    wanted = {"a": Settings(), "b": Settings()}
    made = experiment(Scheduling(model=ModelKind.HDD), wanted)
    policy = Policy("gold", PolicyKind.AGGREGATED, Settings(minimum_iops=1000))
    made.domain.set_policy(policy)
    made.domain.set_disk("a", {}, "gold")
    made.domain.set_disk("b", {"minimum_iops": 1000})
    for name in "ab":
        made.begin(name)
    made.domain.advance(5)
    assert {(each.disk, each.begins) for each in made.alerts()} == {
        ("policy gold", True),
        ("b", True),
    }
    made.domain.remove_policy("gold")
    made.domain.set_disk("b", {"minimum_iops": None})
    made.domain.advance(600)
    assert [(each.disk, each.begins) for each in made.alerts()][2:] == [
        ("b", False),
        ("policy gold", False),
    ]


def test_figures_are_sampled_during_a_subscription(experiment):
    made = experiment(Scheduling(), {"a": Settings(maximum_iops=100)})
    made.begin("a")
    made.domain.report()
    made.domain.advance(2)
    assert made.domain.report().sampled_seconds == 0  # a report starts nothing
    made.domain.subscribe(10)
    made.domain.advance(5)
    assert made.domain.report().sampled_seconds == pytest.approx(5)
    assert made.iops("a", "1") == pytest.approx(100, rel=0.05)
    made.domain.advance(6)
    assert made.domain.report().sampled_seconds == 0  # it has ended
    made.domain.subscribe(10)
    assert made.iops("a", "1") == 0  # nothing is known of the time in between


def test_one_disk_under_two_names(experiment):
    made = experiment(Scheduling(), {})
    memory = plane.Memory(16 * MIB)
    for name in "ab":
        made.domain.add_disk(name, "/one", memory, Settings())
    made.domain.set_disk("a", {"maximum_iops": 300, "minimum_iops": 200})
    made.domain.subscribe(1e9)
    for name in "ab":
        made.begin(name)
    made.domain.advance(60)
    assert made.iops("a", "60") + made.iops("b", "60") == pytest.approx(300, rel=0.01)
    assert made.iops("a", "60") == pytest.approx(150, rel=0.05)
    assert made.status("b") == "Ok"
    assert [d.settings.maximum_iops for d in made.domain.report().disks] == [300, 300]


def test_a_disk_with_its_own_minimum_takes_none_of_its_policys(pool):
    scheduling = Scheduling(keep_minimums=True, capacity_iops=125)
    domain = Domain(pool, scheduling=scheduling)
    for name, least in (("a", 50), ("b", 30), ("c", 30)):
        domain.add_disk(name, f"/{name}", plane.Memory(MIB), Settings(minimum_iops=least))
    domain.set_policy(Policy("group", PolicyKind.AGGREGATED, Settings(minimum_iops=40)))
    domain.set_disk("b", {}, "group")  # 110 are reserved, of 112
    assert domain.report().scheduling.reserved_iops == 110
    with pytest.raises(vhdx.InvalidArgumentError, match="of 120 normalised"):
        domain.set_disk("b", {"minimum_iops": None})  # then it has a part of the group's 40
    domain.close()


def test_one_disk_is_one_by_any_path_and_device(pool, tmp_path):
    """A link, and a second device as a reader of its own has it, are no second disk."""
    real, link = tmp_path / "disk", tmp_path / "link"
    real.touch()
    link.symlink_to(real)
    scheduling = Scheduling(keep_minimums=True, depth=4, model=ModelKind.HDD)
    domain = Domain(pool, scheduling=scheduling, sizes=[16 * MIB])
    domain.add_disk("a", str(real), plane.Memory(16 * MIB), {"minimum_iops": 40})
    domain.add_disk("b", str(link), plane.Memory(16 * MIB))
    first, second = (domain._registry.disks[name] for name in "ab")
    assert second.attachment.share is first.attachment.share
    assert second.attachment.base == first.attachment.base == 0
    assert second.attachment.device is not first.attachment.device
    assert domain.report().scheduling.reserved_iops == 40
    assert {d.settings.minimum_iops for d in domain.report().disks} == {40}
    domain.close()


def test_a_child_does_not_wait_for_slots_of_its_parent(pool):
    domain = Domain(pool, scheduling=Scheduling(keep_minimums=True, capacity_iops=1000))
    with domain._device._background.slot(4096):  # whose thread the child does not have
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            domain.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    domain.close()


def test_capacity_is_seen(experiment):
    made = experiment(Scheduling(keep_minimums=True, depth=8), {"a": Settings(), "b": Settings()})
    assert made.domain.report().scheduling.capacity_iops is None
    model = plane.Model(ModelKind.SSD, 32 * MIB)
    for disk in made.domain._registry.disks.values():
        lower = plane.Delay(plane.Memory(16 * MIB), model, made.pool, clock=made.clock)
        scheduled = plane.Scheduled(lower, disk.attachment.share)
        disk.attachment = disk.attachment._replace(device=scheduled, scheduled=scheduled)
    for name in "ab":
        made.begin(name, depth=32)
    made.domain.advance(3)
    device = made.domain.report().scheduling
    assert device.capacity_measured
    assert device.capacity_iops == pytest.approx(model.capacity_iops(8), rel=0.1)
    assert "has done" in (made.domain.set_disk("a", {"minimum_iops": 10**9}) or "")
    assert made.domain.set_disk("a", {"minimum_iops": 100}) is None


def test_models_by_their_figures():
    hdd = plane.Model(ModelKind.HDD, 1 << 40)
    assert 75 < hdd.capacity_iops(1) < 82
    assert 1.9 < hdd.capacity_iops(32) / hdd.capacity_iops(1) < 2.1
    assert 12_000 < plane.Model(ModelKind.SSD, 1 << 40).capacity_iops(1) < 12_600
    assert plane.Model(ModelKind.NVME, 1 << 40).capacity_iops(64) > 150_000
    with pytest.raises(InvalidArgumentError):
        plane.Model(ModelKind.HDD, 1000)


# ---- served ----


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("model", [None, ModelKind.NVME])
def test_scheduled_disks_lose_nothing(fast_path, keep, model):
    names = ("a", "b", "c")
    for name in names:
        vhdx.create(fast_path / f"{name}.vhdx", 64 * MIB, block_size=MIB)
    failures: list[BaseException] = []
    scheduling = Scheduling(keep_minimums=keep, depth=3, model=model)
    wanted = {name: Settings(minimum_iops=50, weight=1 + n) for n, name in enumerate(names)}
    sources = {name: fast_path / f"{name}.vhdx" for name in names}
    with vhdx.serve(sources, qos=wanted, scheduling=scheduling) as server:

        def client(name: str, at: int, fill: int) -> None:
            try:
                peer = Client(server.socket_path, name)
                assert peer.ask(1, offset=at, payload=bytes([fill]) * (2 * MIB))[0] == 0
                assert peer.ask(6, offset=at + MIB, length=4096)[0] == 0
                assert peer.ask(3)[0] == 0
                expected = bytearray([fill]) * (2 * MIB)
                expected[MIB : MIB + 4096] = bytes(4096)
                assert peer.read(at, 2 * MIB) == expected
                peer.close()
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=client, args=(name, 4 * MIB * n, 1 + n))
            for name in names
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    for name in names:
        with vhdx.open(sources[name]) as disk:
            for n in range(4):
                assert disk.pread(MIB, 4 * MIB * n) == bytes([1 + n]) * MIB
        assert vhdx.check(sources[name]).findings == []


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_client_that_is_gone_asked_for_is_dropped(fast_path, keep):
    image = fast_path / "disk.vhdx"
    vhdx.create(image, 256 * MIB)
    scheduling = Scheduling(keep_minimums=keep, depth=2, model=ModelKind.HDD)
    with vhdx.serve({"disk": image}, scheduling=scheduling) as server:
        clients = [Client(server.socket_path) for _ in range(20)]
        for client in clients:
            for n in range(60):
                client.send(0, cookie=n, offset=n * 4 * MIB, length=4096)
        while server.totals()["disk"].reads < 20 * 60:
            time.sleep(0.01)
        for client in clients:
            client.close()
        began = time.monotonic()
        while server.connections:
            time.sleep(0.01)
            assert time.monotonic() - began < 60  # all of it would take eight seconds and more
        waiting = server.qos.report().scheduling.waiting
        assert waiting == 0


def test_a_compaction_takes_slots(fast_path):
    image = fast_path / "disk.vhdx"
    vhdx.create(image, 64 * MIB, block_size=MIB)
    with vhdx.open(image, "r+") as disk:
        for n in range(16):
            disk.pwrite(bytes([n]) * MIB, n * MIB)
    with vhdx.control.serve(
        {"disk": image}, scheduling=Scheduling(keep_minimums=True, depth=2)
    ) as server:
        client = Client(server.socket_path)
        for n in range(8):
            assert client.ask(4, offset=n * MIB, length=MIB)[0] == 0
        taken = server.qos._device._background.read().units
        assert vhdx.compact(image).reclaimed >= 8 * MIB
        moved = server.qos._device._background.read().units - taken
        assert moved >= 8 * MIB // 8192
        assert client.read(15 * MIB, MIB) == bytes([15]) * MIB
        client.close()
