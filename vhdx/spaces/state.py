# SPDX-License-Identifier: MIT
"""What a pool knows: disks, spaces, rows and events, as the records of its ledger say. No I/O.

Records (kinds and payloads; numbers little-endian, objects are JSON in UTF-8; settings of the
vocabulary are stored as their numbers or names)::

    1 POOL        an object: id, name, slab, ... (all that PoolState.settings has)
    2 DISK        an object: index, id, name, ... (DiskState)
    3 DISK_GONE   u16 index
    4 SPACE       an object: number, id, name, ... (SpaceState)
    5 SPACE_GONE  u32 number
    6 ROWS        u32 number of the space, u32 members of a row, u64 first row, then members
    7 MARKS       u32 number of the space, u32 1 marked or 0 clean, then u64 rows
    8 EVENT       an object: number, time (milliseconds since 1970), kind, text, ...
    9 OWNER       u32 number of the space, then what the owner of its content records

A member (8 bytes): u16 index of the disk, u8 state (0 none, 1 in step, 2 stale), u8 zero, u32 slab. A
row has a member for each slot of each column; a column has one slot more than copies, where a slab
is filled that replaces another one.

A mark says that the copies of a row may differ after a crash: it is durable before the first change
of the row, and goes away when its disks have everything. While a disk is out, rows that it is a
member of keep their marks: so a row without a mark is the same on a disk that returns.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol
from uuid import UUID

import numpy.typing as npt

from vhdx.arrays import np
from vhdx.errors import DamagedError
from vhdx.ledger import Record
from vhdx.spaces.states import (
    DiskStatus,
    MediaType,
    Provisioning,
    Resiliency,
    RetirePolicy,
    Usage,
)

__all__ = [
    "IN_STEP",
    "NONE",
    "STALE",
    "DiskState",
    "Event",
    "Kind",
    "Out",
    "Owner",
    "PoolSettings",
    "PoolState",
    "SpaceState",
    "new_rows",
]

NONE, IN_STEP, STALE = 0, 1, 2
"""States of a member."""

_MOST_EVENTS = 256
_MOST_IN_RECORD = 512 << 10  # bytes of rows
_ROWS = struct.Struct("<IIQ")
_MARKS = struct.Struct("<II")
_NUMBER = struct.Struct("<I")
_INDEX = struct.Struct("<H")


class Kind:
    """Kinds of records."""

    POOL, DISK, DISK_GONE, SPACE, SPACE_GONE, ROWS, MARKS, EVENT, OWNER = range(1, 10)


Rows = npt.NDArray[Any]


def _member_type() -> Any:
    return np.dtype([("disk", "<u2"), ("state", "u1"), ("zero", "u1"), ("slab", "<u4")])


def new_rows(count: int, columns: int, slots: int) -> Rows:
    """Rows without slabs: an array of members by row, column and slot."""
    return np.zeros((count, columns, slots), _member_type())


@dataclass
class PoolSettings:
    """What is set for a pool as a whole.

    Attributes:
        id: the pool's UUID.
        name: how people call it.
        slab: bytes of a slab.
        retire: what happens to disks that failed or are missing.
        retire_seconds: how long a disk may be away before it is retired.
        alert_percents: thin spaces raise an alert when so much of the pool is allocated.
        read_only: the configuration is frozen.
    """

    id: UUID
    name: str
    slab: int
    retire: RetirePolicy = RetirePolicy.ALWAYS
    retire_seconds: float = 300.0
    alert_percents: list[int] = field(default_factory=lambda: [70])
    read_only: bool = False


@dataclass
class Out:
    """Since when a disk takes no part, and how its content will be judged when it returns.

    Attributes:
        since: number of the event; of two copies the one that went out later is newer.
        status: why.
        text: what happened, for people.
        term, sequence: of the last commit of the ledger that it had; older means an old copy.
        modified: when its file was last changed, nanoseconds; None if that is not known.
        all_stale: nothing on it counts.
        retired: it is not waited for any more.
        time: milliseconds since 1970.
    """

    since: int
    status: DiskStatus
    text: str
    term: int
    sequence: int
    modified: int | None = None
    all_stale: bool = False
    retired: bool = False
    time: int = 0


@dataclass
class DiskState:
    """A physical disk.

    Attributes:
        index: in members of rows, 0 to 255.
        id: its UUID.
        name: how people call it.
        path: where it was last.
        media, usage: as in :mod:`vhdx.spaces.states`.
        size: bytes.
        slabs: count.
        slabs_offset: bytes, of slab 0.
        is_block_device: it is not a file.
        latency: name of the latency model, or None.
        removing: it leaves the pool when nothing is on it any more.
        out: None while it takes part.
    """

    index: int
    id: UUID
    name: str
    path: str
    media: MediaType
    usage: Usage
    size: int
    slabs: int
    slabs_offset: int
    is_block_device: bool = False
    latency: str | None = None
    removing: bool = False
    out: Out | None = None


@dataclass
class SpaceState:
    """A space.

    Attributes:
        number: in records.
        id: its UUID.
        name: how people call it.
        resiliency, provisioning: as in :mod:`vhdx.spaces.states`.
        columns, copies: of each row.
        interleave: bytes.
        size: bytes.
        has_volume: it holds a volume; else it is a raw disk.
        media: only disks of this type are used; UNSPECIFIED: any.
        rows: members by row, column and slot.
        marks: rows whose copies may differ after a crash.
    """

    number: int
    id: UUID
    name: str
    resiliency: Resiliency
    provisioning: Provisioning
    columns: int
    copies: int
    interleave: int
    size: int
    has_volume: bool = True
    media: MediaType = MediaType.UNSPECIFIED
    rows: Rows = field(default_factory=lambda: new_rows(0, 1, 1), repr=False, compare=False)
    marks: set[int] = field(default_factory=set, repr=False)

    @property
    def slots(self) -> int:
        """Members of a column."""
        return self.copies + 1

    def row_count(self, slab: int) -> int:
        """Rows of slabs of so many bytes."""
        return -(-self.size // (slab * self.columns))

    def stored_rows(self) -> npt.NDArray[np.int64]:
        """The rows that have slabs."""
        return np.flatnonzero((self.rows["state"] != NONE).any(axis=(1, 2)))

    def marked(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of these rows have a mark."""
        found = np.zeros(count, np.bool_)
        found[[row - first for row in self.marks if first <= row < first + count]] = True
        return found


