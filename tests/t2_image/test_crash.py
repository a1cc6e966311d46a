# SPDX-License-Identifier: MIT
"""Every crash state of workloads with threads; and that each barrier is needed."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import vhdx
from tests.recording import (
    SECTOR,
    History,
    Recorder,
    Window,
    broken_order,
    crash_states,
    digest,
    open_recorded,
)
from tests.reference import Refused, read_reference
from vhdx.errors import VhdxError
from vhdx.format import header as headers
from vhdx.image.vhdx import allocator
from vhdx.units import MIB

SIZE = 6 * MIB
BLOCK = 1 * MIB


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Content of the images that workloads begin with, and a directory with their parent."""
    directory = tmp_path_factory.mktemp("base")
    empty, parent, child = (directory / f"{n}.vhdx" for n in ("empty", "parent", "child"))
    vhdx.create(empty, SIZE, block_size=BLOCK)
    vhdx.create(parent, SIZE, block_size=BLOCK)
    with vhdx.open(parent, "r+") as disk:
        disk.pwrite(b"P" * (SIZE - BLOCK), 512)
    vhdx.create(child, parent=parent, block_size=BLOCK)
    found = {"empty": empty.read_bytes(), "child": child.read_bytes()}
    child.unlink()
    found["path"] = os.fspath(child)
    # What is left after a crash in which nothing that the log holds reached its place.
    recorder = Recorder(found["empty"])
    disk = open_recorded(recorder)
    for block in (4, 1, 2):
        disk.pwrite(b"d" * 4096, block * BLOCK + 512)
    disk.flush()
    window = Window(bytearray(recorder.base))
    for event in recorder.events:
        if event.kind == "flush":
            window.pass_barrier(event)
        else:
            window.doubtful.append(event)
    disk.handle.abandon()
    disk._closed = True  # it is gone, as after a crash
    disk._forget()
    found["dirty"] = bytes(window.durable)
    return found


@pytest.fixture(autouse=True)
def small_grants(monkeypatch):
    """Files grow by little, so that a state is not mostly zeros."""
    monkeypatch.setattr(allocator, "_FIRST_GRANT", 2 * BLOCK)
    monkeypatch.setattr(allocator, "_LARGEST_GRANT", 2 * BLOCK)


@dataclass
class Run:
    """One recorded workload."""

    recorder: Recorder
    history: History
    rng: random.Random
    path: str
    disk: vhdx.Disk | None = None
    since: int = 0  # the moment from which on it crashes

    def open(self) -> vhdx.Disk:
        self.recorder.mark("open")
        self.disk = open_recorded(self.recorder, path=self.path)
        return self.disk

    def write(self, rng, offset, length, value, *, fua=False):
        data = bytes([value]) * length
        disk = self.disk
        self.history.change(offset, data, lambda: disk.pwrite(data, offset, fua=fua), fua=fua)

    def blank(self, block, *, trim):
        disk = self.disk
        do = disk.trim if trim else disk.zero
        self.history.change(block * BLOCK, bytes(BLOCK), lambda: do(block * BLOCK, BLOCK))

    def flush(self):
        self.history.flush(self.disk.flush)

    def close(self):
        self.history.flush(self.disk.close)


