# SPDX-License-Identifier: MIT
"""Checks a VHDX image against the rules of [MS-VHDX], without changing it.

Reads what :func:`vhdx.open` reads, but goes on after the first error, and checks more: both copies
of headers and region tables, entries that only other programs reject, unused space, and traces of
other programs' bugs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import DamagedError, Reason, UnsupportedError, VhdxError
from vhdx.format import bat, log, metadata, region
from vhdx.format import header as headers
from vhdx.format.bat import BitmapState, BlockState, Geometry
from vhdx.image.host import open_file
from vhdx.image.vhdx.allocation import Taken, bat_runs, check_entries, is_payload, survey
from vhdx.image.vhdx.image import open_vhdx
from vhdx.image.vhdx.overlay import Overlay
from vhdx.image.vhdx.qemu_shifted_bat import find_shifted_pages
from vhdx.image.vhdx.structure import Structure, active_sequence, find_refusals, read_structure
from vhdx.image.vhdx.view import View
from vhdx.interrupts import uninterruptible
from vhdx.place import ImageFile
from vhdx.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    import numpy.typing as npt

__all__ = ["Finding", "Report", "check", "examine"]

_Result = TypeVar("_Result")
_MOST_OF_A_KIND = 20
ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        code: stable, for programs.
        severity: "error" (content is lost or the image must not be used), "warning" (other
            programs may fail on it) or "note".
        offset: bytes in the file, or None.
        message: for people.
        repair: whether ``check --repair`` can repair it without guessing.
    """

    code: str
    severity: str
    offset: int | None
    message: str
    repair: bool = False


@dataclass
class Report:
    """What a check found.

    Attributes:
        path: of the image.
        findings: in the order of the file's structures.
        leaked: bytes of the file that are not in use.
        repaired: findings that a repair removed.
    """

    path: str
    findings: list[Finding] = field(default_factory=list)
    leaked: int = 0
    repaired: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(f.severity == ERROR for f in self.findings)

    def add(
        self, code: str, severity: str, offset: int | None, message: str, *, repair: bool = False
    ) -> None:
        """Notes a finding, unless there are many of its kind already."""
        same = sum(f.code == code for f in self.findings)
        if same < _MOST_OF_A_KIND:
            self.findings.append(Finding(code, severity, offset, message, repair))
        elif same == _MOST_OF_A_KIND:
            self.findings.append(Finding(code, severity, None, "and more of this kind"))

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "path": self.path,
            "errors": self.errors,
            "warnings": sum(f.severity == WARNING for f in self.findings),
            "leaked": self.leaked,
            "findings": [asdict(f) for f in self.findings],
            "repaired": [asdict(f) for f in self.repaired],
        }


@uninterruptible
def check(path: str | PathLike[str]) -> Report:
    """Checks an image, and changes nothing.

    Raises:
        UnsupportedError: it is not a VHDX file.
        InUseError: it is open for writing.
        VhdxError: it cannot be read.
    """
    host = open_file(path, write=False)
    try:
        report = examine(host)
        if not report.errors:
            _parents(report, host)
        return report
    finally:
        host.close()


def _parents(report: Report, host: ImageFile) -> None:
    """Reports parents that are missing or do not fit."""
    try:
        open_vhdx(
            open_file(host.path, write=False, locked=False),
            write=False,
            chain=True,
            parent_search=(),
            pool=plane.shared_pool(plane.Level.IMAGE),
        ).close()
    except VhdxError as error:
        if error.path is not None and error.path != host.path:
            report.add("parent", WARNING, None, f"a parent cannot be used: {error}")
        else:
            report.add(str(error.reason), WARNING, error.offset, error.message)


def examine(host: ImageFile) -> Report:
    """Checks the image in ``host``."""
    report = Report(host.path)
    leaf = host.leaf
    if leaf.size < 8 or leaf.read(8, 0) != headers.SIGNATURE:
        raise UnsupportedError("it is not a VHDX file", path=host.path)
    if leaf.size < headers.HEADER_SECTION:
        report.add("truncated", ERROR, leaf.size, "the file ends inside its header section")
        return report
    header = _headers(report, host)
    if header is None:
        return report
    overlay, sequence = _log(report, host, header)
    table = _regions(report, overlay, header)
    if table is None:
        return report
    structure = _metadata(report, overlay, header, sequence, *table)
    if structure is not None:
        _entries(report, host, structure)
        _as_opened(report, host, structure)
    return report


