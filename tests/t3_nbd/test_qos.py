# SPDX-License-Identifier: MIT
"""Storage QoS: settings, policies, the QoS file, figures and alerts; then served disks.

Rates themselves are tested in virtual time, in tests/c/test_throttle.c; here no time is asserted.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from dataclasses import fields, replace
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vhdx
from tests.t3_nbd.client import Client
from vhdx import plane
from vhdx.control.api import ChangeDisk, ChangePolicy, RemovePolicy, decode_request
from vhdx.control.qos import change_qos
from vhdx.errors import Reason
from vhdx.plane import Clock, Limit, LimitKind, Limits, MeterFacts, Pacing, Throttle
from vhdx.qos import Domain, Policy, PolicyKind, Settings, Store
from vhdx.qos.monitor import Figures, History, Status, Watch
from vhdx.qos.store import pack
from vhdx.units import MIB

# ---- settings and policies ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"maximum_iops": 0},
        {"maximum_iops": -5},
        {"maximum_iops": 10**9 + 1},
        {"maximum_iops": True},
        {"maximum_iops": 1.5},
        {"maximum_bandwidth": 0},
        {"minimum_iops": 200, "maximum_iops": 100},
        {"minimum_iops": 200, "maximum_write_iops": 100},
        {"minimum_iops": 200, "maximum_read_bandwidth": 200 * 512 - 1},
        {"burst_iops": 5},
        {"burst_bytes": 5, "maximum_iops": 5},
        {"credit_rate_iops": 5},
        {"maximum_bandwidth": 5, "burst_bytes": -1},
        {"credit_iops": -1, "maximum_iops": 5},
        {"maximum_iops": 100, "credit_iops": 10, "credit_rate_iops": 50},
        {"speed": 3},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(vhdx.InvalidArgumentError) as caught:
        Settings().changed(wrong)
    assert caught.value.hint


numbers = st.one_of(st.none(), st.integers(1, 10**9))


@given(st.tuples(numbers, numbers, numbers), st.tuples(numbers, numbers, numbers))
def test_of_two_settings_the_tighter_limits_count(first, second):
    def possible(minimum, maximum, bandwidth):
        most = [maximum, None if bandwidth is None else bandwidth // 512]
        return (minimum and min([minimum, *(each for each in most if each is not None)])) or None

    def made(values):
        maximum, bandwidth, minimum = values
        minimum = possible(minimum, maximum, bandwidth)
        return Settings(maximum_iops=maximum, maximum_bandwidth=bandwidth, minimum_iops=minimum)

    a, b = made(first), made(second)
    both = a.within(b)
    for name in ("maximum_iops", "maximum_bandwidth"):
        values = [v for v in (getattr(a, name), getattr(b, name)) if v is not None]
        assert getattr(both, name) == min(values, default=None)
    wanted = a.minimum_iops if a.minimum_iops is not None else b.minimum_iops
    assert both.minimum_iops == possible(wanted, both.maximum_iops, both.maximum_bandwidth)


def test_policies_are_what_they_say():
    policy = Policy("gold", PolicyKind.AGGREGATED, Settings(maximum_iops=5))
    assert Policy.of(json.loads(json.dumps(policy.as_dict()))) == policy
    for name in ("", "x" * 257, "a\nb"):
        with pytest.raises(vhdx.InvalidArgumentError):
            Policy(name, PolicyKind.DEDICATED, Settings())
    with pytest.raises(vhdx.InvalidArgumentError):
        Policy("zero", PolicyKind.DEDICATED, Settings(), UUID(int=0))
    for broken in ({}, {"name": "a", "kind": "no", "settings": {}, "policy_id": str(uuid4())}):
        with pytest.raises(vhdx.InvalidArgumentError):
            Policy.of(broken)


# ---- the file ----

GOLDEN = """{
 "checksum": "586f4ef3",
 "content": {
  "disks": {},
  "policies": []
 },
 "format": "vhdx qos",
 "generation": 7,
 "version": 1
}
"""


def test_golden_file():
    assert pack({"disks": {}, "policies": []}, 7) == GOLDEN


def test_a_file_keeps_what_was_saved(tmp_path):
    path = tmp_path / "qos.json"
    store = Store(path)
    store.save({"disks": {"/a": {"settings": {"maximum_iops": 3}, "policy": None}}, "policies": []})
    store.save(store.content)
    with pytest.raises(vhdx.InUseError):
        Store(path)
    store.close()
    again = Store(path)
    assert (again.content, again.generation) == (store.content, 2)
    assert {each.name for each in tmp_path.iterdir()} == {"qos.json", ".qos.json.lock"}
    again.close()


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_link_and_a_mode_stay(tmp_path, mode):
    path, link = tmp_path / "real", tmp_path / "link"
    path.write_text(GOLDEN)
    path.chmod(mode)
    link.symlink_to(path)
    store = Store(link)
    with pytest.raises(vhdx.InUseError):
        Store(path)
    store.save({"disks": {"/a": {}}, "policies": []})
    store.close()
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == mode
    assert Store(path).generation == 8


def test_a_name_that_is_not_durable_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "qos.json"
    path.write_text(GOLDEN)
    store, real = Store(path), os.fsync

    def fail_for_directories(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(5, "input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fail_for_directories)
    with pytest.raises(vhdx.HostIOError):
        store.save({"disks": {"/a": {}}, "policies": []})
    assert (path.read_text(), store.generation) == (GOLDEN, 7)
    store.close()


def test_policies_change_one_at_a_time(pool):
    domain = Domain(pool)
    domain.set_policy(Policy("gold", PolicyKind.DEDICATED, Settings()))
    names = [each.name for each in fields(Settings) if each.name.startswith("maximum_")] * 20
    barrier = threading.Barrier(len(names))

    def change(name, value):
        barrier.wait()
        change_qos(domain, ChangePolicy("gold", {name: value}))

    threads = [threading.Thread(target=change, args=(n, 1000)) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(domain.policy("gold").settings.limits()) == set(LimitKind)
    domain.close()


def test_minimums_of_a_group_fit_into_its_maximum(pool):
    domain = Domain(pool)
    domain.set_policy(Policy("all", PolicyKind.AGGREGATED, Settings(maximum_iops=100)))
    for name in "ab":
        domain.add_disk(name, f"/{name}", plane.Memory(MIB), Settings(minimum_iops=60))
    domain.set_disk("a", {}, "all")
    with pytest.raises(vhdx.InvalidArgumentError, match="120 for the disks of policy 'all'"):
        domain.set_disk("b", {}, "all")
    domain.set_disk("b", {"minimum_iops": 40}, "all")
    with pytest.raises(vhdx.InvalidArgumentError, match="above the maximum iops of 99"):
        change_qos(domain, ChangePolicy("all", {"maximum_iops": 99}))
    domain.close()


def test_what_contradicts_already_can_be_mended(pool, caplog):
    """As disks that were set apart may, when they are served together."""
    domain = Domain(pool)
    domain.set_policy(Policy("all", PolicyKind.AGGREGATED, Settings(maximum_iops=400)))
    for name in "abc":
        domain.add_disk(name, f"/{name}", plane.Memory(MIB))
    for name in "ab":  # as the file would say
        domain._registry.disks[name].policy_id = domain.policy("all").policy_id
        domain._registry.disks[name].settings = Settings(minimum_iops=300)
    domain.begin()
    assert "a minimum of 600 for the disks of policy 'all' together" in caplog.text
    domain.set_disk("c", {"maximum_iops": 1000})
    domain.set_policy(Policy("other", PolicyKind.DEDICATED, Settings(maximum_iops=10)))
    domain.set_disk("a", {"minimum_iops": 250})
    change_qos(domain, ChangePolicy("all", {"maximum_iops": 450}))
    for change in ({"minimum_iops": 260}, {"minimum_iops": 400}):
        with pytest.raises(vhdx.InvalidArgumentError, match="above the maximum iops of 450"):
            domain.set_disk("a", change)
    with pytest.raises(vhdx.InvalidArgumentError, match="above the maximum iops of 440"):
        change_qos(domain, ChangePolicy("all", {"maximum_iops": 440}))
    domain.close()


def test_a_maximum_goes_with_its_burst():
    saving = Settings(maximum_iops=10, burst_iops=5, credit_iops=5, credit_rate_iops=20)
    assert saving.changed({"maximum_iops": None}) == Settings()
    with pytest.raises(vhdx.InvalidArgumentError):
        saving.changed({"maximum_iops": None, "burst_iops": 3})
    both = saving.changed({"maximum_bandwidth": MIB, "burst_bytes": 5})
    assert both.limits()[plane.LimitKind.BYTES] == plane.Limit(MIB, 5)
    assert both.changed({"maximum_bandwidth": None}) == saving
    assert Settings(maximum_bandwidth=2 * MIB, burst_bytes=7).within(both).burst_bytes == 5
    assert Settings(maximum_bandwidth=MIB // 2, burst_bytes=7).within(both).burst_bytes == 7
    assert Settings(maximum_iops=2).within(both).burst_bytes == 5
    wide = Settings(maximum_bandwidth=10 * MIB, burst_bytes=MIB)  # the tighter one's burst, too
    assert wide.within(Settings(maximum_bandwidth=MIB)).burst_bytes == 0


def test_a_damaged_file_is_refused_and_left(tmp_path):
    path = tmp_path / "qos.json"
    good = GOLDEN.encode()
    for at in range(0, len(good), 7):
        broken = bytearray(good)
        broken[at] ^= 1
        path.write_bytes(broken)
        try:
            store = Store(path)
            found = store.content
            store.close()
        except (vhdx.DamagedError, vhdx.UnsupportedError):
            found = None
        # It may be white space, or the generation, which is only a count.
        assert found in (None, {"disks": {}, "policies": []})
        assert path.read_bytes() == broken
    for text in ("", "[]", "{}", "[" * 100000, GOLDEN[:50]):
        path.write_text(text)
        with pytest.raises(vhdx.DamagedError) as caught:
            Store(path)
        assert caught.value.reason == Reason.QOS_FILE


@pytest.mark.parametrize(
    "content",
    [
        {"disks": {"/a": 5}, "policies": []},
        {"disks": {"/a": {"settings": []}}, "policies": []},
        {"disks": {"/a": {"settings": {"maximum_iops": 0}}}, "policies": []},
        {"disks": {"/a": {"policy": "gold"}}, "policies": []},
        {"disks": {}, "policies": [5]},
        {"disks": {}, "policies": [{"name": "a"}]},
    ],
)
def test_content_that_cannot_be_is_the_files_fault(pool, tmp_path, content):
    path = tmp_path / "q"
    path.write_text(pack(content, 1))
    with pytest.raises(vhdx.DamagedError) as caught:
        Domain(pool, store=Store(path)).add_disk("a", "/a", plane.Memory(MIB))
    assert caught.value.path == str(path)


def test_a_file_that_is_none_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(vhdx.HostIOError):
        Store(tmp_path / "fifo")
    with pytest.raises(vhdx.HostIOError):
        Store(tmp_path / "nowhere" / "q")


def test_a_change_that_cannot_be_kept_is_none(pool, tmp_path):
    (tmp_path / "d").mkdir()
    domain = Domain(pool, store=Store(tmp_path / "d" / "q"))
    domain.add_disk("a", "/a", plane.Memory(MIB))
    domain.set_policy(gold := Policy("gold", PolicyKind.DEDICATED, Settings(maximum_iops=5)))
    domain.set_disk("a", {}, "gold")
    shutil.rmtree(tmp_path / "d")
    before = domain.report()
    for change in (
        lambda: domain.set_disk("a", {"maximum_iops": 3}),
        lambda: domain.remove_policy("gold"),
        lambda: domain.set_policy(Policy("silver", PolicyKind.DEDICATED, Settings())),
        lambda: domain.set_policy(replace(gold, settings=Settings(maximum_iops=9))),
    ):
        with pytest.raises(vhdx.HostIOError):
            change()
        after = domain.report()
        assert after.policies == before.policies
        assert after.disks[0].effective == before.disks[0].effective
    domain.close()
    for late in (domain.report, lambda: domain.set_disk("a", {})):
        with pytest.raises(vhdx.ClosedError):
            late()


# ---- figures and alerts ----


def facts(units, *, latency=1_000_000, size=4096):
    bins = [0] * 128
    bins[10] = units
    return MeterFacts(
        (units, 0), (units, 0), (units * size, 0), (units * latency, 0), (0, 0), (units, 0),
        tuple(bins),
    )  # fmt: skip


def test_figures_are_of_their_window():
    history = History()
    for tick in range(4 * 400):  # 100 a second, and 300 in the last ten seconds
        seconds = tick / 4
        units = int(100 * seconds + max(0, seconds - 390) * 200)
        history.add(seconds, facts(units).numbers())
        if tick % 8 == 0:
            history.thin(seconds)
    now, minute, five = (history.figures(window) for window in (1.0, 60.0, 300.0))
    assert now.normalized_iops == pytest.approx(300, abs=5)
    assert minute.normalized_iops == pytest.approx((50 * 100 + 10 * 300) / 60, rel=0.03)
    assert five.normalized_iops == pytest.approx((290 * 100 + 10 * 300) / 300, rel=0.03)
    assert now.latency == pytest.approx(1.0, rel=0.01)
    assert now.bandwidth == pytest.approx(300 * 4096, rel=0.02)
    assert len(history._samples) < 330


def test_alerts_come_once_and_go_once():
    watch, found = Watch(), []
    for tick in range(4 * 3600):
        seconds = tick / 4
        starved = 1000 <= seconds < 2000 or (seconds > 3000 and tick % 2)  # then it flickers
        figures = Figures(normalized_iops=50 if starved else 120, offered_iops=120)
        change = watch.evaluate(seconds, 100, figures, 1.0)
        if change is not None:
            found.append((change, seconds))
    (begins, began), (ends, ended) = found
    assert (begins, ends) == (True, False)
    assert 1000 <= began <= 1002
    assert 2000 <= ended <= 2005


def test_who_wants_little_has_no_alert():
    watch = Watch()
    for tick in range(100):
        idle = Figures(normalized_iops=20, offered_iops=20)
        assert watch.evaluate(tick / 4, 100, idle, 0.3) is None
        assert watch.evaluate(tick / 4, None, idle, 1.0) is None
    assert not watch.insufficient


# ---- the plane's face ----


def test_a_throttle_in_virtual_time():
    clock, pool = Clock(), plane.Pool(2)
    pacing = Pacing(pool, clock)
    limits = Limits(pacing, 8192)
    limits.set({LimitKind.UNITS: Limit(100)}, fresh=True)
    throttle = Throttle(plane.Memory(MIB), pacing, limits)
    assert throttle.size == MIB
    times = []

    def work():
        for _ in range(20):
            throttle.write(b"x" * 4096, 0)
            times.append(clock.now)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        if throttle.waiting()[0] and (due := clock.next) is not None:
            clock.advance(due)
    thread.join()
    assert times == [n * 10_000_000 for n in range(20)]
    with pytest.raises(vhdx.RangeError):
        throttle.write(b"x", MIB)
    with pytest.raises(vhdx.UnsupportedError):
        throttle.resize(2 * MIB)
    pool.close()


# ---- domains ----

CHANGES = ChangeDisk | ChangePolicy | RemovePolicy


@pytest.fixture
def pool():
    pool = plane.Pool(2)
    yield pool
    pool.close()


def disk_of(domain, name):
    return next(d for d in domain.report().disks if d.disk == name)


def test_policies_of_a_domain(pool, tmp_path):
    domain = Domain(pool, store=Store(tmp_path / "q"))
    try:
        for name in ("a", "b"):
            domain.add_disk(name, f"/{name}", plane.Memory(MIB))
        gold = Policy("gold", PolicyKind.DEDICATED, Settings(maximum_iops=500, minimum_iops=50))
        domain.set_policy(gold)
        domain.set_disk("a", {"maximum_iops": 800}, "gold")
        assert disk_of(domain, "a").effective.maximum_iops == 500
        assert disk_of(domain, "a").effective.minimum_iops == 50
        domain.remove_policy("gold")
        assert disk_of(domain, "a").status == Status.UNKNOWN_POLICY
        assert disk_of(domain, "a").effective.maximum_iops == 800
        with pytest.raises(vhdx.NotFoundError):
            domain.set_disk("b", {}, "gold")
        domain.set_policy(gold)  # it comes back
        assert disk_of(domain, "a").status == Status.OK
        with pytest.raises(vhdx.ExistsError):
            domain.set_policy(Policy("gold", PolicyKind.DEDICATED, Settings()))
        with pytest.raises(vhdx.InvalidArgumentError):
            domain.set_policy(Policy("gold", PolicyKind.AGGREGATED, Settings(), gold.policy_id))
        with pytest.raises(vhdx.InvalidArgumentError):
            domain.set_disk("b", {"maximum_iops": 10, "minimum_iops": 20})
        assert disk_of(domain, "b").settings == Settings()
    finally:
        domain.close()
    again = Domain(pool, store=Store(tmp_path / "q"))  # its lock is free again
    again.add_disk("other name", "/a", plane.Memory(MIB))
    assert disk_of(again, "other name").effective.maximum_iops == 500
    again.close()


def test_thousands_of_policies(pool):
    domain = Domain(pool)
    try:
        domain.add_disk("a", "/a", plane.Memory(MIB))
        for number in range(3000):
            kind = PolicyKind.AGGREGATED if number % 2 else PolicyKind.DEDICATED
            domain.set_policy(Policy(f"p{number}", kind, Settings(maximum_iops=number + 1)))
        domain.set_disk("a", {}, "p2999")
        assert len(domain.report().policies) == 3000
    finally:
        domain.close()


def test_a_subscription_that_finds_no_thread_is_tried_again(pool, monkeypatch, caplog):
    domain = Domain(pool)
    domain.add_disk("a", "/a", plane.Memory(MIB))
    flow = domain.connect("a", "me")

    def none_left(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        domain.subscribe()
        assert domain.report().disks[0].windows["1"].iops == 0
        assert "nothing is measured" in caplog.text
        assert domain.report().sampled_seconds == 0
        assert domain._sampler._thread is None
    domain.subscribe()
    assert domain._sampler._thread.is_alive()
    domain.disconnect(flow)
    domain.close()
    assert not domain._sampler._thread or not domain._sampler._thread.is_alive()


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {"change": "disk"},
        {"change": "disk", "name": 5},
        {"change": "disk", "name": "a", "settings": []},
        {"change": "disk", "name": "a", "settings": {"maximum_iops": "many"}},
        {"change": "disk", "name": "a", "settings": {"maximum_iops": None, "no": 1}},
        {"change": "disk", "name": "a", "policy": 7},
        {"change": "policy", "name": "x", "kind": "gold"},
        {"change": "policy", "name": "x", "kind": []},
        {"change": "policy", "name": "x", "policy_id": "1"},
        {"change": "fly", "name": "a"},
        {"change": "disk", "name": "a", "settings": {"maximum_iops": True}},
        {"change": "disk", "name": "a", "setting": {"maximum_iops": 5}},
    ],
)
def test_hostile_changes(pool, body):
    domain = Domain(pool)
    try:
        domain.add_disk("a", "/a", plane.Memory(MIB))
        before = domain.report().disks[0].settings
        with pytest.raises(vhdx.VhdxError):
            change_qos(domain, decode_request(json.dumps(body).encode(), CHANGES))
        assert domain.report().disks[0].settings == before
    finally:
        domain.close()


# ---- served ----


@pytest.fixture
def image(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 64 * MIB, block_size=MIB)
    return path


def test_limited_clients_lose_nothing(image):
    settings = {"disk": Settings(maximum_iops=2000, maximum_bandwidth=50 * MIB)}
    with vhdx.serve({"disk": image}, qos=settings) as server:
        clients = [Client(server.socket_path) for _ in range(3)]

        def work(me, client):
            for number in range(60):
                data = bytes([me * 60 + number]) * 4096
                assert client.ask(1, offset=(number * 3 + me) * 4096, payload=data)[0] == 0
            assert client.ask(3)[0] == 0

        threads = [threading.Thread(target=work, args=each) for each in enumerate(clients)]
        for thread in threads:
            thread.start()
        server.qos.set_disk("disk", {"maximum_iops": 100000})
        for thread in threads:
            thread.join()
        assert len(server.qos.report().flows) == 3
        for client in clients:
            client.close()
    with vhdx.open(image) as disk:
        for me in range(3):
            for number in range(60):
                page = disk.pread(4096, (number * 3 + me) * 4096)
                assert page == bytes([me * 60 + number]) * 4096


def test_a_server_ends_although_requests_wait(image):
    """What was accepted is done, and nobody waits a minute for it."""
    server = vhdx.serve({"disk": image}, qos={"disk": Settings(maximum_iops=1)})
    client = Client(server.socket_path)
    for number in range(50):
        data = bytes([number + 1]) * 4096
        client.send(1, number, number * 4096, len(data), payload=data)
    while server.qos.report().flows[0].waiting < 48:
        pass
    server.close()
    with vhdx.open(image) as disk:
        for number in range(50):
            assert disk.pread(4096, number * 4096) == bytes([number + 1]) * 4096


def test_what_a_dead_client_left_waiting_is_dropped(image):
    """Nobody was told that it was done, and nobody has to pay for it."""
    with vhdx.serve({"disk": image}, qos={"disk": Settings(maximum_iops=20)}) as server:
        client = Client(server.socket_path)
        for number in range(60):
            client.send(1, number, number * MIB, 4096, payload=b"x" * 4096)
        while server.qos.report().flows[0].waiting < 40:
            pass
        client.close()
        while server.qos.report().flows:
            pass
        late = Client(server.socket_path)
        assert late.ask(1, offset=0, payload=b"y" * 4096)[0] == 0
        assert late.ask(3)[0] == 0
        late.close()
    with vhdx.open(image) as disk:
        written = sum(disk.pread(1, n * MIB) != b"\0" for n in range(60))
    assert written < 40


def test_held_up_requests_leave_room_for_others(fast_path):
    paths = {}
    for name in ("slow", "free"):
        paths[name] = fast_path / f"{name}.vhdx"
        vhdx.create(paths[name], 64 * MIB, block_size=MIB)
    limits = vhdx.Limits(server_bytes=64 * MIB)
    with vhdx.serve(paths, limits=limits, qos={"slow": Settings(maximum_iops=1)}) as server:
        slow = [Client(server.socket_path, "slow") for _ in range(4)]
        for client in slow:
            client.send(0, 1, 0, 20 * MIB)
        free = Client(server.socket_path, "free")
        assert free.read(0, 20 * MIB) == bytes(20 * MIB)
        for client in [*slow, free]:
            client.close()
