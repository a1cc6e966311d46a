# SPDX-License-Identifier: MIT
"""Every crash state of ledgers, with members gone or old; and that each barrier is needed.

A run commits numbers, writes checkpoints and recovers. Each of its crash states is recovered from a
set of members that has a majority; some are used further, by other sets of members; and some
recoveries are recorded themselves, and crash again.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Iterator
from uuid import UUID

import pytest

from tests.recording import Crash, Log, Recorder, crash_states_of_several
from vhdx import plane
from vhdx.errors import DamagedError, HostIOError, PoisonedError
from vhdx.ledger import Ledger, Member, Record
from vhdx.ledger.layout import BLOCK
from vhdx.ledger.writing import Writer

REGION = 18 * BLOCK
POOL = plane.shared_pool(plane.Level.SPACE)
IDENTITY = UUID(int=77)
ADDED, ALL = 1, 2


def folded(records: list[Record]) -> list[int]:
    """The numbers that the records stand for."""
    numbers: list[int] = []
    for record in records:
        raw = [
            int.from_bytes(record.payload[i : i + 4], "little")
            for i in range(0, len(record.payload), 4)
        ]
        numbers = raw if record.kind == ALL else numbers + raw
    return numbers


def packed(numbers: list[int]) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)


def members(leaves) -> list[Member]:
    return [Member(leaf, 0, REGION) for leaf in leaves]


class Run:
    """A recorded life of a ledger.

    Attributes:
        numbers: what was appended, in order, each with the moments before and after its commit.
    """

    def __init__(self, bases: list[bytes]) -> None:
        self.log = Log()
        self.bases = bases
        recorders = [Recorder(base, log=self.log, leaf=i) for i, base in enumerate(bases)]
        self.leaves = [plane.Callback(recorder, REGION) for recorder in recorders]
        self.numbers: list[int] = []
        self.began: list[int] = []
        self.acknowledged: list[int] = []  # moments; parallel to numbers
        self.since = 0
        self.ledger: Ledger | None = None
        self._lock = threading.Lock()
        log = self.log

        class Named(Writer):
            """Says which barrier it makes."""

            def make_durable(self, sides, what):
                log.site = what
                return super().make_durable(sides, what)

        class NamedLedger(Ledger):
            writer_type = Named

        self.named = NamedLedger

    def create(self) -> None:
        self.ledger = self.named.create(members(self.leaves), POOL, identity=IDENTITY)
        self.since = self.log.now

    def recover(self, chosen: list[int]) -> list[int]:
        found = self.named.recover(members([self.leaves[i] for i in chosen]), POOL)
        self.ledger = found.ledger
        return folded(found.records)

    def add(self, number: int) -> None:
        with self._lock:
            index = len(self.numbers)
            self.numbers.append(number)
            self.began.append(self.log.now)
            self.acknowledged.append(1 << 62)
            self.ledger.append(ADDED, packed([number]))
        self.ledger.commit()
        self.acknowledged[index] = self.log.now

    def acknowledged_at(self, now: int) -> list[int]:
        """What must survive a crash at this moment: all up to the last whose commit had returned."""
        done = [i for i, end in enumerate(self.acknowledged) if end < now]
        return self.numbers[: max(done) + 1] if done else []

    def appended_at(self, now: int) -> list[int]:
        return [n for n, began in zip(self.numbers, self.began, strict=True) if began < now]

    def checkpoint(self) -> None:
        with self._lock:  # what is appended is in the checkpoint
            numbers = list(self.numbers)
            self.ledger.checkpoint([(ALL, packed(numbers))])
            for i in range(len(numbers)):
                self.acknowledged[i] = min(self.acknowledged[i], self.log.now)


def life(count: int, seed: int) -> Run:
    """Commits of two threads, checkpoints, and recoveries with a member away."""
    rng = random.Random(seed)
    run = Run([bytes(REGION)] * count)
    run.create()
    fresh = iter(range(1, 1 << 30))

    def work():
        for _ in range(3):
            run.add(next(fresh))

    for part in range(3):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run.checkpoint()
        run.add(next(fresh))
        run.ledger.close()
        away = rng.randint(0, (count - 1) // 2) if part < 2 else 0
        chosen = rng.sample(range(count), count - away)
        assert run.recover(chosen) == run.numbers
        run.add(next(fresh))
    run.ledger.close()
    return run


def recovered(devices, chosen) -> tuple[Ledger, list[int]]:
    found = Ledger.recover(members([devices[i] for i in chosen]), POOL)
    return found.ledger, folded(found.records)


def some(crash: Crash, rng: random.Random) -> list[int]:
    """Members from which it must be recovered: any majority, or all if one of them is old.

    Of an old member, what was acknowledged may be on only one other that is in step.
    """
    least = len(crash.here) if any(crash.is_old) else len(crash.contents) // 2 + 1
    return rng.sample(crash.here, rng.randint(least, len(crash.here)))


def wrong(crash: Crash, least: list[int], most: list[int], rng: random.Random) -> str | None:
    """None, or why a crash state is not recovered as it should be.

    Args:
        crash: what each member holds.
        least: what was acknowledged: all of it must be there.
        most: what was appended; what is there must be a prefix of this.
        rng: chooses members.
    """
    devices: dict[int, plane.Device] = {}
    for i in crash.here:
        devices[i] = plane.Memory(REGION)
        devices[i].write(bytes(crash.contents[i] or b""), 0)
    try:
        ledger, numbers = recovered(devices, some(crash, rng))
    except (DamagedError, HostIOError) as error:
        return f"it is not recovered: {error}"
    if numbers[: len(least)] != least:
        return f"{least} was acknowledged, {numbers} is there"
    if numbers != most[: len(numbers)]:
        return f"{numbers} is there, {most} was appended"
    # Use it further, with other members each time; those that were away come back.
    for further in range(rng.choice([0, 0, 1, 3])):
        number = 1_000_000 + rng.getrandbits(20) * 8 + further
        ledger.append(ADDED, packed([number]))
        ledger.commit()
        ledger.close()
        expected = [*numbers, number]
        majority = len(crash.contents) // 2 + 1
        chosen = rng.sample(crash.here, rng.randint(majority, len(crash.here)))
        ledger, numbers = recovered(devices, chosen)
        if numbers != expected:
            return f"{expected} was committed after the crash, {numbers} is there"
    ledger.close()
    return None


def crashes(
    count: int, seed: int, subsets: int, *, without: str | None = None, again: float = 0.01
) -> Iterator[str | None]:
    """For each crash state of a life, and of some recoveries from them, what is wrong.

    Args:
        count: members.
        seed: of everything random.
        subsets: states for each moment.
        without: barriers of this name do nothing.
        again: the part of the states whose recovery is recorded and crashes, too.
    """
    rng = random.Random(seed)
    run = life(count, seed)
    for crash in crash_states_of_several(
        run.log,
        run.bases,
        rng,
        subsets,
        faulty=(count - 1) // 2,
        without=without,
        since=run.since,
    ):
        least, most = run.acknowledged_at(crash.now), run.appended_at(crash.now)
        failure = wrong(crash, least, most, rng)
        yield failure
        if failure is None and rng.random() < again:
            yield from _crash_again(crash, least, most, rng, subsets, without)


def _crash_again(
    crash: Crash,
    least: list[int],
    most: list[int],
    rng: random.Random,
    subsets: int,
    without: str | None,
) -> Iterator[str | None]:
    """Records a recovery from a crash state and a commit, and crashes during these, too."""
    run = Run([bytes(content or bytes(REGION)) for content in crash.contents])
    numbers = run.recover(some(crash, rng))
    run.numbers = list(numbers)
    run.began, run.acknowledged = [0] * len(numbers), [1 << 62] * len(numbers)
    opened = run.log.now
    run.add(2_000_000 + rng.getrandbits(20))
    run.ledger.close()
    for second in crash_states_of_several(
        run.log, run.bases, rng, subsets, faulty=0, without=without
    ):
        for i in range(len(crash.contents)):
            if crash.contents[i] is None:
                second.contents[i] = None
        second.is_old = list(crash.is_old)
        if second.now <= opened:
            yield wrong(second, least, most, rng)
            continue
        least = run.acknowledged_at(second.now) or numbers
        yield wrong(second, least, run.appended_at(second.now), rng)


def named(leaves: dict[int, plane.Device]) -> list[Member]:
    return [Member(leaf, 0, REGION, UUID(int=i + 1)) for i, leaf in leaves.items()]


def changing_life(seed: int) -> Run:
    """Members join and leave; commits in between, and recoveries."""
    rng = random.Random(seed)
    run = Run([bytes(REGION)] * 5)
    leaves = dict(enumerate(run.leaves))
    first = [0, 1, 2]
    run.ledger = run.named.create(
        [Member(leaves[i], 0, REGION) for i in first],
        POOL,
        identity=IDENTITY,
        names=[UUID(int=i + 1) for i in first],
    )
    run.since = run.log.now
    fresh = iter(range(1, 1 << 30))
    present = set(first)
    for _ in range(6):
        run.add(next(fresh))
        away = [i for i in leaves if i not in present]
        parts = [(ALL, packed(run.numbers))]
        if len(present) < 5 and (len(present) == 3 or rng.random() < 0.5):
            joins = rng.choice(away)
            run.ledger.add(named({joins: leaves[joins]})[0], parts)
            present.add(joins)
        else:
            leaves_it = rng.choice(sorted(present))
            run.ledger.remove(UUID(int=leaves_it + 1), parts)
            present.remove(leaves_it)
        assert {name.int - 1 for name in run.ledger.members} == present
        if rng.random() < 0.4:
            run.ledger.close()
            found = run.named.recover(named(leaves), POOL)
            run.ledger = found.ledger
            assert folded(found.records) == run.numbers
            assert found.missed == []
    run.add(next(fresh))
    run.ledger.close()
    return run


def changing_crashes(seed: int, subsets: int, without: str | None = None) -> Iterator[str | None]:
    rng = random.Random(seed)
    run = changing_life(seed)
    for crash in crash_states_of_several(
        run.log, run.bases, rng, subsets, faulty=1, without=without, since=run.since
    ):
        devices: dict[int, plane.Device] = {}
        for i in rng.sample(crash.here, len(crash.here)):
            devices[i] = plane.Memory(REGION)
            devices[i].write(bytes(crash.contents[i] or b""), 0)
        least, most = run.acknowledged_at(crash.now), run.appended_at(crash.now)
        for again in range(3):
            try:
                found = Ledger.recover(named(devices), POOL)
            except (DamagedError, HostIOError) as error:
                yield f"it is not recovered: {error}"
                break
            numbers = folded(found.records)
            if numbers[: len(least)] != least or numbers != most[: len(numbers)]:
                yield f"{numbers} is there, {least} was acknowledged, {most} was appended"
                break
            number = 3_000_000 + again
            found.ledger.append(ADDED, packed([number]))
            found.ledger.commit()
            found.ledger.close()
            least = most = [*numbers, number]
            # Others than before: any majority of those that are members, in any order.
            inside = [i for i in devices if UUID(int=i + 1) in found.ledger.members]
            count = len(found.ledger.members) // 2 + 1
            if len(inside) > count and not any(crash.is_old):
                devices.pop(rng.choice(inside))
        else:
            yield None


@pytest.mark.parametrize("seed", range(3))
def test_every_crash_state_while_members_change(seed):
    seen = list(changing_crashes(seed, subsets=4))
    assert len(seen) > 100
    assert not any(seen), next(each for each in seen if each)


@pytest.mark.parametrize("site", ["checkpoint", "joining", "superblock"])
def test_each_barrier_of_a_change_is_needed(site):
    for seed in range(40):
        if any(changing_crashes(100 + seed, subsets=6, without=site)):
            return
    pytest.fail(f"without the barrier {site!r} nothing went wrong")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_crash_state(count):
    seen = list(crashes(count, seed=count, subsets=5, again=0.05))
    assert len(seen) > 200
    assert not any(seen), next(each for each in seen if each)


@pytest.mark.soak
def test_crash_states_long():
    wanted = int(os.environ.get("VHDX_TEST_STATES", "100000"))
    seen = 0
    for seed in range(1 << 30):
        count = random.Random(seed).choice([1, 2, 3, 3, 5])
        for failure in itertools.chain(
            crashes(count, 1000 + seed, subsets=12), changing_crashes(1000 + seed, subsets=4)
        ):
            assert failure is None, (seed, failure)
            seen += 1
        if seen >= wanted:
            break
    print(seen, "crash states")


@pytest.mark.parametrize("site", ["checkpoint", "superblock", "commit"])
def test_each_barrier_is_needed(site):
    for seed in range(40):
        for failure in crashes(3 if seed % 2 else 1, seed, subsets=6, without=site, again=0.2):
            if failure is not None:
                return
    pytest.fail(f"without the barrier {site!r} nothing went wrong")


def interrupted_recovery(*, promise_lasts: bool) -> list[bool]:
    """Whether a commit survives that followed an interrupted recovery, by who is there afterwards.

    Member 0 alone has the last commit, which was never acknowledged. A recovery by all three makes
    it part of its checkpoint, and is interrupted when only member 0 has that. Members 1 and 2 have
    the promise, unless its barrier did nothing. They recover without member 0, and commit.
    """
    leaves = [plane.Memory(REGION) for _ in range(3)]
    holds = [plane.Injector(leaf, plane.Pool()) for leaf in leaves]
    ledger = Ledger.create(members(holds), POOL)
    for hold in holds[1:]:
        hold.set(fail=[plane.Operation.WRITE])
    ledger.append(ADDED, packed([1]))
    with pytest.raises(PoisonedError):
        ledger.commit()
    kept = {i: leaves[i].read(REGION, 0) for i in (1, 2)}

    class Seen(Writer):
        def make_durable(self, sides, what):
            done = super().make_durable(sides, what)
            if what == "promise" and promise_lasts:
                kept.update({i: leaves[i].read(REGION, 0) for i in (1, 2)})
            return done

    class Interrupted(Ledger):
        writer_type = Seen

    Interrupted.recover(members(leaves), POOL).ledger.close()
    for i in (1, 2):
        leaves[i].write(kept[i], 0)
    second = Ledger.recover(members(leaves[1:]), POOL)
    second.ledger.append(ADDED, packed([2]))
    second.ledger.commit()
    second.ledger.close()
    orders = [[0, 1], [1, 0], [0, 2], [2, 0], [0, 1, 2], [2, 1, 0]]
    return [folded(Ledger.read(members([leaves[i] for i in each]))) == [2] for each in orders]


def test_an_interrupted_recovery_never_shares_its_term():
    assert all(interrupted_recovery(promise_lasts=True))
    assert not all(interrupted_recovery(promise_lasts=False))
