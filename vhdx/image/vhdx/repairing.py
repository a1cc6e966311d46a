# SPDX-License-Identifier: MIT
"""Repairs findings of a check that need no guess, and can undo the repair.

A repair first saves every byte that it changes durably in ``PATH.undo``. That file has a header
(signature, version, CRC-32C, size of the image before, its FileWriteGuid before and after) and
records (offset, length, CRC-32C, the bytes). Undo checks all of this, and that the image was not
changed since. Then it writes the records back, the last one first, and restores the old size. After
a crash in a repair or an undo, undo can be run again.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import google_crc32c

from vhdx import place, plane
from vhdx.errors import (
    DamagedError,
    ExistsError,
    HostIOError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    Reason,
    UnsupportedError,
    VhdxError,
)
from vhdx.format import bat, log, metadata, region
from vhdx.format import header as headers
from vhdx.format.bat import BlockState
from vhdx.image.host import open_file
from vhdx.image.vhdx import journal
from vhdx.image.vhdx.checking import Report, examine
from vhdx.image.vhdx.qemu_shifted_bat import find_shifted_pages
from vhdx.image.vhdx.structure import active_sequence, read_structure
from vhdx.interrupts import uninterruptible
from vhdx.place import ImageFile

if TYPE_CHECKING:
    from os import PathLike
    from uuid import UUID

__all__ = ["repair", "undo", "undo_path"]

_HEADER = struct.Struct("<8sIIQ16s16s")
_RECORD = struct.Struct("<QII")
_SIGNATURE, _VERSION = b"vhdxundo", 2
_END = (1 << 64) - 1  # the offset in a record that ends what one sync made durable
_LARGEST_RECORD = 64 << 20
_BARRIER = plane.Step(plane.Operation.FLUSH)
_LEAVE_ALLOCATED = 1


def undo_path(path: str | PathLike[str]) -> Path:
    """Path of the undo file: beside the image's file, with symbolic links resolved."""
    return Path(place.real(path) + ".undo")


def _active(undo_file: Path) -> Path:
    """The name that the undo file has while an undo runs."""
    return undo_file.with_name(undo_file.name + ".active")