def _as_opened(report: Report, host: ImageFile, structure: Structure) -> None:
    """Reports errors that an open would raise and that were not found yet."""
    header = structure.header
    codes = {f.code for f in report.findings if f.severity == ERROR}
    if codes - {"log_empty"}:
        return
    # An unreadable log must not hide other errors, or a repair would clear the log.
    view = View(log=0) if codes else View()
    if structure.parameters.has_parent:
        again = _attempt(report, lambda: read_structure(host, view))
        for refusal in () if again is None else again.refusals:
            if refusal.reason == Reason.PARENT_LOCATOR:
                _damage(report, refusal)
    _attempt(report, lambda: survey(structure, host.leaf))
    if header.log_length == 0 or header.log_offset + header.log_length > host.leaf.size:
        report.add(
            "log_location",
            ERROR,
            header.log_offset,
            "it has no log inside the file, so it can only be read",
        )


def _damage(report: Report, error: DamagedError, *, repair: bool = False) -> None:
    report.add(str(error.reason), ERROR, error.offset, error.message, repair=repair)


def _attempt(report: Report, read: Callable[[], _Result]) -> _Result | None:
    try:
        return read()
    except DamagedError as error:
        _damage(report, error)
        return None


def _headers(report: Report, host: ImageFile) -> headers.Header | None:
    copies = [
        headers.parse_header(host.leaf.read(headers.HEADER_SIZE, at), slot)
        for slot, at in enumerate(headers.HEADER_OFFSETS)
    ]
    header = _attempt(report, lambda: headers.choose_header(copies[0], copies[1]))
    if header is None:
        return None
    other = copies[1 - header.slot]
    at = headers.HEADER_OFFSETS[1 - header.slot]
    if other is None:
        report.add("header_copy", WARNING, at, "one of the two headers is not valid", repair=True)
    elif other.data_write_guid != header.data_write_guid and header.log_guid == headers.NIL:
        # Old QEMU versions set different GUIDs in the two header updates of one open.
        report.add(
            "header_guids", WARNING, at, "the headers have different DataWriteGuids", repair=True
        )
    return header


def _log(
    report: Report, host: ImageFile, header: headers.Header
) -> tuple[Overlay, log.Sequence | None]:
    leaf = host.leaf
    try:
        sequence = active_sequence(host, header)
    except DamagedError as error:
        _damage(report, error, repair=error.reason == "log_empty")
        sequence = None
    if sequence is None:
        return Overlay(leaf, [], leaf.size), None
    report.add(
        "log_dirty",
        NOTE,
        header.log_offset,
        f"the log holds {len(log.patches_of(sequence))} changes to replay"
        if log.patches_of(sequence)
        else "the image was not closed; its log holds nothing to replay",
        repair=True,
    )
    return Overlay(leaf, log.patches_of(sequence), sequence.head.last_file_offset), sequence


def _regions(
    report: Report, overlay: Overlay, header: headers.Header
) -> tuple[list[region.Region], region.Region, region.Region] | None:
    tables = [region.parse_table(overlay.read(at, region.TABLE_SIZE)) for at in region.TABLE_OFFSETS]
    for i, found in enumerate(tables):
        if found is None and tables[1 - i] is not None:
            report.add(
                "region_table_copy",
                WARNING,
                region.TABLE_OFFSETS[i],
                "one of the two region tables is not valid",
                repair=True,
            )
    good = [t for t in tables if t is not None]
    if not good:
        report.add("region_table", ERROR, region.TABLE_OFFSETS[0], "neither region table is valid")
        return None
    if len(good) == 2 and good[0] != good[1]:
        report.add(
            "region_tables_differ",
            WARNING,
            region.TABLE_OFFSETS[1],
            "the region tables differ; the first counts",
            repair=True,
        )
    regions = good[0]
    at = region.TABLE_OFFSETS[0]
    both = _attempt(
        report, lambda: region.check_regions(regions, at, header.log_offset, header.log_length)
    )
    if both is None:
        return None
    for each in both:
        if not each.required:
            # QEMU does not set this bit, and VirtualBox refuses such images.
            report.add(
                "region_not_required",
                WARNING,
                at,
                f"region {each.guid} is not marked as required",
                repair=True,
            )
        if each.end > overlay.size:
            report.add("truncated", ERROR, each.offset, "a region ends past the end of the file")
            return None
    return regions, *both


