# SPDX-License-Identifier: MIT
"""A recording leaf below the engine, and the crash states that its record allows.

Every write, zero, trim, resize and barrier is recorded with the moment at which it began and the one
at which it ended, whatever thread it came from. A barrier covers what had ended when it began, and
nothing else. A crash state is a moment, everything that the barriers which had ended by then cover,
and of the rest that had begun any subset, each write torn at sectors of 512 bytes.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from vhdx import plane
from vhdx.image.disk import Disk
from vhdx.image.host import HostFile
from vhdx.image.vhdx.image import open_vhdx

SECTOR = 512
HEADERS = (64 << 10, 192 << 10)
METADATA = (2 << 20, 4 << 20)  # metadata and BAT of the images here
NEVER = 1 << 62
EXHAUSTIVE = 3  # so many operations or fewer in doubt: every subset of them


@dataclass
class Event:
    """One change of the file, or a barrier, or a mark of the test's own."""

    kind: str  # write zero trim resize flush mark
    offset: int = 0
    length: int = 0
    data: bytes | None = None
    begin: int = 0
    end: int | None = None
    site: str = ""  # of a barrier: which line of the engine asked for it
    leaf: int = 0


class Log:
    """One clock and one list of events, which several leaves may share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = 0
        self.events: list[Event] = []
        self.site = ""  # of barriers, where a test says which one it is


class Recorder:
    """A backend in memory that records; ``base`` is the content before the first event."""

    def __init__(
        self,
        base: bytes,
        *,
        recording: bool = True,
        jitter: int | None = None,
        log: Log | None = None,
        leaf: int = 0,
    ) -> None:
        self.base = bytes(base) if recording else b""
        self.data = bytearray(base)
        self.log = Log() if log is None else log
        self._leaf = leaf
        self._recording = recording
        self._lock = self.log.lock
        self._random = None if jitter is None else random.Random(jitter)
        self._last_site: tuple[object, int] = (None, 0)

    @property
    def events(self) -> list[Event]:
        return self.log.events

    @property
    def now(self) -> int:
        return self.log.now

    def tick(self) -> int:
        """A moment of its own: later than everything before, earlier than everything after."""
        with self._lock:
            self.log.now += 1
            return self.log.now

    def _begin(self, event: Event) -> Event:
        if not self._recording:
            return event
        with self._lock:
            self.log.now += 1
            event.begin, event.leaf = self.log.now, self._leaf
            self.log.events.append(event)
            pause = self._random is not None and self._random.random() < 0.3
        if pause:
            time.sleep(0)  # others may come in between
        return event

    def _end(self, event: Event) -> None:
        if self._recording:
            with self._lock:
                self.log.now += 1
                event.end = self.log.now

    def mark(self, name: str) -> int:
        event = self._begin(Event("mark", data=name.encode()))
        self._end(event)
        return event.begin

    def pread_into(self, buffer, offset):
        buffer[:] = self.data[offset : offset + len(buffer)]

    def pwrite(self, data, offset):
        event = self._begin(Event("write", offset, len(data), bytes(data)))
        self.data[offset : offset + len(data)] = data
        self._end(event)

    def zero(self, offset, length):
        event = self._begin(Event("zero", offset, length))
        self.data[offset : offset + length] = bytes(length)
        self._end(event)

    def trim(self, offset, length):
        event = self._begin(Event("trim", offset, length))
        self.data[offset : offset + length] = bytes(length)
        self._end(event)

    def flush(self):
        event = Event("flush")
        if self._recording:
            event.site = self.log.site or self._site()
        self._end(self._begin(event))

    def resize(self, size):
        event = self._begin(Event("resize", size))
        resized(self.data, size)
        self._end(event)

    def extents(self, offset, length):
        return [plane.device.RawExtent(offset, length, plane.DATA, 0)]

    def _site(self) -> str:
        """The innermost function of the engine, and which of its barriers this is."""
        frame = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.endswith("/vhdx/plane/device.py"):
            frame = frame.f_back
        if frame is None or not isinstance(frame.f_locals.get("self"), plane.Callback):
            return "round"  # of the map: C asks for it
        while frame is not None and "/vhdx/image/" not in frame.f_code.co_filename:
            frame = frame.f_back
        assert frame is not None
        with self._lock:
            seen, count = self._last_site
            same = seen is frame  # the frame is kept, so that no other gets its identity
            count = count + 1 if same else 0
            self._last_site = (frame, count)
        return f"{frame.f_code.co_qualname}:{count}"


class Handle:
    """One open of a recorder; what is abandoned reaches it no more, as after a crash."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder: Recorder | None = recorder

    def abandon(self) -> None:
        self._recorder = None

    def __getattr__(self, name: str):
        recorder = self._recorder
        return getattr(recorder, name) if recorder is not None else lambda *_: ()


