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

import google_crc32c

from vhdx import plane
from vhdx.image.disk import Disk
from vhdx.image.host import HostFile
from vhdx.image.vhdx_image import open_vhdx

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


class Recorder:
    """A backend in memory that records; ``base`` is the content before the first event."""

    def __init__(self, base: bytes, *, recording: bool = True, jitter: int | None = None) -> None:
        self.base = bytes(base)
        self.data = bytearray(base)
        self.events: list[Event] = []
        self.now = 0
        self._recording = recording
        self._lock = threading.Lock()
        self._random = None if jitter is None else random.Random(jitter)
        self._last_site: tuple[object, int] = (None, 0)

    def _begin(self, event: Event) -> Event:
        if not self._recording:
            return event
        with self._lock:
            self.now += 1
            event.begin = self.now
            self.events.append(event)
            pause = self._random is not None and self._random.random() < 0.3
        if pause:
            time.sleep(0)  # others may come in between
        return event

    def _end(self, event: Event) -> None:
        if self._recording:
            with self._lock:
                self.now += 1
                event.end = self.now

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
            event.site = self._site()
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
    pool = plane.default_pool()
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
            data = bytearray(self.durable)
            for event in events:
                sectors = max(1, -(-event.length // SECTOR))
                whole = rng.random()
                if whole < 0.5:
                    apply(data, event)
                elif whole < 0.75 and event.kind != "resize":
                    apply(data, event, [rng.random() < 0.5 for _ in range(sectors)])
            yield data


def crash_states(
    recorder: Recorder, rng: random.Random, subsets: int, *, without: str | None = None
) -> Iterator[tuple[int, bytearray]]:
    """The moment, and the content after a crash at that moment.

    Args:
        recorder: the record.
        rng: chooses subsets.
        subsets: random ones for each moment, besides those that are always taken.
        without: barriers of this site did nothing.
    """
    window = Window(bytearray(recorder.base))
    moments = [(e.begin, False, e) for e in recorder.events]
    moments += [(e.end, True, e) for e in recorder.events if e.end is not None]
    for now, ended, event in sorted(moments, key=lambda m: m[0]):
        if event.kind == "mark":
            continue
        if event.kind == "flush":
            if ended and event.site != without:
                window.pass_barrier(event)
            continue
        if not ended:
            window.doubtful.append(event)
            for data in window.states(rng, subsets):
                yield now + 1, data


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
    return google_crc32c.value(bytes(data)) << 40 | len(data)


class History:
    """What each sector may hold after a crash, for a disk that several threads write.

    A sector holds what the last write to it that a finished flush covers left there, or what any
    write that began later put there. Times are the recorder's.
    """

    def __init__(self, recorder: Recorder, content: bytes) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()
        self.first = bytes(content)
        # sector: begin, end, durable by itself since, content
        self.writes: dict[int, list[list]] = {}
        self.flushes: list[tuple[int, int]] = []
        self.sizes: list[tuple[int, int, int]] = []  # begin, end, size

    def change(
        self, offset: int, data: bytes, do: Callable[[], object], *, fua: bool = False
    ) -> None:
        """Runs ``do``, which leaves ``data`` at ``offset``; both multiples of a sector."""
        begin = self._recorder.now
        with self._lock:
            entries = [
                [begin, NEVER, NEVER, data[at : at + SECTOR]] for at in range(0, len(data), SECTOR)
            ]
            for i, entry in enumerate(entries):
                self.writes.setdefault(offset + i * SECTOR, []).append(entry)
        do()
        with self._lock:
            for entry in entries:
                entry[1] = self._recorder.now
                if fua:
                    entry[2] = self._recorder.now

    def flush(self, do: Callable[[], object]) -> None:
        """Runs ``do``, which makes durable what was written before."""
        begin = self._recorder.now
        do()
        with self._lock:
            self.flushes.append((begin, self._recorder.now))

    def resize(self, size: int, do: Callable[[], object]) -> None:
        """Runs ``do``, after which the disk has ``size`` bytes, durably; what is cut off is zeros."""
        begin = self._recorder.now
        gone = [at for at in self.writes if at >= size]
        gone += [at for at in range(size, len(self.first), SECTOR) if at not in self.writes]
        entries = [[begin, NEVER, NEVER, bytes(SECTOR)] for _ in gone]
        for at, entry in zip(gone, entries, strict=True):
            self.writes.setdefault(at, []).append(entry)
        do()
        for entry in entries:
            entry[1] = entry[2] = self._recorder.now
        with self._lock:
            self.sizes.append((begin, self._recorder.now, size))

    def sizes_at(self, now: int) -> set[int]:
        """What the size may be after a crash at ``now``."""
        found = {len(self.first)}
        for begin, end, size in self.sizes:
            if end < now:
                found = {size}
            elif begin < now:
                found.add(size)
        return found

    def wrong(self, content: bytes, now: int) -> str | None:
        """None, or what is wrong with ``content`` after a crash at ``now``."""
        if len(content) not in self.sizes_at(now):
            return f"the disk has {len(content)} bytes"
        covered = max((begin for begin, end in self.flushes if end < now), default=0)
        expected = bytearray(self.first[: len(content)])
        expected.extend(bytes(len(content) - len(expected)))
        doubtful: dict[int, set[bytes]] = {}
        for at, writes in self.writes.items():
            # Writes to a sector are one thread's, so they are in order.
            safe = [i for i, w in enumerate(writes) if w[1] <= covered or w[2] < now]
            last = safe[-1] if safe else -1
            if safe:
                expected[at : at + SECTOR] = writes[last][3]
            later = {w[3] for w in writes[last + 1 :] if w[0] < now}
            if later:
                doubtful[at] = later
        if len(expected) > len(content):
            del expected[len(content) :]
        if content == expected:
            return None
        for at in range(0, len(content), SECTOR):
            found = content[at : at + SECTOR]
            if found == expected[at : at + SECTOR] or found in doubtful.get(at, ()):
                continue
            return f"sector at {at:#x} holds what was never there ({found[:4].hex()})"
        return None
