# SPDX-License-Identifier: MIT
"""A recording leaf below the engine, and the crash states that its record allows.

Every write, zero, trim, resize and barrier is recorded in order. A crash state is any prefix of the
record in which everything before the last barrier happened, and of what came after it any subset,
each write torn at sectors of 512 bytes. Without a barrier the windows beside it are one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from vhdx import plane
from vhdx.image.disk import Disk
from vhdx.image.host import HostFile
from vhdx.image.vhdx_image import open_vhdx

SECTOR = 512


@dataclass(frozen=True)
class Event:
    """One change of the file, or a barrier, or a mark of the test's own."""

    kind: str  # write zero trim resize flush mark
    offset: int = 0
    length: int = 0
    data: bytes | None = None


class Recorder:
    """A backend in memory that records; ``base`` is the content before the first event."""

    def __init__(self, base: bytes, *, recording: bool = True) -> None:
        self.base = bytes(base)
        self.data = bytearray(base)
        self.events: list[Event] = []
        self._recording = recording

    def _note(self, event: Event) -> None:
        if self._recording:
            self.events.append(event)

    def mark(self, name: str) -> None:
        self._note(Event("mark", data=name.encode()))

    def pread_into(self, buffer, offset):
        buffer[:] = self.data[offset : offset + len(buffer)]

    def pwrite(self, data, offset):
        self.data[offset : offset + len(data)] = data
        self._note(Event("write", offset, len(data), bytes(data)))

    def zero(self, offset, length):
        self.data[offset : offset + length] = bytes(length)
        self._note(Event("zero", offset, length))

    def trim(self, offset, length):
        self.data[offset : offset + length] = bytes(length)
        self._note(Event("trim", offset, length))

    def flush(self):
        self._note(Event("flush"))

    def resize(self, size):
        resized(self.data, size)
        self._note(Event("resize", size))

    def extents(self, offset, length):
        return [plane.device.RawExtent(offset, length, plane.DATA, 0)]


def resized(data: bytearray, size: int) -> None:
    if size < len(data):
        del data[size:]
    else:
        data.extend(bytes(size - len(data)))


def open_recorded(recorder: Recorder, *, write: bool = True) -> Disk:
    """The VHDX image in ``recorder``, opened by the real engine."""
    leaf = plane.Callback(recorder, len(recorder.data), read_only=not write)
    host = HostFile("recorded.vhdx", leaf, read_only=not write, sparse=True, key=(0, 0), keep=True)
    host.allocated = lambda: len(recorder.data)
    return Disk(open_vhdx(host, write=write, chain=True, parent_search=(), pool=plane.default_pool()))


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


def crash_states(
    recorder: Recorder, rng: random.Random, subsets: int, *, without: frozenset[int] = frozenset()
) -> Iterator[tuple[int, bytearray]]:
    """Number of events that had begun, and the content after the crash.

    Args:
        recorder: the record.
        rng: chooses subsets.
        subsets: for each prefix, besides "none of them" and "all of them".
        without: barriers (counted from 0) that did nothing.
    """
    durable = bytearray(recorder.base)
    window: list[Event] = []
    barriers = 0
    for number, event in enumerate(recorder.events, 1):
        if event.kind == "flush":
            if barriers not in without:
                for each in window:
                    apply(durable, each)
                window = []
            barriers += 1
            continue
        if event.kind == "mark":
            continue
        window.append(event)
        for choice in range(subsets + 2):
            data = bytearray(durable)
            for each in window:
                sectors = max(1, -(-each.length // SECTOR))
                if choice == 0:
                    break  # none of them
                if choice == 1:
                    apply(data, each)
                elif each.kind == "resize":
                    if rng.random() < 0.5:
                        apply(data, each)
                elif rng.random() < 0.5:
                    apply(data, each)  # whole or not at all, most of the time
                elif rng.random() < 0.5:
                    apply(data, each, [rng.random() < 0.5 for _ in range(sectors)])
            yield number, data
