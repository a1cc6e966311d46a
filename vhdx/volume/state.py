# SPDX-License-Identifier: MIT
"""What a volume knows: files, names, and where the pages of files lie. No I/O.

A volume keeps its metadata in the ledger of its pool. Records (little-endian; u16 kind first; objects
are JSON in UTF-8)::

    1 FILE       an object: id, size, note (hexadecimal)
    2 FILE_GONE  u64 id
    3 NAME       an object: name, id
    4 NAME_GONE  the name, UTF-8
    5 EXTENTS    u64 id, then runs: u64 page of the file, u64 page of the space or 2**64 - 1 for a
                 hole, u64 count

Pages have 1 MiB. Recovery: files without a name were never complete, or their last name is gone; they
are removed when the volume is opened.
"""

from __future__ import annotations

import bisect
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vhdx.arrays import np
from vhdx.errors import DamagedError, NoSpaceError
from vhdx.units import MIB, format_size

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["PAGE", "FileState", "Pages", "Run", "VolumeState", "runs_of"]

PAGE = MIB
"""Bytes of a page."""

_HOLE = (1 << 64) - 1
_KIND = struct.Struct("<H")
_ID = struct.Struct("<Q")
_RUN = struct.Struct("<QQQ")
_MOST_RUNS = 20_000  # in a record
_FILE, _FILE_GONE, _NAME, _NAME_GONE, _EXTENTS = range(1, 6)


class Run(NamedTuple):
    """Pages of a file that lie in a row on the space; all numbers count pages."""

    page: int
    place: int
    length: int


