# SPDX-License-Identifier: MIT
"""Headers and the log of an image that is open for writing.

First change ([MS-VHDX] 2.2.2, 2.3). One header gets a new FileWriteGuid and DataWriteGuid. An empty
entry is written to the log. The other header gets the LogGuid. Each of these steps is durable
before the next one. Then the first header gets the LogGuid, too. So the log has a valid sequence
for every LogGuid in a header, and one of the two headers is always durable and whole.

Commit. The caller has made the data durable. For each group of pages, the journal writes a log
entry, takes a barrier, and writes the pages in place. A barrier also comes before the next entry,
so replay needs only the newest entry.

Generations. All entries under one LogGuid form a single run of consecutive numbers, and nothing
valid under that LogGuid stands anywhere else in the log. A new LogGuid begins a new generation: its
first entry is made durable, then a header that names it. A new generation begins when an entry does
not fit before the end of the log, before the file gets shorter, and before metadata that an entry
holds is changed without the log. The specification asks for less: its search (2.3.3) takes only
consecutive numbers, and replay begins at the newest entry's tail. QEMU differs in three ways. It
accepts the entry behind a run's first one whatever its sequence number is. It replays a run from
its first entry on. It refuses a run in which any entry asks for a longer file.

No entry wraps. The last two sectors stay unused, because QEMU's search never ends if the entries
reach the end of the log. Three entries always fit, so a new entry never overwrites the newest
durable entry.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import NoSpaceError, PoisonedError
from vhdx.format import header as headers
from vhdx.format import log
from vhdx.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from vhdx.format.log import Patch

    _Content = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]
    """Offsets of 4 KiB pages in the file, bytes, and their content, n by 4096 bytes."""

__all__ = ["MOST_PAGES", "Journal", "Pages", "change_once", "replay_to_file"]

_READ, _WRITE, _ZERO, _FLUSH = (
    plane.Operation.READ,
    plane.Operation.WRITE,
    plane.Operation.ZERO,
    plane.Operation.FLUSH,
)
MOST_PAGES = 83
"""Pages of one log entry; three of them always fit into the log."""

_UNUSED = 2 * log.SECTOR
_AGAIN = "free some space, then close the image and open it again"
_KEPT_PAGES = 2048

_BARRIER = plane.Step(_FLUSH)


def _nothing() -> _Content:
    return np.empty(0, np.uint64), np.empty((0, log.SECTOR), np.uint8)


def _header_step(header: headers.Header) -> plane.Step:
    return plane.Step(_WRITE, headers.HEADER_OFFSETS[header.slot], buffer=header.pack())


def replay_to_file(
    leaf: plane.Device,
    header: headers.Header,
    sequence: log.Sequence,
    file_write_guid: UUID | None = None,
) -> headers.Header:
    """Replays the log into the file ([MS-VHDX] 2.3.3) and clears the LogGuid.

    A crash at any moment leaves an image that replays again to the same content. The DataWriteGuid
    stays, because no guest could tell the difference.

    Returns:
        The header that is current afterwards.
    """
    header = header.successor(file_write_guid=file_write_guid or uuid4())
    leaf.batch([_header_step(header), _BARRIER])
    patches = log.patches_of(sequence)
    end = max((p.offset + p.length for p in patches), default=0)
    size = max(leaf.size, end, sequence.head.last_file_offset)
    if size > leaf.size:
        leaf.resize(size)
    leaf.batch([*(_patch_step(patch) for patch in patches), _BARRIER])
    for _ in range(2):  # both copies, so that neither asks for a replay again
        header = header.successor(log_guid=headers.NIL)
        leaf.batch([_header_step(header), _BARRIER])
    return header


def change_once(leaf: plane.Device, header: headers.Header, offset: int, data: bytes) -> None:
    """Changes whole 4 KiB pages of metadata through the log, in a session of its own.

    Args:
        leaf: the file, whose log is empty.
        header: the current one; its DataWriteGuid stays.
        offset: bytes in the file.
        data: up to :data:`MOST_PAGES` pages.
    """
    one = Journal(leaf, header)
    size = leaf.size
    leaf.flush()
    one.open(size, header.data_write_guid)
    pages = np.frombuffer(data, np.uint8).reshape(-1, log.SECTOR)
    offsets = np.arange(len(pages), dtype=np.uint64) * np.uint64(log.SECTOR) + np.uint64(offset)
    one.commit(offsets, pages, size)
    one.close(size)


def _patch_step(patch: Patch) -> plane.Step:
    if patch.data is None:
        return plane.Step(_ZERO, patch.offset, patch.length)
    return plane.Step(_WRITE, patch.offset, buffer=patch.data)


class Journal:
    """Writes headers and log entries of one open image; the caller serialises the calls.

    Owns the header section and the log region of the file, and nothing else.
    """

    def __init__(self, leaf: plane.Device, header: headers.Header) -> None:
        self._leaf = leaf
        self._header = header
        self._head = 0  # where the next entry goes, bytes in the log
        self._counting = (0, 0)  # start and end of the current entry, bytes in the log
        self._sequence = 0
        self._applied_durable = True
        self._pages = Pages(leaf)

    @property
    def header(self) -> headers.Header:
        """The current header."""
        return self._header

    @property
    def is_open(self) -> bool:
        """Whether the log is in use, so that a crash needs a replay."""
        return self._header.log_guid != headers.NIL

    def read(self, offsets: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """The pages of metadata at these ascending offsets (bytes), n by 4096 bytes."""
        return self._pages.read(offsets)

    def forget(self) -> None:
        """Drops cached pages: metadata was, or will be, written other than by :meth:`commit`."""
        self._pages.forget()

    def open(self, file_size: int, data_write_guid: UUID | None = None) -> None:
        """Prepares headers and log for the first change; takes three barriers.

        Args:
            file_size: bytes of the file now, durable already.
            data_write_guid: a new one when None.
        """
        data = uuid4() if data_write_guid is None else data_write_guid
        header = self._header.successor(file_write_guid=uuid4(), data_write_guid=data)
        self._leaf.batch([_header_step(header), _BARRIER])
        self._header = header
        self._sequence = secrets.randbits(62) + 1
        self._begin_generation(_nothing(), file_size, at=self._head)

    def commit(
        self,
        offsets: npt.NDArray[np.uint64],
        pages: npt.NDArray[np.uint8],
        file_size: int,
    ) -> None:
        """Makes a change of 4 KiB pages durable through the log, then applies it.

        Args:
            offsets: of the pages in the file, bytes.
            pages: their new content, n by 4096 bytes.
            file_size: bytes of the file, durable already.
        """
        if not self.is_open:
            raise PoisonedError("metadata cannot be changed without a log")  # an internal bug
        for first in range(0, len(offsets), MOST_PAGES):
            some = slice(first, first + MOST_PAGES)
            self._commit_entry((offsets[some], pages[some]), file_size)

    def _commit_entry(self, content: _Content, file_size: int) -> None:
        # The entry is its own tail, so changes applied earlier must be durable before it.
        steps = [] if self._applied_durable else [_BARRIER]
        apply = _page_steps(_WRITE, *content)
        length = log.entry_length(len(content[0]))
        try:
            if self._fits(length):
                entry = self._pack(self._header.log_guid, content, file_size, self._head)
                steps += [*self._entry_steps(entry, self._head), _BARRIER, *apply]
                self._applied_durable = False
                self._leaf.batch(steps)
                self._advance(self._head, length)  # only now: a failed entry is overwritten
            else:
                self._begin_generation(content, file_size, at=0)
                self._applied_durable = False
                self._leaf.batch(apply)
        except BaseException:
            self._pages.forget()  # it is unknown which pages were applied
            raise
        self._pages.keep(*content)

    def restart(self, file_size: int) -> None:
        """Begins a new generation, durably, so that earlier entries are never replayed.

        Call it before the file gets shorter, and before metadata is changed without the log.

        Args:
            file_size: bytes; the file has at least this size now and after the change.
        """
        at = self._head if self._fits(log.entry_length(0)) else 0
        self._begin_generation(_nothing(), file_size, at=at)

    def _begin_generation(self, content: _Content, file_size: int, *, at: int) -> None:
        """Writes the first entry of a new LogGuid at ``at`` in the log; then both headers name it.

        The previous entry is never replayed once the first of the two headers is durable. So the
        changes of the previous entry are made durable first.
        """
        guid = uuid4()
        entry = self._pack(guid, content, file_size, at)
        steps = [] if self._applied_durable else [_BARRIER]
        self._leaf.batch([*steps, *self._entry_steps(entry, at), _BARRIER])
        self._applied_durable = True
        header = self._header.successor(log_guid=guid)
        try:
            self._leaf.batch([_header_step(header), _BARRIER])
        except NoSpaceError as error:
            # It is unknown which LogGuid is current, so nothing can be logged under either.
            raise PoisonedError(
                "it is unknown whether a header was written", path=self._leaf.path, hint=_AGAIN
            ) from error
        self._header = header
        self._advance(at, len(entry))
        # The other copy too, so that a damaged header does not lead back to the old LogGuid.
        self._leaf.batch([_header_step(second := header.successor())])
        self._header = second

    def barrier_passed(self) -> None:
        """Notes that everything applied so far is durable (the data barrier of a commit)."""
        self._applied_durable = True

    def close(self, end: int) -> None:
        """Clears the LogGuid of both headers; everything applied becomes durable first.

        Args:
            end: bytes; the file is truncated to this size once no log refers to the rest.
        """
        first = self._header.successor(log_guid=headers.NIL)
        second = first.successor()
        self._leaf.batch([_BARRIER, _header_step(first), _BARRIER, _header_step(second)])
        if end < self._leaf.size:
            self._leaf.resize(end)
        # The second header must be durable, because the next open overwrites the first.
        self._leaf.flush()
        self._header = second

    def _fits(self, length: int) -> bool:
        """Whether an entry of this length fits between the head and the end of the log."""
        return self._head + length <= self._header.log_length - _UNUSED

    def _pack(self, guid: UUID, content: _Content, file_size: int, at: int) -> npt.NDArray[np.uint8]:
        """Packs the next entry for offset ``at`` in the log; the entry is its own tail."""
        size = file_size // MIB * MIB
        return log.pack_entry(
            guid,
            self._sequence,
            at,
            *content,
            flushed_file_offset=size,
            last_file_offset=size,
        )

    def _entry_steps(self, entry: npt.NDArray[np.uint8], start: int) -> list[plane.Step]:
        length = len(entry)
        assert start + length <= self._header.log_length - _UNUSED
        assert start + length <= self._counting[0] or start >= self._counting[1]
        return [plane.Step(_WRITE, self._header.log_offset + start, buffer=entry)]

    def _advance(self, start: int, length: int) -> None:
        self._counting = (start, start + length)
        self._head = start + length
        self._sequence += 1


def _page_steps(
    operation: plane.Operation, offsets: npt.NDArray[np.uint64], pages: npt.NDArray[np.uint8]
) -> Sequence[plane.Step]:
    """One step for each run of adjacent pages in the file; offsets ascend."""
    if not len(offsets):
        return []
    breaks = np.flatnonzero(np.diff(offsets) != log.SECTOR) + 1
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), len(offsets)]
    return [
        plane.Step(operation, int(offsets[a]), buffer=pages[a:b])
        for a, b in zip(starts, ends, strict=True)
    ]


class Pages:
    """Cache of the 4 KiB metadata pages read or written last, which saves a commit most reads.

    Args:
        leaf: the file.
        kept: capacity in pages; when it would be exceeded, the cache is emptied.
    """

    def __init__(self, leaf: plane.Device, kept: int = _KEPT_PAGES) -> None:
        self._leaf = leaf
        self._contents = np.empty((kept, log.SECTOR), np.uint8)  # uses memory only once written
        self._slots: dict[int, int] = {}

    def read(self, offsets: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Copies of the pages at these ascending offsets (bytes), n by 4096 bytes."""
        slots = np.array([self._slots.get(at, -1) for at in offsets.tolist()], np.int64)
        missing = np.flatnonzero(slots < 0)
        pages = np.empty((len(offsets), log.SECTOR), np.uint8)
        kept = slots >= 0
        pages[kept] = self._contents[slots[kept]]
        if len(missing):
            found = np.empty((len(missing), log.SECTOR), np.uint8)
            self._leaf.batch(_page_steps(_READ, offsets[missing], found))
            pages[missing] = found
            self.keep(offsets[missing], found)
        return pages

    def keep(self, offsets: npt.NDArray[np.uint64], pages: npt.NDArray[np.uint8]) -> None:
        """Caches pages that the file now holds at these offsets."""
        wanted = offsets.tolist()
        if len(self._slots) + sum(at not in self._slots for at in wanted) > len(self._contents):
            self.forget()
            if len(wanted) > len(self._contents):
                return
        slots = [self._slots.setdefault(at, len(self._slots)) for at in wanted]
        self._contents[slots] = pages

    def forget(self) -> None:
        """Empties the cache."""
        self._slots.clear()
