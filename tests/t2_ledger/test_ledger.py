# SPDX-License-Identifier: MIT
"""The ledger: records in order, members that fail or are away, bad input, golden bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct
import threading
from uuid import UUID

import pytest

from vhdx import plane
from vhdx.errors import (
    ClosedError,
    DamagedError,
    HostIOError,
    InvalidArgumentError,
    NoSpaceError,
    PoisonedError,
    Reason,
    UnsupportedError,
)
from vhdx.format.checksum import seal
from vhdx.ledger import Ledger, Member, Record
from vhdx.ledger.layout import BLOCK, LARGEST_RECORD, MOST_MEMBERS, SMALLEST_REGION
from vhdx.ledger.writing import Writer

REGION = 64 * BLOCK
POOL = plane.shared_pool(plane.Level.SPACE)
IDENTITY = UUID(int=0x1234567890ABCDEF)


def memories(count, size=REGION):
    return [plane.Memory(size) for _ in range(count)]


def members(devices, length=REGION, offset=0):
    return [Member(device, offset, length) for device in devices]


def injectors(devices):
    return [plane.Injector(device, plane.Pool()) for device in devices]


def fill(ledger, *payloads):
    for payload in payloads:
        ledger.append(7, payload)
    ledger.commit()


def payloads(records):
    return [record.payload for record in records]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_what_was_committed_is_recovered_in_order(count):
    devices = memories(count)
    ledger = Ledger.create(members(devices), POOL)
    fill(ledger, b"one", b"", b"three" * 100)
    ledger.append(1 << 31, b"four")
    ledger.commit()
    ledger.append(5, b"never committed")
    expected = [
        Record(7, b"one"),
        Record(7, b""),
        Record(7, b"three" * 100),
        Record(1 << 31, b"four"),
    ]
    ledger.close()
    assert Ledger.read(members(devices)) == expected
    found = Ledger.recover(members(random.Random(1).sample(devices, count)), POOL)
    assert found.records == expected
    assert found.out_of_step == []
    assert found.ledger.identity == ledger.identity
    fill(found.ledger, b"five")
    found.ledger.close()
    assert payloads(Ledger.recover(members(devices), POOL).records)[-1] == b"five"


def test_a_checkpoint_stands_for_what_was_appended_before():
    devices = memories(3)
    ledger = Ledger.create(members(devices), POOL)
    for number in range(500):
        ledger.append(1, b"%d" % number)
        if ledger.room < BLOCK:
            ledger.checkpoint([(2, b"up to %d" % number)])
        else:
            ledger.commit()
    ledger.append(1, b"covered")
    ledger.checkpoint([(2, b"everything"), (3, b"more")])
    ledger.commit()  # nothing is left to do
    fill(ledger, b"last")
    ledger.close()
    found = Ledger.recover(members(devices), POOL)
    assert found.records == [Record(2, b"everything"), Record(3, b"more"), Record(7, b"last")]


def test_large_records_take_several_groups():
    size = 32 << 20
    devices = memories(2, size)
    ledger = Ledger.create(members(devices, size), POOL)
    large = [os.urandom(LARGEST_RECORD) for _ in range(5)]
    fill(ledger, *large)
    with pytest.raises(InvalidArgumentError):
        ledger.append(1, bytes(LARGEST_RECORD + 1))
    with pytest.raises(InvalidArgumentError):
        ledger.append(1 << 32, b"")
    ledger.checkpoint([(1, each) for each in large])
    fill(ledger, b"end")
    ledger.close()
    assert payloads(Ledger.recover(members(devices, size), POOL).records) == [*large, b"end"]


def test_a_full_ledger_refuses_and_keeps_what_was_appended():
    devices = memories(1, SMALLEST_REGION)
    ledger = Ledger.create(members(devices, SMALLEST_REGION), POOL)
    assert ledger.room == 0
    ledger.append(1, b"a")
    for _ in range(2):
        with pytest.raises(NoSpaceError):
            ledger.commit()
    with pytest.raises(NoSpaceError):
        ledger.checkpoint([(1, bytes(2 * BLOCK))])
    ledger.checkpoint([(1, b"a")])
    ledger.commit()
    ledger.close()
    assert payloads(Ledger.recover(members(devices, SMALLEST_REGION), POOL).records) == [b"a"]


def test_commits_of_threads_are_shared_and_complete():
    devices = memories(3)
    holds = injectors(devices)
    for hold in holds:
        hold.set(park=[plane.Operation.FLUSH], park_ns=2_000_000)
    ledger = Ledger.create(members(holds), POOL)
    before = ledger.room
    done = []

    def work(me):
        for number in range(5):
            ledger.append(1, b"%d %d" % (me, number))
            ledger.commit()
            done.append((me, number))

    threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before - ledger.room < 40 * BLOCK  # of 40 commits, most were shared
    ledger.close()
    found = payloads(Ledger.recover(members(holds), POOL).records)
    assert len(found) == 40
    for me in range(8):
        assert [r for r in found if r.startswith(b"%d " % me)] == [
            b"%d %d" % (me, n) for n in range(5)
        ]


def test_a_member_that_fails_is_left_out_and_comes_back_at_a_recovery():
    devices = memories(3)
    holds = injectors(devices)
    ledger = Ledger.create(members(holds), POOL)
    fill(ledger, b"all")
    holds[1].set(fail=[plane.Operation.FLUSH])
    fill(ledger, b"two of three")
    assert ledger.out_of_step == [1]
    fill(ledger, b"still")
    ledger.close()
    found = Ledger.recover(members(devices), POOL)
    assert payloads(found.records) == [b"all", b"two of three", b"still"]
    assert found.out_of_step == [1]
    found.ledger.close()
    for pair in ([0, 1], [1, 2], [0, 2]):  # it has everything again
        again = Ledger.recover(members([devices[i] for i in pair]), POOL)
        assert payloads(again.records) == [b"all", b"two of three", b"still"]
        again.ledger.close()


def test_a_commit_on_half_of_the_members_fails_and_poisons():
    devices = memories(4)
    holds = injectors(devices)
    ledger = Ledger.create(members(holds), POOL)
    fill(ledger, b"all")
    for hold in holds[:2]:
        hold.set(fail=[plane.Operation.WRITE])
    ledger.append(1, b"half")
    with pytest.raises(PoisonedError, match="2 of 4"):
        ledger.commit()
    with pytest.raises(PoisonedError):
        ledger.append(1, b"more")
    with pytest.raises(PoisonedError):
        ledger.checkpoint([])
    ledger.close()
    found = Ledger.recover(members(devices), POOL)
    assert payloads(found.records) in ([b"all"], [b"all", b"half"])


@pytest.mark.parametrize(("count", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_recovery_needs_more_than_half(count, needed):
    devices = memories(count)
    ledger = Ledger.create(members(devices), POOL)
    fill(ledger, b"x")
    ledger.close()
    before = [device.read(REGION, 0) for device in devices]
    if needed > 1:
        with pytest.raises(HostIOError) as caught:
            Ledger.recover(members(devices[: needed - 1]), POOL)
        assert caught.value.reason == Reason.NO_QUORUM
        assert [device.read(REGION, 0) for device in devices] == before
    found = Ledger.recover(members(devices[-needed:]), POOL)
    assert payloads(found.records) == [b"x"]
    assert found.out_of_step == list(range(count - needed))


def test_a_member_that_was_away_never_wins():
    devices = memories(3)
    ledger = Ledger.create(members(devices), POOL)
    fill(ledger, b"one")
    ledger.close()
    for number in range(4):
        here = [device for i, device in enumerate(devices) if i != number % 3]
        found = Ledger.recover(members(here), POOL)
        fill(found.ledger, b"round %d" % number)
        found.ledger.close()
    expected = [b"one", *(b"round %d" % number for number in range(4))]
    assert payloads(Ledger.read(members(devices))) == expected


def test_damaged_and_foreign_members_are_told_apart():
    devices, others = memories(3), memories(3)
    for each in (devices, others):
        ledger = Ledger.create(members(each), POOL)
        fill(ledger, b"x")
        ledger.close()
    with pytest.raises(DamagedError, match="different ledgers"):
        Ledger.recover(members([*devices, others[0]]), POOL)
    copy = plane.Memory(REGION)
    copy.write(devices[0].read(REGION, 0), 0)
    with pytest.raises(DamagedError, match="same member"):
        Ledger.recover(members([*devices, copy]), POOL)
    with pytest.raises(DamagedError, match="no ledger"):
        Ledger.recover(members(memories(2)), POOL)
    with pytest.raises(DamagedError, match="no ledger"):
        Ledger.recover(members(devices), POOL, identity=UUID(int=5))
    with pytest.raises(DamagedError, match="no ledger"):
        Ledger.recover([], POOL)


def test_no_damage_of_one_member_of_three_is_believed():
    rng = random.Random(5)
    devices = memories(3)
    ledger = Ledger.create(members(devices), POOL)
    expected = []
    for number in range(9):
        expected.append(rng.randbytes(rng.choice([3, 500, 6000])))
        fill(ledger, expected[-1])
        if number == 4:
            ledger.checkpoint([(1, each) for each in expected])
    ledger.close()
    good = devices[0].read(REGION, 0)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 5])):
            at = rng.randrange(0, 30 * BLOCK)
            bad[at : at + rng.choice([1, 8, 512])] = rng.randbytes(8)
        copy = plane.Memory(REGION)
        copy.write(bytes(bad[:REGION]), 0)
        assert payloads(Ledger.read(members([copy, *devices[1:]]))) == expected


def test_hostile_members_are_refused():
    rng = random.Random(6)
    device = plane.Memory(REGION)
    ledger = Ledger.create(members([device]), POOL)
    fill(ledger, b"abc", b"def")
    ledger.close()
    good = device.read(REGION, 0)
    for _ in range(2000):  # checksums are right, fields are not
        bad = bytearray(good)
        start = rng.choice([0, BLOCK, 2 * BLOCK, 3 * BLOCK, 34 * BLOCK])
        at = start + 8 + rng.randrange(0, 72) // 4 * 4
        bad[at : at + 4] = struct.pack(
            "<I", rng.choice([0, 1, 7, 4096, 1 << 31, rng.getrandbits(32)])
        )
        block = bad[start : start + BLOCK]
        seal(block)
        bad[start : start + BLOCK] = block
        copy = plane.Memory(REGION)
        copy.write(bytes(bad), 0)
        with contextlib.suppress(DamagedError, HostIOError, UnsupportedError):
            assert len(Ledger.read(members([copy]))) <= 4
            Ledger.recover(members([copy]), POOL).ledger.close()


def test_bad_arguments():
    with pytest.raises(InvalidArgumentError):
        Ledger.create([], POOL)
    with pytest.raises(InvalidArgumentError):
        Ledger.create(members([plane.Memory(REGION)], SMALLEST_REGION - 1), POOL)
    with pytest.raises(InvalidArgumentError):
        Ledger.create(members([plane.Memory(REGION)], REGION - BLOCK, 512), POOL)
    with pytest.raises(InvalidArgumentError):
        Ledger.create(members(memories(1) * (MOST_MEMBERS + 1)), POOL)
    with pytest.raises(InvalidArgumentError, match="name"):
        Ledger.create(members(memories(2)), POOL, names=[UUID(int=1)])
    with pytest.raises(InvalidArgumentError, match="name"):
        Ledger.create(members(memories(2)), POOL, names=[UUID(int=1)] * 2)
    ledger = Ledger.create(members(memories(1)), POOL)
    ledger.close()
    for call in (lambda: ledger.append(1, b""), lambda: ledger.checkpoint([])):
        with pytest.raises(ClosedError):
            call()


def test_a_member_of_a_newer_version_stops_the_recovery():
    devices = memories(3)
    ledger = Ledger.create(members(devices), POOL)
    fill(ledger, b"x")
    ledger.checkpoint([(1, b"y")])
    ledger.close()
    newest = devices[1].read(BLOCK, 0)  # superblock number 2
    block = bytearray(newest)
    block[8:12] = struct.pack("<I", 2)
    seal(block)
    devices[1].write(bytes(block), 0)
    with pytest.raises(UnsupportedError, match="version 2"):
        Ledger.recover(members(devices), POOL)


def test_a_member_that_cannot_be_read_is_not_taken_for_blank():
    (device,) = memories(1)
    ledger = Ledger.create(members([device]), POOL)
    ledger.close()
    (hold,) = injectors([device])
    hold.set(fail=[plane.Operation.READ])
    with pytest.raises(HostIOError):
        Ledger.recover(members([hold]), POOL)


@pytest.mark.parametrize("what", ["commit", "checkpoint", "superblock"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_write_that_is_interrupted_ends_the_ledger(count, what):
    """Whatever it left behind, nothing is acknowledged afterwards that a recovery does not find."""

    class Stopped(Writer):
        now = ""

        def make_durable(self, sides, name):
            if name == self.now:
                raise MemoryError
            return super().make_durable(sides, name)

    class Interrupted(Ledger):
        writer_type = Stopped

    devices = memories(count)
    ledger = Interrupted.create(members(devices), POOL)
    fill(ledger, b"one", b"two")
    Stopped.now = what
    ledger.append(7, b"three")
    with pytest.raises(MemoryError):
        ledger.commit() if what == "commit" else ledger.checkpoint([(7, b"all three")])
    Stopped.now = ""
    for call in (ledger.commit, lambda: ledger.append(7, b"x"), lambda: ledger.checkpoint([])):
        with pytest.raises(PoisonedError):
            call()
    ledger.close()
    found = payloads(Ledger.recover(members(devices), POOL).records)
    assert found in ([b"one", b"two"], [b"one", b"two", b"three"], [b"all three"])


def test_what_fails_before_the_first_write_can_be_tried_again():
    devices = memories(1)
    ledger = Ledger.create(members(devices), POOL)

    def parts():
        yield 1, b"x"
        raise ValueError("no more")

    ledger.append(1, b"kept")
    with pytest.raises(ValueError, match="no more"):
        ledger.checkpoint(parts())
    with pytest.raises(InvalidArgumentError):
        ledger.checkpoint([(1, bytes(LARGEST_RECORD + 1))])
    ledger.commit()
    ledger.close()
    assert payloads(Ledger.recover(members(devices), POOL).records) == [b"kept"]


def test_a_small_member_that_comes_back_is_left_out():
    large = memories(2, 4 * REGION)
    (small,) = memories(1)
    everyone = [*members(large, 4 * REGION), Member(small, 0, REGION)]
    ledger = Ledger.create(everyone, POOL)
    fill(ledger, b"one")
    ledger.close()
    away = Ledger.recover(everyone[:2], POOL).ledger
    fill(away, bytes(2 * REGION // 3), bytes(2 * REGION // 3))
    away.close()
    found = Ledger.recover(everyone, POOL)
    assert [len(each) for each in payloads(found.records)] == [3, 2 * REGION // 3, 2 * REGION // 3]
    assert found.out_of_step == [2]
    fill(found.ledger, b"more")
    found.ledger.close()
    assert payloads(Ledger.recover(everyone[:2], POOL).records)[-1] == b"more"


def test_a_full_ledger_of_large_records_is_recovered():
    rng = random.Random(3)
    for _ in range(20):
        size = rng.randrange(600, 1200) * BLOCK * 2
        devices = memories(1, size)
        ledger = Ledger.create(members(devices, size), POOL)
        expected = []
        while True:
            ledger.append(1, rng.randbytes(rng.choice([100, 700_000, 1_000_000, LARGEST_RECORD])))
            record = ledger._pending[-1].payload
            try:
                ledger.commit()
            except NoSpaceError:
                break
            expected.append(record)
        ledger.close()
        found = Ledger.recover(members(devices, size), POOL)
        found.ledger.close()
        assert payloads(found.records) == expected


def test_a_checkpoint_covers_what_was_appended_before_it():
    devices = memories(2)
    holds = injectors(devices)
    ledger = Ledger.create(members(holds), POOL)
    for hold in holds:
        hold.set(park=[plane.Operation.FLUSH], park_ns=100_000_000)
    ledger.append(1, b"first")
    thread = threading.Thread(target=ledger.commit)
    thread.start()
    while not ledger._writes:
        pass
    ledger.append(1, b"second")
    later = threading.Timer(0.03, lambda: ledger.append(1, b"third"))
    later.start()
    ledger.checkpoint([(2, b"first and second")])  # waits for the commit; meanwhile comes the third
    thread.join()
    later.join()
    ledger.commit()
    ledger.close()
    assert payloads(Ledger.recover(members(devices), POOL).records) == [b"first and second", b"third"]


def test_commits_wait_for_a_checkpoint_that_waits():
    """What is appended while a checkpoint waits, and committed, is not lost with the old area."""
    devices = memories(1)
    holds = injectors(devices)
    for attempt in range(20):
        holds[0].set()
        ledger = Ledger.create(members(holds), POOL)
        holds[0].set(park=[plane.Operation.FLUSH], park_ns=10_000_000)
        appended, lock = [], threading.Lock()

        def add(name):
            with lock:  # noqa: B023
                appended.append(name)  # noqa: B023
                ledger.append(1, name)  # noqa: B023
            ledger.commit()  # noqa: B023

        def many(me):
            for number in range(4):
                add(b"%d.%d" % (me, number))

        threads = [threading.Thread(target=many, args=(me,)) for me in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            with lock:  # nobody appends between the parts and the call's look at what is appended
                parts = [(2, b",".join(appended))]
                run = threading.Thread(target=ledger.checkpoint, args=(parts,))
                before = ledger._checkpoints
                run.start()
                while ledger._checkpoints == before and run.is_alive():
                    pass
            run.join()
        for thread in threads:
            thread.join()
        ledger.close()
        found = payloads(Ledger.recover(members(devices), POOL).records)
        names = [name for payload in found for name in payload.split(b",") if name]
        assert names == appended, attempt


def test_a_region_of_a_device_is_respected():
    device = plane.Memory(3 * REGION)
    device.write(b"\xaa" * (3 * REGION), 0)
    ledger = Ledger.create([Member(device, REGION, REGION)], POOL)
    fill(ledger, b"x")
    ledger.checkpoint([(1, b"y")])
    ledger.close()
    assert payloads(Ledger.recover([Member(device, REGION, REGION)], POOL).records) == [b"y"]
    assert device.read(REGION, 0) == device.read(REGION, 2 * REGION) == b"\xaa" * REGION


def test_golden_bytes(monkeypatch):
    monkeypatch.setattr("vhdx.ledger.founding.first_term", lambda: 1)
    device = plane.Memory(8 * BLOCK)
    names = [UUID(int=1), UUID(int=2)]
    other = plane.Memory(8 * BLOCK)
    ledger = Ledger.create(members([device, other], 8 * BLOCK), POOL, identity=IDENTITY, names=names)
    ledger.append(1, b"hello")
    ledger.append(2, b"12345678")
    ledger.commit()
    ledger.checkpoint([(3, b"checkpoint")])
    ledger.append(4, b"after")
    ledger.commit()
    content = device.read(8 * BLOCK, 0)
    superblock = content[:BLOCK]
    assert superblock[:4] == b"vlsb"
    assert struct.unpack_from("<II", superblock, 8) == (1, 0)  # version, index
    assert superblock[16:32] == IDENTITY.bytes
    # number, promised, term, first group, bytes of an area, area, members
    assert struct.unpack_from("<QQQQQII", superblock, 32) == (2, 1, 1, 2, 3 * BLOCK, 1, 2)
    assert struct.unpack_from("<QQ", superblock, 80) == (1, 1)  # base
    assert superblock[96:128] == names[0].bytes + names[1].bytes
    group = content[5 * BLOCK : 6 * BLOCK]
    assert group[:4] == b"vlgr"
    # bytes of the group and of its records, ledger, term, sequence, flags, checksum before
    assert struct.unpack_from("<II", group, 8) == (BLOCK, 24)
    assert struct.unpack_from("<QQII", group, 32) == (1, 2, 7, 0)
    assert group[56:80] == struct.pack("<II", 3, 10) + b"checkpoint" + bytes(6)
    after = content[6 * BLOCK : 7 * BLOCK]
    assert struct.unpack_from("<QQI", after, 32) == (1, 3, 4)
    assert after[52:56] == group[4:8]
    assert hashlib.sha256(content).hexdigest() == GOLDEN


def named(devices: dict[int, plane.Device]) -> list[Member]:
    return [Member(device, 0, REGION, UUID(int=i + 1)) for i, device in devices.items()]


def test_what_a_member_missed_is_known():
    """An old copy, one that was away, and one that lacks only what never succeeded."""
    devices = dict(enumerate(memories(3)))
    ledger = Ledger.create(named(devices), POOL, names=[UUID(int=i + 1) for i in devices])
    ledger.append(1, b"a")
    ledger.commit()
    old = devices[2].read(REGION, 0)
    ledger.append(1, b"b")
    ledger.commit()
    one_behind = devices[2].read(REGION, 0)
    ledger.append(1, b"c")
    ledger.commit()
    ledger.close()
    devices[2].write(one_behind, 0)  # the last commit may never have succeeded
    found = Ledger.recover(named(devices), POOL)
    assert (found.out_of_step, found.missed) == ([2], [])
    found.ledger.close()
    devices[2].write(old, 0)
    found = Ledger.recover(named(devices), POOL)
    assert (found.out_of_step, found.missed) == ([2], [UUID(int=3)])
    found.ledger.close()
    assert Ledger.recover(named(devices), POOL).missed == []


def test_a_member_that_lost_its_ledger_gets_it_again_if_most_have_it():
    devices = dict(enumerate(memories(3)))
    names = [UUID(int=i + 1) for i in devices]
    ledger = Ledger.create(named(devices), POOL, names=names)
    ledger.append(1, b"a")
    ledger.commit()
    ledger.close()
    devices[1].write(os.urandom(REGION), 0)
    with pytest.raises(HostIOError, match="1 of 3"):
        Ledger.recover(named({0: devices[0], 1: devices[1]}), POOL)
    found = Ledger.recover(named(devices), POOL)
    assert (found.out_of_step, found.missed) == ([1], [names[1]])
    found.ledger.close()
    assert payloads(Ledger.read(named({1: devices[1], 2: devices[2]}))) == [b"a"]


def test_members_join_and_leave():
    devices = dict(enumerate(memories(4)))
    first = {i: devices[i] for i in (0, 1)}
    ledger = Ledger.create(named(first), POOL, names=[UUID(int=1), UUID(int=2)])
    ledger.append(1, b"a")
    ledger.add(named({2: devices[2]})[0], [(1, b"a")])
    assert [name.int for name in ledger.members] == [1, 2, 3]
    with pytest.raises(InvalidArgumentError):
        ledger.add(named({2: devices[2]})[0], [])
    with pytest.raises(InvalidArgumentError):
        ledger.remove(UUID(int=9), [])
    with pytest.raises(NoSpaceError):
        ledger.add(Member(devices[3], 0, SMALLEST_REGION, UUID(int=4)), [(1, bytes(9000))])
    ledger.append(1, b"b")
    ledger.commit()
    ledger.remove(UUID(int=1), [(1, b"ab")])
    ledger.append(1, b"c")
    ledger.commit()
    ledger.close()
    found = Ledger.recover(named(devices), POOL)  # those that left, or never joined, do not count
    assert payloads(found.records) == [b"ab", b"c"]
    assert found.out_of_step == []
    assert [name.int for name in found.ledger.members] == [2, 3]
    found.ledger.close()
    with pytest.raises(HostIOError, match="members of the ledger are there"):
        Ledger.recover(named({0: devices[0], 1: devices[1]}), POOL)


GOLDEN = "9056c8745488ed0b4fd7ba9792a7b2a81c37ee45b5eddd2994f7a374a8b20201"