@dataclass
class Event:
    """Something that happened to a pool.

    Attributes:
        number: counts from 1.
        time: milliseconds since 1970.
        kind: for programs.
        text: for people.
        subject: name of the disk or space.
    """

    number: int
    time: int
    kind: str
    text: str
    subject: str = ""


def _plain(value: Any) -> Any:
    """What JSON can hold; ``_restored`` is the inverse."""
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, DiskStatus):
        return value.name
    if isinstance(value, (Resiliency, RetirePolicy)):
        return value.value
    raise TypeError(value)


def _packed(item: object, *, but: tuple[str, ...] = ()) -> bytes:
    fields = {key: value for key, value in asdict(item).items() if key not in but}  # type: ignore[call-overload]
    return json.dumps(fields, default=_plain, separators=(",", ":"), sort_keys=True).encode()


_RESTORE: dict[str, Any] = {
    "id": UUID,
    "media": MediaType,
    "usage": Usage,
    "provisioning": Provisioning,
    "resiliency": Resiliency,
    "retire": RetirePolicy,
    "status": lambda name: DiskStatus[name],
}


def _restored(kind: Any, fields: dict[str, Any]) -> Any:
    known = {key: _RESTORE[key](value) if key in _RESTORE else value for key, value in fields.items()}
    if isinstance(known.get("out"), dict):
        known["out"] = _restored(Out, known["out"])
    return kind(**known)