def _metadata(
    report: Report,
    overlay: Overlay,
    header: headers.Header,
    sequence: log.Sequence | None,
    regions: list[region.Region],
    table: region.Region,
    where: region.Region,
) -> Structure | None:
    data = overlay.read(where.offset, metadata.TABLE_SIZE)
    items = _attempt(report, lambda: metadata.parse_table(data, where.offset, where.length))
    if items is None:
        return None
    values = {
        item.guid: overlay.read(where.offset + item.offset, item.length)
        for item in items
        if not item.is_user and item.guid in metadata.KNOWN
    }
    parameters = _attempt(report, lambda: metadata.parse_parameters(values, where.offset))
    if parameters is None:
        return None
    geometry = Geometry(
        parameters.virtual_size,
        parameters.block_size,
        parameters.logical_sector_size,
        parameters.has_parent,
    )
    if geometry.entries * bat.ENTRY_SIZE > table.length:
        report.add("bat_size", ERROR, table.offset, "the BAT has no room for all blocks")
        return None
    for refusal in find_refusals(overlay, where, values, None):
        if "disagree" not in refusal.message:  # already reported
            _damage(report, refusal)
    return Structure(
        "", header, True, table, where, tuple(regions), tuple(items), parameters, geometry,
        None, overlay, sequence,
    )  # fmt: skip


def _entries(report: Report, host: ImageFile, structure: Structure) -> None:
    size = structure.overlay.size
    taken, geometry = Taken(structure, size), structure.geometry
    shifted = _shifted(report, host, structure)
    fixed = structure.parameters.leave_blocks_allocated and not geometry.has_parent
    present = 0
    for first, values in bat_runs(structure, host.leaf):
        indices = np.arange(first, first + len(values), dtype=np.uint64)
        payload = is_payload(structure, indices)
        bad, _ = check_entries(structure, indices[payload], values[payload], size)
        for i in np.flatnonzero(bad)[: _MOST_OF_A_KIND + 1]:
            one = slice(int(i), int(i) + 1)
            _, error = check_entries(structure, indices[payload][one], values[payload][one], size)
            if error is not None:
                _damage(report, error)
        good = np.zeros(len(values), np.bool_)
        good[payload] = ~bad
        present += _claim_blocks(report, structure, taken, indices, values, good)
        if not shifted:
            _claim_bitmaps(report, structure, taken, indices, values, payload)
    if fixed and present < geometry.blocks:
        # QEMU's fixed images (bug 806) grow when they are written, which Windows does not expect.
        report.add(
            "fixed_not_allocated",
            WARNING,
            structure.bat.offset,
            f"it is marked as fixed, but {geometry.blocks - present} blocks are not allocated",
            repair=True,
        )
    report.leaked = taken.free_bytes(size)
    if report.leaked and not host.leaf.is_block_device:
        report.add(
            "leaked",
            NOTE,
            None,
            f"{report.leaked} bytes of the file are unused; new blocks or a compaction use them",
        )


def _shifted(report: Report, host: ImageFile, structure: Structure) -> bool:
    """Reports pages whose entries QEMU's bug 727 moved; returns whether there are any."""
    pages = find_shifted_pages(structure, host.leaf)
    for page in pages:
        verb = "moved" if page.sure else "may have moved"
        hint = f"; no repair is possible, because {page.reason}" if page.reason else ""
        if page.entries is not None:
            hint = "; a repair also moves data written to these blocks since"
        report.add(
            "bat_shifted",
            ERROR if page.sure else WARNING,
            structure.bat.offset + page.index * bat.ENTRY_SIZE,
            f"each entry of this page {verb} to the next block (QEMU's bug 727){hint}",
            repair=not page.reason,
        )
    return bool(pages)