class _Undo:
    """The undo file of one repair."""

    def __init__(self, host: ImageFile, before: UUID) -> None:
        self.guid = uuid4()  # the FileWriteGuid that the repair gives the image
        self._path, self._leaf = undo_path(host.path), host.leaf
        self._place = place.of(self._path)
        self._size = host.leaf.size
        self._named = False  # once True, the image may have been changed
        try:
            if self._place.exists(os.fspath(_active(self._path))):
                raise ExistsError(
                    "an undo of an earlier repair was interrupted",
                    path=_active(self._path),
                    hint="finish it with check --undo",
                )
            if self._place.exists(os.fspath(self._path)):
                if not _never_used(self._path, before):
                    raise self._exists()
                self._place.remove(os.fspath(self._path))
            self._draft = self._place.draft(os.fspath(self._path))
        except OSError as error:
            if isinstance(error, VhdxError):
                raise
            raise HostIOError(str(error.strerror), path=self._path) from error
        rest = (self._size, before.bytes_le, self.guid.bytes_le)
        checksum = google_crc32c.value(_HEADER.pack(_SIGNATURE, _VERSION, 0, *rest))
        self._checksum, self._end = 0, 0  # of the file so far
        try:
            self._write(_HEADER.pack(_SIGNATURE, _VERSION, checksum, *rest))
        except OSError as error:
            self.close()
            raise self._failed(error) from error

    def _exists(self) -> ExistsError:
        return ExistsError(
            "it is the undo file of an earlier repair",
            path=self._path,
            hint="undo it with check --undo, or remove the file",
        )

    def save(self, offset: int, length: int) -> None:
        """Saves the current bytes of a range of the image.

        Raises:
            NoSpaceError, HostIOError: they cannot be saved; the image must not be changed.
        """
        try:
            self._save(offset, length)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> VhdxError:
        if isinstance(error, NoSpaceError) or error.errno == errno.ENOSPC:
            return NoSpaceError("no space left for the undo file", path=self._path)
        if isinstance(error, VhdxError):
            return error
        return HostIOError(str(error.strerror).lower(), path=self._path)

    def _save(self, offset: int, length: int) -> None:
        end = min(offset + length, self._size)
        for at in range(offset, end, _LARGEST_RECORD):
            data = self._leaf.read(min(_LARGEST_RECORD, end - at), at)
            self._write(_RECORD.pack(at, len(data), google_crc32c.value(data)) + data)

    def _write(self, data: bytes) -> None:
        leaf = self._draft.file.leaf
        leaf.resize(self._end + len(data))
        leaf.write(data, self._end)
        self._end += len(data)
        self._checksum = google_crc32c.extend(self._checksum, data)

    def sync(self) -> None:
        """Makes the undo file and its name durable; only then may the image be changed."""
        try:
            self._write(_RECORD.pack(_END, 0, self._checksum))
            self._draft.file.leaf.flush()
            if not self._named:
                self._draft.take(os.fspath(self._path), replace=False)
                self._named = True
            self._place.sync(os.fspath(self._path.parent))
        except FileExistsError as error:
            raise self._exists() from error
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Closes the undo file; removes it unless the image may have been changed."""
        self._draft.discard()
        self._draft.file.close()


def _never_used(kept: Path, now: UUID) -> bool:
    """Whether the undo file is from a repair that ended before it changed the image."""
    try:
        head = place.of(kept).peek(os.fspath(kept), _HEADER.size)
    except OSError:
        return False
    if len(head) < _HEADER.size:
        return False  # it is not an undo file
    fields = _HEADER.unpack(head)
    return bool(fields[0] == _SIGNATURE and fields[4] == now.bytes_le)


@uninterruptible
def repair(path: str | PathLike[str]) -> Report:
    """Checks an image and repairs the findings that need no guess.

    Saves the bytes that it overwrites in ``PATH.undo``; :func:`undo` restores them.

    Returns:
        The findings that are left; those that are gone are in ``repaired``.

    Raises:
        UnsupportedError, InUseError, ReadOnlyError: as :func:`vhdx.open`.
        ExistsError: an earlier repair was not undone.
    """
    host = open_file(path, write=True)
    try:
        before = examine(host)
        if not any(finding.repair for finding in before.findings):
            return before
        if place.of(host.path).kind(place.spelled(host.path)) == "device":
            raise UnsupportedError(
                "a repair keeps what it overwrites beside the image, and nothing lasts beside a"
                " block device",
                path=host.path,
                hint="copy the image to a file and repair that",
            )
        undo_file = _Undo(host, _current(host).file_write_guid)
        try:
            _mend(host, before, undo_file)
        finally:
            undo_file.close()
        after = examine(host)
        left = set(after.findings)
        after.repaired = [f for f in before.findings if f.repair and f not in left]
        return after
    finally:
        host.close()


def _current(host: ImageFile) -> headers.Header:
    copies = [
        headers.parse_header(host.leaf.read(headers.HEADER_SIZE, at), slot)
        for slot, at in enumerate(headers.HEADER_OFFSETS)
    ]
    return headers.choose_header(copies[0], copies[1])


def _mend(host: ImageFile, report: Report, undo_file: _Undo) -> bool:
    leaf, codes = host.leaf, {f.code for f in report.findings if f.repair}
    header = _current(host)
    for at in headers.HEADER_OFFSETS:
        undo_file.save(at, headers.HEADER_SIZE)
    if "log_dirty" in codes:
        sequence = active_sequence(host, header)
        assert sequence is not None
        for patch in log.patches_of(sequence):
            undo_file.save(patch.offset, patch.length)
        undo_file.sync()
        header = journal.replay_to_file(leaf, header, sequence, undo_file.guid)
        _mend_rest(host, header, undo_file)
        return True
    if "log_empty" in codes and report.errors > 1:
        # With other errors present, it is unknown whether the log mattered.
        codes.discard("log_empty")
        if not codes:
            return False
    clear = "log_empty" in codes
    return _mend_rest(host, header, undo_file, clear_log=clear, always=bool(codes))


def _mend_rest(
    host: ImageFile,
    header: headers.Header,
    undo_file: _Undo,
    *,
    clear_log: bool = False,
    always: bool = False,
) -> bool:
    """Makes all repairs except a replay; the log is empty, or is cleared here."""
    leaf = host.leaf
    if clear_log:
        probe = replace(header, log_guid=headers.NIL)
    elif header.log_guid != headers.NIL:
        return False  # an unreadable log: nothing else may be touched
    else:
        probe = header
    pages = [] if clear_log else _page_steps(host)
    # Repair other entries only when no page has moved; a later repair can do it.
    steps = [*_region_steps(leaf, probe), *(pages or _table_steps(host))]
    if not steps and not always:
        return False
    for step in steps:
        undo_file.save(step.offset, len(memoryview(step.buffer or b"")))
    undo_file.sync()
    # Write the FileWriteGuid first ([MS-VHDX] 2.2.2). At the end both headers are valid and agree.
    shown = uuid4() if pages else header.data_write_guid  # only moved pages change the content
    first = header.successor(file_write_guid=undo_file.guid, data_write_guid=shown)
    leaf.batch([_header_step(first), _BARRIER, *steps, _BARRIER])
    for _ in range(2):
        first = first.successor(log_guid=headers.NIL)
        leaf.batch([_header_step(first), _BARRIER])
    return True


def _header_step(header: headers.Header) -> plane.Step:
    at = headers.HEADER_OFFSETS[header.slot]
    return plane.Step(plane.Operation.WRITE, at, buffer=header.pack())


def _region_steps(leaf: plane.Device, header: headers.Header) -> list[plane.Step]:
    """Steps that make both region tables equal and set their Required bits."""
    copies = [leaf.read(region.TABLE_SIZE, at) for at in region.TABLE_OFFSETS]
    parsed = [region.parse_table(copy) for copy in copies]
    regions = next((table for table in parsed if table is not None), None)
    if regions is None:
        return []
    wanted = [
        replace(r, required=True) if r.guid in {region.BAT, region.METADATA} else r for r in regions
    ]
    try:
        region.check_regions(wanted, region.TABLE_OFFSETS[0], header.log_offset, header.log_length)
    except DamagedError:
        return []
    if parsed == [wanted, wanted]:
        return []
    table = region.pack_table(wanted)
    return [plane.Step(plane.Operation.WRITE, at, buffer=table) for at in region.TABLE_OFFSETS]


def _table_steps(host: ImageFile) -> list[plane.Step]:
    """Steps that repair BAT entries, and the flag of a fixed image that is not allocated."""
    report, steps = examine(host), []
    for finding in report.findings:
        if not finding.repair or finding.offset is None:
            continue
        at = finding.offset
        if finding.code == "bat_stray_offset":
            entry = int.from_bytes(host.leaf.read(bat.ENTRY_SIZE, at), "little")
            steps.append(_entry_step(at, entry & 7))
        elif finding.code == "partial_without_parent":
            entry = int.from_bytes(host.leaf.read(bat.ENTRY_SIZE, at), "little")
            steps.append(_entry_step(at, entry & ~7 | BlockState.FULLY_PRESENT))
        elif finding.code == "fixed_not_allocated":
            where = _file_parameters(host)
            flags = int.from_bytes(host.leaf.read(4, where + 4), "little")
            data = (flags & ~_LEAVE_ALLOCATED).to_bytes(4, "little")
            steps.append(plane.Step(plane.Operation.WRITE, where + 4, buffer=data))
    return steps


def _page_steps(host: ImageFile) -> list[plane.Step]:
    """Steps that restore pages of the BAT whose entries moved (QEMU's bug 727)."""
    try:
        structure = read_structure(host)
    except DamagedError:
        return []
    return [
        plane.Step(
            plane.Operation.WRITE,
            structure.bat.offset + page.index * bat.ENTRY_SIZE,
            buffer=page.entries.astype("<u8").tobytes(),
        )
        for page in find_shifted_pages(structure, host.leaf)
        if page.entries is not None
    ]


def _entry_step(at: int, value: int) -> plane.Step:
    return plane.Step(plane.Operation.WRITE, at, buffer=value.to_bytes(8, "little"))


def _file_parameters(host: ImageFile) -> int:
    """Where the file parameters item stands, bytes."""
    for at in region.TABLE_OFFSETS:
        regions = region.parse_table(host.leaf.read(region.TABLE_SIZE, at))
        if regions is not None:
            where = next(r for r in regions if r.guid == region.METADATA)
            table = host.leaf.read(metadata.TABLE_SIZE, where.offset)
            items = metadata.parse_table(table, where.offset, where.length)
            item = next(i for i in items if i.guid == metadata.FILE_PARAMETERS)
            return where.offset + item.offset
    raise DamagedError("neither region table is valid", path=host.path)


@uninterruptible
def undo(path: str | PathLike[str]) -> None:
    """Restores the bytes that the last repair overwrote, and removes ``PATH.undo``.

    Raises:
        NotFoundError: there is nothing to undo.
        DamagedError: the undo file is damaged; nothing is changed.
        InvalidArgumentError: the image was changed since the repair; nothing is changed.
    """
    kept = undo_path(path)
    under_way, there = _active(kept), place.of(kept)
    again = there.exists(os.fspath(under_way))
    try:
        data = _read_whole(under_way if again else kept)
    except NotFoundError as error:
        raise NotFoundError("there is nothing to undo", path=kept) from error
    size, guids, records = _parse(kept, data)
    host = open_file(path, write=True)
    try:
        if not _fits(host, size, guids, records, again=again):
            raise InvalidArgumentError(
                "it was changed since the repair, so the saved bytes no longer fit",
                path=host.path,
                hint=f"remove {under_way if again else kept}",
            )
        if not again:  # from here on, an undo may start again in any state of the image
            there.rename(os.fspath(kept), os.fspath(under_way))
            there.sync(os.fspath(kept.parent))
        _restore(host.leaf, size, records)
    finally:
        host.close()
    there.remove(os.fspath(under_way))
    there.sync(os.fspath(kept.parent))


def _read_whole(path: Path) -> bytes:
    file = open_file(path, write=False, locked=False)
    try:
        return file.leaf.read(file.leaf.size, 0)
    finally:
        file.close()


_Records = list[tuple[int, bytes]]


def _fits(host: ImageFile, size: int, guids: set[bytes], records: _Records, *, again: bool) -> bool:
    """Whether the image is as the repair, or an interrupted undo, has left it."""
    try:
        now = _current(host).file_write_guid
    except DamagedError:
        # An undo restores the headers after all else, and may have left half of the second one.
        saved = [(at, content) for at, content in records if at not in headers.HEADER_OFFSETS]
        return (
            again
            and host.leaf.size == size
            and all(host.leaf.read(len(content), at) == content for at, content in saved)
        )
    return now.bytes_le in guids or (again and now in _saved_guids(records))


def _restore(leaf: plane.Device, size: int, records: _Records) -> None:
    """Writes the saved bytes back: the headers last, first those that were damaged."""
    first: list[plane.Step] = []
    rest: list[plane.Step] = []
    for at, content in reversed(records):
        is_header = at in headers.HEADER_OFFSETS
        (rest if is_header else first).append(plane.Step(plane.Operation.WRITE, at, buffer=content))
    if leaf.size < size:
        leaf.resize(size)
    leaf.batch(first)
    if leaf.size > size:
        leaf.resize(size)
    leaf.flush()
    valid = [_header_of(step.offset, bytes(step.buffer or b"")) is not None for step in rest]
    for _, step in sorted(zip(valid, rest, strict=True), key=lambda each: each[0]):
        leaf.batch([step, _BARRIER])


def _header_of(at: int, content: bytes) -> headers.Header | None:
    if len(content) != headers.HEADER_SIZE:
        return None
    return headers.parse_header(content, headers.HEADER_OFFSETS.index(at))


def _saved_guids(records: _Records) -> set[UUID]:
    """The FileWriteGuids of the saved headers, which an undo restores one after the other."""
    found = [_header_of(at, each) for at, each in records if at in headers.HEADER_OFFSETS]
    return {header.file_write_guid for header in found if header is not None}


def _parse(kept: Path, data: bytes) -> tuple[int, set[bytes], _Records]:
    """The size, the two FileWriteGuids and the records of an undo file.

    A sync ends with an end record. What follows the last end record was not durable before the image
    was changed next, so that change did not happen, and these records do not count.
    """

    def refuse(at: int) -> DamagedError:
        return DamagedError(
            "it is damaged, so nothing is restored", reason=Reason.TRUNCATED, path=kept, offset=at
        )

    if len(data) < _HEADER.size:
        raise refuse(0)
    signature, version, checksum, size, *guids = _HEADER.unpack_from(data)
    plain = _HEADER.pack(signature, version, 0, size, *guids)
    known = version in {1, _VERSION}  # the first had no end records
    if signature != _SIGNATURE or not known or google_crc32c.value(plain) != checksum:
        raise refuse(0)
    records, end, stop = _parse_records(data, size)
    is_ended = data[-_RECORD.size :].startswith(_END.to_bytes(8, "little"))
    if stop < len(data) and (version == 1 or end is None or is_ended):
        raise refuse(stop)
    if version == 1:
        return size, set(guids), records
    if end is None:
        raise refuse(stop)
    return size, set(guids), records[:end]


def _parse_records(data: bytes, size: int) -> tuple[_Records, int | None, int]:
    """The records, how many the last end record covers, and where the valid ones end."""
    at, end = _HEADER.size, None
    records: _Records = []
    while len(data) - at >= _RECORD.size:
        offset, length, checksum = _RECORD.unpack_from(data, at)
        content = data[at + _RECORD.size : at + _RECORD.size + length]
        if offset == _END:
            if length or google_crc32c.value(data[:at]) != checksum:
                break
            end = len(records)
        elif (
            len(content) != length
            or google_crc32c.value(content) != checksum
            or offset + length > size
        ):
            break
        else:
            records.append((offset, content))
        at += _RECORD.size + length
    return records, end, at