@dataclass
class FileState:
    """A file.

    Attributes:
        id: its number, never used again.
        size: bytes.
        note: what its place keeps with it.
        runs: where its pages lie, in order; the others are holes.
    """

    id: int
    size: int
    note: bytes = b""
    runs: list[Run] = field(default_factory=list)

    @property
    def pages(self) -> int:
        """Pages that it has on the space."""
        return sum(run.length for run in self.runs)

    def places(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Where these pages lie on the space; -1 for holes."""
        found = np.full(count, -1, np.int64)
        at = max(0, bisect.bisect_right(self.runs, first, key=lambda run: run.page) - 1)
        for run in self.runs[at:]:
            if run.page >= first + count:
                break
            start, end = max(run.page, first), min(run.page + run.length, first + count)
            if start < end:
                place = run.place + start - run.page
                found[start - first : end - first] = np.arange(place, place + end - start)
        return found

    def change(self, new: Iterable[Run]) -> None:
        """Replaces what the pages of these runs were; a place of ``2**64 - 1`` makes holes."""
        for run in new:
            end = run.page + run.length
            kept: list[Run] = []
            for old in self.runs:
                old_end = old.page + old.length
                if old_end <= run.page or old.page >= end:
                    kept.append(old)
                    continue
                if old.page < run.page:
                    kept.append(Run(old.page, old.place, run.page - old.page))
                if old_end > end:
                    kept.append(Run(end, old.place + end - old.page, old_end - end))
            if run.place != _HOLE:
                kept.append(run)
            self.runs = _joined(sorted(kept))


def _joined(runs: list[Run]) -> list[Run]:
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if last and (last.page + last.length, last.place + last.length) == (run.page, run.place):
            found[-1] = Run(last.page, last.place, last.length + run.length)
        else:
            found.append(run)
    return found


def runs_of(pages: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> list[Run]:
    """Runs of these pages, which ascend, at these places; -1 for holes."""
    if len(pages) == 0:
        return []
    step = np.where(places[:-1] < 0, 0, 1)
    cuts = np.flatnonzero((np.diff(pages) != 1) | (np.diff(places) != step)) + 1
    found = []
    for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(pages)], strict=True):
        place = int(places[start])
        found.append(Run(int(pages[start]), _HOLE if place < 0 else place, end - start))
    return found


class VolumeState:
    """The state of a volume; see :class:`vhdx.spaces.state.Owner`.

    Attributes:
        files: by number.
        names: numbers by name.
    """

    def __init__(self) -> None:
        self.files: dict[int, FileState] = {}
        self.names: dict[str, int] = {}
        self.last_id = 0

    def apply(self, payload: bytes) -> None:
        """Adds what one record says.

        Raises:
            DamagedError: it contradicts the others.
        """
        try:
            self._apply(_KIND.unpack_from(payload)[0], payload[_KIND.size :])
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise DamagedError(f"the volume's records contradict each other: {error!r}") from error

    def _apply(self, kind: int, body: bytes) -> None:
        if kind == _FILE:
            fields = json.loads(body)
            number = int(fields["id"])
            old = self.files.get(number)
            note = bytes.fromhex(fields["note"])
            runs = [] if old is None else old.runs
            self.files[number] = FileState(number, int(fields["size"]), note, runs)
            self.last_id = max(self.last_id, number)
        elif kind == _FILE_GONE:
            del self.files[_ID.unpack(body)[0]]
        elif kind == _NAME:
            fields = json.loads(body)
            if fields["id"] not in self.files:
                raise ValueError("a name of no file")
            self.names[str(fields["name"])] = int(fields["id"])
        elif kind == _NAME_GONE:
            del self.names[body.decode()]
        elif kind == _EXTENTS:
            number = _ID.unpack_from(body)[0]
            self.files[number].change(Run(*run) for run in _RUN.iter_unpack(body[_ID.size :]))
        else:
            raise ValueError(f"kind {kind}")

    def records(self) -> Iterator[bytes]:
        """Records that stand for the whole state."""
        for file in self.files.values():
            yield self.file_record(file)
            yield from self.extents_records(file.id, file.runs)
        for name, number in self.names.items():
            yield self.name_record(name, number)

    @staticmethod
    def file_record(file: FileState) -> bytes:
        fields = {"id": file.id, "size": file.size, "note": file.note.hex()}
        return _KIND.pack(_FILE) + json.dumps(fields, separators=(",", ":")).encode()

    @staticmethod
    def file_gone_record(number: int) -> bytes:
        return _KIND.pack(_FILE_GONE) + _ID.pack(number)

    @staticmethod
    def name_record(name: str, number: int) -> bytes:
        fields = {"name": name, "id": number}
        return _KIND.pack(_NAME) + json.dumps(fields, separators=(",", ":")).encode()

    @staticmethod
    def name_gone_record(name: str) -> bytes:
        return _KIND.pack(_NAME_GONE) + name.encode()

    @staticmethod
    def extents_records(number: int, runs: list[Run]) -> Iterator[bytes]:
        for at in range(0, len(runs), _MOST_RUNS):
            packed = b"".join(_RUN.pack(*run) for run in runs[at : at + _MOST_RUNS])
            yield _KIND.pack(_EXTENTS) + _ID.pack(number) + packed

    def links(self, number: int) -> int:
        """How many names a file has."""
        return sum(each == number for each in self.names.values())


class Pages:
    """Which pages of the space are free; those that were given up become free when told so."""

    def __init__(self, state: VolumeState, count: int) -> None:
        self._used = np.zeros(count, np.bool_)
        self._next = 0
        for file in state.files.values():
            for run in file.runs:
                part = self._used[run.place : run.place + run.length]
                if len(part) != run.length or part.any():
                    raise DamagedError(f"two files use page {run.place} of the space, or it has none")
                part[:] = True

    def grow(self, count: int) -> None:
        """The space has so many pages now."""
        more = np.zeros(max(0, count - len(self._used)), np.bool_)
        self._used = np.concatenate([self._used, more])

    def take(self, count: int, least: int = 1) -> npt.NDArray[np.int64]:
        """Takes up to ``count`` free pages, preferably in a row.

        Raises:
            NoSpaceError: fewer than ``least`` are free.
        """
        free = np.flatnonzero(~self._used)
        if len(free) < least:
            raise NoSpaceError(
                f"the volume is full: it has {format_size(len(self._used) * PAGE)}",
                hint="remove files, or make its space larger",
            )
        start = int(np.searchsorted(free, self._next))
        order = np.concatenate([free[start:], free[:start]])
        taken = np.sort(order[:count])
        self._used[taken] = True
        self._next = int(order[min(count, len(order)) - 1]) + 1
        return taken

    def give_back(self, places: npt.NDArray[np.int64]) -> None:
        self._used[places] = False