def _claim_blocks(
    report: Report,
    structure: Structure,
    taken: Taken,
    indices: npt.NDArray[np.uint64],
    values: npt.NDArray[np.uint64],
    good: npt.NDArray[np.bool_],
) -> int:
    states, offsets = bat.state_of(values), bat.offset_of(values)
    stored = good & (states >= BlockState.FULLY_PRESENT)
    for some in _one_by_one(taken, indices[stored], offsets[stored], structure):
        _damage(report, some)
    misplaced = good & ((states == BlockState.ZERO) | (states == BlockState.NOT_PRESENT))
    misplaced &= offsets != 0
    for i in np.flatnonzero(misplaced)[: _MOST_OF_A_KIND + 1].tolist():
        report.add(
            "bat_stray_offset",
            WARNING,
            structure.bat.offset + int(indices[i]) * bat.ENTRY_SIZE,
            "an entry that stores no data has an offset; Hyper-V does not read such images",
            repair=True,
        )
    partial = good & (states == BlockState.PARTIALLY_PRESENT)
    for i in np.flatnonzero(partial)[: _MOST_OF_A_KIND + 1].tolist():
        at = structure.bat.offset + int(indices[i]) * bat.ENTRY_SIZE
        if not structure.geometry.has_parent:
            report.add(
                "partial_without_parent", WARNING, at, "a partially present block without a parent",
                repair=True,
            )  # fmt: skip
        elif not _has_bitmap(structure, int(indices[i])):
            report.add(
                "sector_bitmap", ERROR, at, "a partially present block without a sector bitmap"
            )
    return int(stored.sum())


def _one_by_one(
    taken: Taken,
    indices: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.uint64],
    structure: Structure,
) -> list[DamagedError]:
    """Claims all places at once; if that fails, one by one, to find every overlap."""
    block = structure.geometry.block_size
    try:
        taken.claim(indices, offsets, block)
    except DamagedError:
        found = []
        for i in range(len(indices)):
            try:
                taken.claim(indices[i : i + 1], offsets[i : i + 1], block)
            except DamagedError as error:
                found.append(error)
            if len(found) > _MOST_OF_A_KIND:
                break
        return found
    return []


def _has_bitmap(structure: Structure, index: int) -> bool:
    ratio = structure.geometry.chunk_ratio
    slot = structure.geometry.bitmap_index(index // (ratio + 1))
    at = structure.bat.offset + slot * bat.ENTRY_SIZE
    entry = np.frombuffer(structure.overlay.read(at, bat.ENTRY_SIZE), "<u8").astype(np.uint64)
    offset = int(bat.offset_of(entry)[0])
    present = int(bat.state_of(entry)[0]) >= BitmapState.PRESENT
    return present and MIB <= offset <= structure.overlay.size - MIB


def _claim_bitmaps(
    report: Report,
    structure: Structure,
    taken: Taken,
    indices: npt.NDArray[np.uint64],
    values: npt.NDArray[np.uint64],
    payload: npt.NDArray[np.bool_],
) -> None:
    states, offsets = bat.state_of(values), bat.offset_of(values)
    bitmaps = ~payload & (indices < structure.geometry.entries) & (states >= BitmapState.PRESENT)
    for i in np.flatnonzero(bitmaps).tolist():
        at = structure.bat.offset + int(indices[i]) * bat.ENTRY_SIZE
        if not structure.geometry.has_parent:
            report.add(
                "bitmap_without_parent", WARNING, at, "a sector bitmap in an image without a parent"
            )
        elif not MIB <= int(offsets[i]) <= structure.overlay.size - MIB:
            report.add("sector_bitmap", ERROR, at, "a sector bitmap has an offset outside the file")
        else:
            try:
                taken.claim(indices[i : i + 1], offsets[i : i + 1], MIB)
            except DamagedError as error:
                _damage(report, error)