def _runs(numbers: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of ascending numbers without gaps: first, and one past the last."""
    if len(numbers) == 0:
        return
    cuts = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    for start, end in zip([0, *cuts], [*cuts, len(numbers)], strict=True):
        yield int(numbers[start]), int(numbers[end - 1]) + 1


class Owner(Protocol):
    """Keeps the metadata of a space's content."""

    def apply(self, payload: bytes) -> None:
        """Adds what one record says."""

    def records(self) -> Iterable[bytes]:
        """Records that stand for the whole."""


class _Kept:
    """The records of an owner that is not there."""

    def __init__(self) -> None:
        self._payloads: list[bytes] = []

    def apply(self, payload: bytes) -> None:
        self._payloads.append(payload)

    def records(self) -> list[bytes]:
        return self._payloads


class PoolState:
    """The state of a pool.

    Attributes:
        settings: of the pool.
        disks: by index.
        spaces: by number.
        events: the newest.
        owners: of spaces' content, by the spaces' numbers.
    """

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.disks: dict[int, DiskState] = {}
        self.spaces: dict[int, SpaceState] = {}
        self.events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self.owners: dict[int, Owner] = {}
        self.event_number = 0

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> PoolState:
        """The state that the records stand for.

        Raises:
            DamagedError: they contradict each other.
        """
        state: PoolState | None = None
        try:
            for kind, payload in records:
                if state is None:
                    state = cls(_restored(PoolSettings, json.loads(payload)))
                else:
                    state.apply(kind, payload)
        except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
            raise DamagedError(f"the pool's records contradict each other: {error!r}") from error
        if state is None:
            raise DamagedError("the pool's ledger is empty")
        return state

    def apply(self, kind: int, payload: bytes) -> None:
        """Adds what one record says."""
        if kind == Kind.POOL:
            self.settings = _restored(PoolSettings, json.loads(payload))
        elif kind == Kind.DISK:
            disk = _restored(DiskState, json.loads(payload))
            self.disks[disk.index] = disk
        elif kind == Kind.DISK_GONE:
            del self.disks[_INDEX.unpack(payload)[0]]
        elif kind == Kind.SPACE:
            self._apply_space(json.loads(payload))
        elif kind == Kind.SPACE_GONE:
            number = _NUMBER.unpack(payload)[0]
            del self.spaces[number]
            self.owners.pop(number, None)
        elif kind == Kind.ROWS:
            self._apply_rows(payload)
        elif kind == Kind.MARKS:
            number, marked = _MARKS.unpack_from(payload)
            rows = np.frombuffer(payload, "<u8", offset=_MARKS.size).tolist()
            marks = self.spaces[number].marks
            marks.update(rows) if marked else marks.difference_update(rows)
        elif kind == Kind.EVENT:
            event = Event(**json.loads(payload))
            self.events.append(event)
            self.event_number = max(self.event_number, event.number)
        elif kind == Kind.OWNER:
            number = _NUMBER.unpack_from(payload)[0]
            self.owners.setdefault(number, _Kept()).apply(payload[_NUMBER.size :])
        else:
            raise DamagedError(f"a record of the unknown kind {kind}")

    def _apply_space(self, fields: dict[str, Any]) -> None:
        space: SpaceState = _restored(SpaceState, fields)
        old = self.spaces.get(space.number)
        count = space.row_count(self.settings.slab)
        space.rows = new_rows(count, space.columns, space.slots)
        if old is not None:
            kept = min(count, len(old.rows))
            space.rows[:kept] = old.rows[:kept]
            space.marks = {row for row in old.marks if row < kept}
        self.spaces[space.number] = space

    def _apply_rows(self, payload: bytes) -> None:
        number, members, first = _ROWS.unpack_from(payload)
        space = self.spaces[number]
        if members != space.columns * space.slots:
            raise DamagedError(f"rows of {members} members in a space of another layout")
        found = np.frombuffer(payload, _member_type(), offset=_ROWS.size)
        rows = found.reshape(-1, space.columns, space.slots)
        if first + len(rows) > len(space.rows):
            raise DamagedError("rows beyond the end of a space")
        used = rows[rows["state"] != NONE]
        for index in np.unique(used["disk"]).tolist():
            here = used["slab"][used["disk"] == index]
            if index not in self.disks or here.max() >= self.disks[index].slabs:
                raise DamagedError("a slab that does not exist is in use")
        space.rows[first : first + len(rows)] = rows

    # ---- records ----

    def pool_record(self, settings: PoolSettings | None = None) -> Record:
        return Record(Kind.POOL, _packed(settings or self.settings))

    @staticmethod
    def disk_record(disk: DiskState) -> Record:
        return Record(Kind.DISK, _packed(disk))

    @staticmethod
    def space_record(space: SpaceState) -> Record:
        plain = SpaceState(
            **{
                key: getattr(space, key)
                for key in space.__dataclass_fields__
                if key not in {"rows", "marks"}
            }
        )
        return Record(Kind.SPACE, _packed(plain, but=("rows", "marks")))

    @staticmethod
    def disk_gone_record(index: int) -> Record:
        return Record(Kind.DISK_GONE, _INDEX.pack(index))

    @staticmethod
    def space_gone_record(number: int) -> Record:
        return Record(Kind.SPACE_GONE, _NUMBER.pack(number))

    @staticmethod
    def rows_records(space: SpaceState, first: int, rows: Rows) -> Iterator[Record]:
        """Records of rows from ``first`` on."""
        each = space.columns * space.slots
        step = max(1, _MOST_IN_RECORD // (each * 8))
        for at in range(0, len(rows), step):
            head = _ROWS.pack(space.number, each, first + at)
            yield Record(Kind.ROWS, head + rows[at : at + step].tobytes())

    @staticmethod
    def marks_records(space: SpaceState, rows: Iterable[int], *, marked: bool) -> list[Record]:
        numbers = np.array(sorted(rows), "<u8")
        step = _MOST_IN_RECORD // 8
        head = _MARKS.pack(space.number, marked)
        return [
            Record(Kind.MARKS, head + numbers[at : at + step].tobytes())
            for at in range(0, len(numbers), step)
        ]

    @staticmethod
    def owner_record(number: int, payload: bytes) -> Record:
        return Record(Kind.OWNER, _NUMBER.pack(number) + payload)

    @staticmethod
    def event_record(event: Event) -> Record:
        return Record(Kind.EVENT, _packed(event))

    def records(self) -> Iterator[Record]:
        """Records that stand for the whole state."""
        yield self.pool_record()
        for disk in self.disks.values():
            yield self.disk_record(disk)
        for space in self.spaces.values():
            yield self.space_record(space)
            stored = space.stored_rows()
            for run in np.split(stored, np.flatnonzero(np.diff(stored) != 1) + 1):
                if len(run):
                    yield from self.rows_records(space, int(run[0]), space.rows[run[0] : run[-1] + 1])
            yield from self.marks_records(space, space.marks, marked=True)
            owner = self.owners.get(space.number)
            for payload in () if owner is None else owner.records():
                yield self.owner_record(space.number, payload)
        for event in self.events:
            yield self.event_record(event)

    # ---- questions ----

    def used(self, index: int) -> npt.NDArray[np.bool_]:
        """Which slabs of a disk are in use."""
        found = np.zeros(self.disks[index].slabs, np.bool_)
        for space in self.spaces.values():
            mine = (space.rows["state"] != NONE) & (space.rows["disk"] == index)
            found[space.rows["slab"][mine]] = True
        return found

    def space_named(self, name: str) -> SpaceState | None:
        return next((space for space in self.spaces.values() if space.name == name), None)

    def disk_named(self, name: str) -> DiskState | None:
        return next((disk for disk in self.disks.values() if disk.name == name), None)