def part(rng, mine, sizes=(512, 4096, 16384)):
    """A range inside the blocks of ``mine``."""
    length = rng.choice(sizes)
    block = rng.choice(mine)
    offset = rng.randrange((BLOCK - length) // SECTOR + 1) * SECTOR
    return block * BLOCK + offset, length


def in_threads(run: Run, count: int, work: Callable[[random.Random, list[int]], None]) -> None:
    """Runs ``work`` in threads, each with blocks of its own."""
    failures = []

    def guarded(number):
        try:
            work(random.Random(run.rng.random()), list(range(number, SIZE // BLOCK, count)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def mixed_work(run: Run, steps: int, weights: dict[str, int], sizes=(512, 4096, 16384)):
    def work(rng, mine):
        for step in range(steps):
            what = rng.choices(list(weights), list(weights.values()))[0]
            if what in {"write", "fua"}:
                offset, length = part(rng, mine, sizes)
                run.write(rng, offset, length, step % 255 + 1, fua=what == "fua")
            elif what == "flush":
                run.flush()
            else:
                run.blank(rng.choice(mine), trim=what == "trim")

    return work


def allocating(run: Run, steps: int) -> None:
    run.open()
    in_threads(run, 3, mixed_work(run, steps, {"write": 6, "flush": 2}))
    run.close()


def overwriting(run: Run, steps: int) -> None:
    run.open()
    for block in range(SIZE // BLOCK):
        run.write(run.rng, block * BLOCK, 4096, 7)
    run.flush()
    in_threads(run, 3, mixed_work(run, steps, {"write": 5, "fua": 2, "flush": 2}))
    run.close()


def reusing(run: Run, steps: int) -> None:
    """Space of trimmed blocks goes to others."""
    run.open()
    weights = {"write": 6, "trim": 3, "flush": 2}
    in_threads(run, 2, mixed_work(run, steps, weights))
    run.close()


def zeroing(run: Run, steps: int) -> None:
    run.open()
    in_threads(run, 2, mixed_work(run, steps, {"write": 5, "zero": 3, "flush": 2}))
    run.close()


def bitmaps(run: Run, steps: int) -> None:
    """A child whose blocks become present sector by sector."""
    run.open()
    weights = {"write": 8, "fua": 1, "trim": 1, "zero": 1, "flush": 3}
    in_threads(run, 2, mixed_work(run, steps, weights, sizes=(512, 1024, 4096)))
    run.close()


def wrapping(run: Run, steps: int) -> None:
    """So many commits that the log is used from its front again; crashes from shortly before on.

    The crash comes at the first, second or third time.
    """
    run.open()
    commits = ((1 << 20) // 8192 - 2) * run.rng.choice([1, 2, 3])  # of the smallest entry
    for step in range(commits + steps):
        if step == commits - 4:
            run.since = run.recorder.now
        offset, length = part(run.rng, [step % 6])
        run.write(run.rng, offset, length, step % 255 + 1)
        run.flush()
        run.blank(step % 6, trim=True)
    run.close()


def reopening(run: Run, steps: int) -> None:
    """Closed and opened again all the time, with a replay now and then."""
    for _ in range(max(2, steps // 6)):
        run.open()
        for _ in range(3):
            offset, length = part(run.rng, list(range(SIZE // BLOCK)))
            run.write(run.rng, offset, length, run.rng.randrange(1, 256))
            if run.rng.random() < 0.5:
                run.flush()
        run.close()


def replaying(run: Run, steps: int) -> None:
    """The log that a crash left behind is replayed, and the image written again."""
    run.open()
    offset, length = part(run.rng, list(range(SIZE // BLOCK)))
    run.write(run.rng, offset, length, 99)
    run.close()


def resizing(run: Run, steps: int) -> None:
    """Smaller and larger again: what was cut off must not come back."""
    size = SIZE
    for step in range(max(4, steps // 3)):
        disk = run.open()
        if step % 2 == 0:
            offset, length = part(run.rng, list(range(size // BLOCK)))
            run.write(run.rng, offset, length, step % 255 + 1)
            run.write(run.rng, size - 4096, 4096, 77)
            run.flush()
        size += run.rng.randrange(1, 120) * 4096 * (-1 if step % 2 == 0 else 1)
        run.history.resize(size, lambda: disk.resize(size, shrink=True, unsafe=True))  # noqa: B023
        run.close()


def compacting(run: Run, steps: int) -> None:
    """Blocks of zeros go, others move down, the file gets shorter, while a thread writes."""
    disk = run.open()
    for block in range(SIZE // BLOCK):
        run.write(run.rng, block * BLOCK + 4096, 8192, block + 1)
    run.flush()
    for block in (0, 2):
        run.blank(block, trim=True)
    run.write(run.rng, BLOCK + 4096, 8192, 0)
    run.flush()
    mine = [4, 5]
    work = mixed_work(run, steps // 2, {"write": 4, "flush": 1})
    writer = threading.Thread(target=work, args=(random.Random(run.rng.random()), mine))
    writer.start()
    disk.compact()
    writer.join()
    disk.compact()
    run.close()


def compacting_a_child(run: Run, steps: int) -> None:
    """Partly present blocks move while threads write sectors that were the parent's."""
    disk = run.open()
    blocks = SIZE // BLOCK
    for block in range(blocks):
        run.write(run.rng, block * BLOCK + 512 * (block % 7), 512, block + 1)
    run.flush()
    work = mixed_work(run, steps, {"write": 6, "fua": 1, "flush": 2}, sizes=(512, 1024))
    writers = [
        threading.Thread(target=work, args=(random.Random(run.rng.random()), mine))
        for mine in (list(range(2, blocks, 2)), list(range(3, blocks, 2)))
    ]
    for writer in writers:
        writer.start()
    for step in range(4):
        run.blank(step % 2, trim=True)  # its place is free after a commit, and others move there
        run.flush()
        disk.compact()
        run.write(run.rng, step % 2 * BLOCK + 1024, 512, 99)
    for writer in writers:
        writer.join()
    disk.compact()
    run.close()


def growing(run: Run, steps: int) -> None:
    disk = run.open()
    size = SIZE
    for step in range(max(3, steps // 5)):
        offset, length = part(run.rng, list(range(SIZE // BLOCK)))
        run.write(run.rng, offset, length, step % 255 + 1)
        size += run.rng.randrange(1, 700) * 4096
        run.history.resize(size, lambda: disk.resize(size))  # noqa: B023
    run.close()


def shrinking(run: Run, steps: int) -> None:
    disk = run.open()
    for block in range(SIZE // BLOCK):
        run.write(run.rng, block * BLOCK, 8192, 9)
    run.flush()
    size = SIZE
    for step in range(max(3, steps // 5)):
        size -= run.rng.randrange(1, 60) * 4096
        run.history.resize(size, lambda: disk.resize(size, shrink=True, unsafe=True))  # noqa: B023
        run.write(run.rng, step * 4096, 4096, step + 20)
        run.flush()
    run.close()


WORKLOADS = {
    "allocating": (allocating, "empty"),
    "overwriting": (overwriting, "empty"),
    "reusing": (reusing, "empty"),
    "zeroing": (zeroing, "empty"),
    "bitmaps": (bitmaps, "child"),
    "wrapping": (wrapping, "empty"),
    "reopening": (reopening, "empty"),
    "replaying": (replaying, "dirty"),
    "growing": (growing, "empty"),
    "resizing": (resizing, "empty"),
    "shrinking": (shrinking, "empty"),
    "compacting": (compacting, "empty"),
    "compacting a child": (compacting_a_child, "child"),
}


def record(bases, name: str, seed: int, steps: int) -> Run:
    workload, base = WORKLOADS[name]
    recorder = Recorder(bases[base], jitter=seed)
    probe = open_recorded(Recorder(bases[base], recording=False), write=False, path=bases["path"])
    with probe:
        history = History(recorder, probe.pread(SIZE, 0))
    run = Run(recorder, history, random.Random(seed), bases["path"])
    workload(run, steps)
    return run


def verdict(run: Run, now: int, data: bytearray) -> tuple[str | None, bool]:
    """None or what is wrong with the state, and whether its log was dirty."""
    write = now % 2 == 0
    try:
        with open_recorded(Recorder(data, recording=False), write=write, path=run.path) as disk:
            content = disk.pread(disk.size, 0)
        copies = [bytes(data[at : at + 4096]) for at in headers.HEADER_OFFSETS]
        found = [headers.parse_header(copy, i) for i, copy in enumerate(copies)]
        dirty = headers.choose_header(*found).log_guid != headers.NIL
        read_reference(data)  # a second reader finds no rule broken
    except (VhdxError, Refused) as error:
        return f"it does not open: {error!r}", False
    return run.history.wrong(content, now), dirty


@dataclass
class Tally:
    """What was found of the states of one workload, of several runs or one.

    Attributes:
        seen: states, by their content.
        dirty: how many were opened with a dirty log.
        found: those that are wrong.
        structures: what stands before the payload of those that QEMU has opened.
        peers: how many QEMU has opened.
    """

    seen: set[int] = field(default_factory=set)
    structures: set[int] = field(default_factory=set)
    dirty: int = 0
    found: list[tuple[int, str]] = field(default_factory=list)
    peers: int = 0

    @property
    def states(self) -> int:
        return len(self.seen)


def qemu_verdict(run: Run, now: int, data: bytearray, directory: Path) -> str | None:
    """None, or what is wrong with the state once QEMU has opened it for writing.

    QEMU replays the log and reads all of it; then the image that it leaves is opened here.
    """
    image, raw = directory / "state.vhdx", directory / "state.raw"
    image.write_bytes(data)
    for command in (
        ["qemu-io", "-f", "vhdx", "-c", "flush", image],
        ["qemu-img", "convert", "-f", "vhdx", "-O", "raw", image, raw],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            return f"{command[0]} fails: {done.stdout} {done.stderr}"
    if (wrong := run.history.wrong(raw.read_bytes(), now)) is not None:
        return f"read by QEMU: {wrong}"
    try:
        with vhdx.open(image) as disk:
            wrong = run.history.wrong(disk.pread(disk.size, 0), now)
    except VhdxError as error:
        return f"after QEMU it does not open: {error!r}"
    return None if wrong is None else f"after QEMU: {wrong}"


def check(
    run: Run,
    subsets: int,
    *,
    without: str | None = None,
    limit: int | None = None,
    tally: Tally | None = None,
    peers: Path | None = None,
    most_peers: int | None = None,
) -> Tally:
    """Opens every state of a run.

    Args:
        run: what was recorded.
        subsets: random ones for each moment.
        without: barriers of this site did nothing.
        limit: enough when so many are wrong.
        tally: of earlier runs, whose states are not opened again.
        peers: directory in which states are shown to QEMU, each that differs from all others in what
            stands before the payload: headers, region tables, log, metadata or BAT.
        most_peers: so many of a run at most, spread over it.
    """
    tally, rng = tally or Tally(), random.Random(1)
    shown = 0
    opened: set[tuple[int, int]] = set()
    order = broken_order(run.recorder, without=without)
    if order is not None:
        tally.found.append((0, order))
        if limit is not None:
            return tally
    for now, data in crash_states(run.recorder, rng, subsets, without=without, since=run.since):
        key = digest(data)
        # What was right before a flush may be wrong after it.
        if (key, covered := run.history.covered(now)) in opened:
            continue
        opened.add((key, covered))
        tally.seen.add(key)
        wrong, dirty = verdict(run, now, data)
        tally.dirty += dirty
        structure = digest(data[: 4 * MIB])
        due = most_peers is None or now * most_peers >= shown * run.recorder.now
        if peers is not None and wrong is None and due and structure not in tally.structures:
            tally.structures.add(structure)
            shown += 1
            wrong = qemu_verdict(run, now, data, peers)
            tally.peers += 1
        if wrong is not None:
            tally.found.append((now, wrong))
            if limit is not None and len(tally.found) >= limit:
                break
    return tally


def shown_to_qemu(name: str, directory: Path) -> Path | None:
    return None if WORKLOADS[name][1] == "child" else directory  # QEMU knows no parents


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_crash_state(bases, name, fast_path, peer):
    peer("qemu-img")
    run = record(bases, name, seed=3, steps=12)
    qemu = shown_to_qemu(name, fast_path)
    tally = check(run, subsets=2, peers=qemu, most_peers=16)
    assert tally.found == []
    assert tally.states > 12
    assert sum(event.kind == "flush" for event in run.recorder.events) > 8


STATES = int(os.environ.get("VHDX_CRASH_STATES", "7000"))  # of each workload, in the long form


@pytest.mark.soak
@pytest.mark.parametrize("name", WORKLOADS)
def test_crash_states_long(bases, name, fast_path, peer):
    peer("qemu-img")
    peers = shown_to_qemu(name, fast_path)
    tally, seed = Tally(), 0
    while tally.states < STATES:
        seed += 1
        run = record(bases, name, seed=100 + seed, steps=40)
        check(run, subsets=6, tally=tally, peers=peers)
        assert tally.found == [], f"seed {100 + seed}"
    print(
        f"{name}: {tally.states} states of {seed} runs, {tally.dirty} with a dirty log, "
        f"{tally.peers} opened by QEMU for writing"
    )
    assert tally.dirty > 0.3 * tally.states


def sites(run: Run) -> set[str]:
    return {event.site for event in run.recorder.events if event.kind == "flush"}


def needed(bases, name: str, site: str, *, seeds: range, steps: int, subsets: int) -> bool:
    """Whether some state fails when the barriers of ``site`` do nothing."""
    for seed in seeds:
        run = record(bases, name, seed=seed, steps=steps)
        if site in sites(run) and check(run, subsets, without=site, limit=1).found:
            return True
    return False


@pytest.mark.soak
def test_each_barrier_is_needed(bases):
    found = {name: sites(record(bases, name, seed=3, steps=12)) for name in WORKLOADS}
    missing = []
    for site in sorted(set().union(*found.values())):
        names = [name for name in WORKLOADS if site in found[name]]
        small = {"seeds": range(4), "steps": 16, "subsets": 8}
        large = {"seeds": range(100, 120), "steps": 24, "subsets": 12}
        if not any(needed(bases, n, site, **size) for size in (small, large) for n in names):
            missing.append(site)
    print("each needed:", ", ".join(sorted(set().union(*found.values()) - set(missing))))
    assert missing == []