def resized(data: bytearray, size: int) -> None:
    if size < len(data):
        del data[size:]
    else:
        data.extend(bytes(size - len(data)))


def open_recorded(recorder: Recorder, *, write: bool = True, path: str = "recorded.vhdx") -> Disk:
    """The VHDX image in ``recorder``, opened by the real engine; its parent is beside ``path``."""
    handle = Handle(recorder)
    leaf = plane.Callback(handle, len(recorder.data), read_only=not write)
    host = HostFile(path, leaf, read_only=not write, sparse=True, key=(0, 0), keep=True)
    host.allocated = lambda: len(recorder.data)
    pool = plane.shared_pool(plane.Level.IMAGE)
    disk = Disk(open_vhdx(host, write=write, chain=True, parent_search=(), pool=pool, force=True))
    disk.handle = handle
    return disk


def apply(data: bytearray, event: Event, keep: list[bool] | None = None) -> None:
    """Does ``event``; of a write, zero or trim only the sectors that ``keep`` says."""
    if event.kind == "resize":
        resized(data, event.offset)
    if event.kind not in {"write", "zero", "trim"}:
        return
    content = bytes(event.length) if event.data is None else event.data
    end = event.offset + event.length
    if end > len(data):
        resized(data, end)  # a later resize was lost, the write was not
    if keep is None:
        data[event.offset : end] = content
        return
    for i, wanted in enumerate(keep):
        if wanted:
            part = slice(i * SECTOR, min((i + 1) * SECTOR, event.length))
            data[event.offset + part.start : event.offset + part.stop] = content[part]


@dataclass
class Window:
    """What is durable at a moment, and what else had begun."""

    durable: bytearray
    doubtful: list[Event] = field(default_factory=list)

    def pass_barrier(self, barrier: Event) -> None:
        covered = [e for e in self.doubtful if e.end is not None and e.end < barrier.begin]
        for event in covered:
            apply(self.durable, event)
        self.doubtful = [e for e in self.doubtful if e not in covered]

    def states(self, rng: random.Random, subsets: int) -> Iterator[bytearray]:
        """None and all of what is in doubt, random tears, and more where it is little.

        Of few operations each is missing, whole, or torn in the middle, in every combination.
        """
        events = [e for e in self.doubtful if e.kind != "flush"]
        choices = [(False,) * len(events), (True,) * len(events)]
        if len(events) <= EXHAUSTIVE:
            choices = list(itertools.product((False, True, "front", "back"), repeat=len(events)))
        for choice in choices:
            data = bytearray(self.durable)
            for event, wanted in zip(events, choice, strict=True):
                sectors = max(1, -(-event.length // SECTOR))
                if wanted in {"front", "back"} and event.kind != "resize":
                    first = wanted == "front"
                    apply(data, event, [(i < sectors // 2) == first for i in range(sectors)])
                elif wanted is True:
                    apply(data, event)
            yield data
        for _ in range(subsets):
            yield self.any_state(rng)

    def any_state(self, rng: random.Random) -> bytearray:
        """What is durable, and a random part of what is in doubt."""
        data = bytearray(self.durable)
        for event in self.doubtful:
            sectors = max(1, -(-event.length // SECTOR))
            whole = rng.random()
            if whole < 0.5:
                apply(data, event)
            elif whole < 0.75 and event.kind != "resize":
                apply(data, event, [rng.random() < 0.5 for _ in range(sectors)])
        return data


def crash_states(
    recorder: Recorder,
    rng: random.Random,
    subsets: int,
    *,
    without: str | None = None,
    since: int = 0,
) -> Iterator[tuple[int, bytearray]]:
    """The moment, and the content after a crash at that moment.

    Args:
        recorder: the record.
        rng: chooses subsets.
        subsets: random ones for each moment, besides those that are always taken.
        without: barriers of this site did nothing.
        since: no crash before this moment.
    """
    window = Window(bytearray(recorder.base))
    for now in moments_of(recorder.log, [window], without):
        if now >= since:
            for data in window.states(rng, subsets):
                yield now + 1, data


def moments_of(log: Log, windows: list[Window], without: str | None = None) -> Iterator[int]:
    """The moments at which a change began, with the windows of all leaves as they were then."""
    moments = [(e.begin, False, e) for e in log.events]
    moments += [(e.end, True, e) for e in log.events if e.end is not None]
    for now, ended, event in sorted(moments, key=lambda m: m[0]):
        if event.kind == "mark":
            continue
        if event.kind == "flush":
            if ended and event.site != without:
                windows[event.leaf].pass_barrier(event)
        elif not ended:
            windows[event.leaf].doubtful.append(event)
            yield now


@dataclass
class Crash:
    """A crash of several leaves.

    Attributes:
        now: the moment.
        contents: of each leaf; None: it is gone.
        is_old: whether a leaf holds less than what its barriers covered.
    """

    now: int
    contents: list[bytearray | None]
    is_old: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_old = self.is_old or [False] * len(self.contents)

    @property
    def here(self) -> list[int]:
        """The leaves that are not gone."""
        return [i for i, content in enumerate(self.contents) if content is not None]


def crash_states_of_several(
    log: Log,
    bases: list[bytes],
    rng: random.Random,
    subsets: int,
    *,
    faulty: int,
    without: str | None = None,
    since: int = 0,
) -> Iterator[Crash]:
    """What several leaves hold after a crash.

    Args:
        log: of all leaves.
        bases: what each leaf held before the first event.
        rng: chooses what of each leaf is lost.
        subsets: states for each moment.
        faulty: leaves that may be gone or old. An old one has what was durable at an earlier
            moment: it was away meanwhile, or its barriers did nothing.
        without: barriers of this site did nothing.
        since: no crash before this moment.
    """
    windows = [Window(bytearray(base)) for base in bases]
    old: list[list[bytes]] = [[] for _ in bases]
    for now in moments_of(log, windows, without):
        if now < since:
            continue
        if rng.random() < 0.05 or not old[0]:
            for kept, window in zip(old, windows, strict=True):
                kept.append(bytes(window.durable))
        for _ in range(subsets):
            crash = Crash(now + 1, [window.any_state(rng) for window in windows])
            for leaf in rng.sample(range(len(bases)), rng.randint(0, faulty)):
                crash.is_old[leaf] = rng.random() < 0.5
                crash.contents[leaf] = (
                    bytearray(rng.choice(old[leaf])) if crash.is_old[leaf] else None
                )
            yield crash


def broken_order(recorder: Recorder, *, without: str | None = None) -> str | None:
    """None, or which rule of the specification about the order of writes is broken.

    A session begins with a mark "open". Its first header, with the new FileWriteGuid, is durable
    before anything else changes; a header is written when the other one is durable; and one without
    LogGuid when nothing that the log holds is in doubt ([MS-VHDX] 2.2.2, 2.3).
    """
    window, first = Window(bytearray()), None
    moments = [(e.begin, False, e) for e in recorder.events]
    moments += [(e.end, True, e) for e in recorder.events if e.end is not None]
    for _, ended, event in sorted(moments, key=lambda m: m[0]):
        if event.kind == "mark" and event.data == b"open":
            first = "wanted"
        elif event.kind == "flush" and ended and event.site != without:
            window.doubtful = [e for e in window.doubtful if e.end is None or e.end >= event.begin]
        elif event.kind in {"write", "zero", "trim", "resize"} and not ended:
            is_header = event.kind == "write" and HEADERS[0] <= event.offset < HEADERS[1]
            if first == "wanted" and not is_header:
                return "something is changed before the header"
            if first == "wanted":
                first = event
            elif not is_header and first in window.doubtful:
                return "something is changed before the FileWriteGuid is durable"
            if is_header and any(
                HEADERS[0] <= e.offset < HEADERS[1] and e.offset != event.offset
                for e in window.doubtful
            ):
                return "a header is written over while the other is in doubt"
            if is_header and not any(event.data[48:64]):
                late = [e for e in window.doubtful if METADATA[0] <= e.offset < METADATA[1]]
                if any(e.kind in {"write", "zero"} for e in late):
                    return "the log is cleared before what it holds is durable"
            window.doubtful.append(event)
    return None


def digest(data: bytearray) -> int:
    """To tell states apart."""
    return xxhash.xxh3_128_intdigest(data)


@dataclass
class _Write:
    """One change of a disk: when it began and ended, and when it was durable by itself."""

    offset: int
    data: bytes
    begin: int
    end: int = NEVER
    durable: int = NEVER

    def at(self, sector: int) -> bytes | None:
        """What it leaves in the sector at this offset; None where it does not reach."""
        start = sector - self.offset
        return self.data[start : start + SECTOR] if 0 <= start < len(self.data) else None


class History:
    """What each sector may hold after a crash, for a disk that several threads write.

    A sector holds what the last write to it that a finished flush covers left there, or what any
    write that began later put there. Times are the recorder's; writes to a sector are one thread's.
    """

    def __init__(self, recorder: Recorder, content: bytes) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()
        self.first = bytes(content)
        self.writes: list[_Write] = []  # in the order of their beginnings
        self.flushes: list[tuple[int, int]] = []
        self.sizes: list[tuple[int, int, int]] = []  # begin, end, size

    def _begin(self, offset: int, data: bytes) -> _Write:
        with self._lock:
            write = _Write(offset, data, self._recorder.tick())
            self.writes.append(write)
            return write

    def change(
        self, offset: int, data: bytes, do: Callable[[], object], *, fua: bool = False
    ) -> None:
        """Runs ``do``, which leaves ``data`` at ``offset``; both multiples of a sector."""
        write = self._begin(offset, data)
        do()
        with self._lock:
            write.end = self._recorder.tick()
            if fua:
                write.durable = write.end

    def flush(self, do: Callable[[], object]) -> None:
        """Runs ``do``, which makes durable what was written before."""
        begin = self._recorder.tick()
        do()
        with self._lock:
            self.flushes.append((begin, self._recorder.tick()))

    def resize(self, size: int, do: Callable[[], object]) -> None:
        """Runs ``do``, after which the disk has ``size`` bytes, durably; what is cut off is zeros."""
        begin = self._recorder.tick()
        end = max([len(self.first), *(w.offset + len(w.data) for w in self.writes)])
        gone = self._begin(size, bytes(max(0, end - size)))
        do()
        gone.end = gone.durable = self._recorder.tick()
        with self._lock:
            self.sizes.append((begin, gone.end, size))

    def sizes_at(self, now: int) -> set[int]:
        """What the size may be after a crash at ``now``."""
        found = {len(self.first)}
        for begin, end, size in self.sizes:
            if end < now:
                found = {size}
            elif begin < now:
                found.add(size)
        return found

    def covered(self, now: int) -> int:
        """When the last flush began that had ended before ``now``; 0 for none."""
        return max((begin for begin, end in self.flushes if end < now), default=0)

    def wrong(self, content: bytes, now: int) -> str | None:
        """None, or what is wrong with ``content`` after a crash at ``now``."""
        if len(content) not in self.sizes_at(now):
            return f"the disk has {len(content)} bytes"
        covered = self.covered(now)
        safe = [w.end <= covered or w.durable < now for w in self.writes]
        expected = bytearray(self.first)
        for write in itertools.compress(self.writes, safe):
            end = write.offset + len(write.data)
            expected.extend(bytes(max(0, end - len(expected))))
            expected[write.offset : end] = write.data
        expected.extend(bytes(max(0, len(content) - len(expected))))
        del expected[len(content) :]
        differs = np.frombuffer(content, np.uint8) != np.frombuffer(expected, np.uint8)
        for sector in np.unique(np.flatnonzero(differs) // SECTOR).tolist():
            at = sector * SECTOR
            mine = [i for i, w in enumerate(self.writes) if w.at(at) is not None]
            last = max((i for i in mine if safe[i]), default=-1)
            later = {self.writes[i].at(at) for i in mine if i > last and self.writes[i].begin < now}
            found = content[at : at + SECTOR]
            if found not in later:
                return f"sector at {at:#x} holds what was never there ({found[:4].hex()})"
        return None
