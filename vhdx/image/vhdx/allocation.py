# SPDX-License-Identifier: MIT
"""The BAT as a whole: validation, and which parts of the file are taken.

Works on runs of the table that the host has stored; holes of a sparse table are NOT_PRESENT entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import DamagedError, Reason
from vhdx.format import bat
from vhdx.format.bat import BlockState
from vhdx.format.header import HEADER_SECTION
from vhdx.units import MIB, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from vhdx.image.vhdx.structure import Structure

__all__ = ["Taken", "bat_runs", "block_counts", "check_entries", "is_payload", "survey"]

_RUN_ENTRIES = 1 << 16
# Sets of states: a bit each.
_VALID = sum(1 << state for state in BlockState)
_STORED = 1 << BlockState.FULLY_PRESENT | 1 << BlockState.PARTIALLY_PRESENT
_ANCHORED = 1 << BlockState.UNDEFINED | 1 << BlockState.UNMAPPED
_STATE_OF_BYTE = bytes(byte & 7 for byte in range(256))


def _stored_runs(structure: Structure, leaf: plane.Device) -> Iterator[tuple[int, bytes]]:
    """First index and bytes of each stored run of entries; the entries between runs are zero."""
    start, length = structure.bat.offset, structure.geometry.entries * bat.ENTRY_SIZE
    whole = [(start, length)]
    if structure.overlay.is_empty and start + length <= leaf.size:
        # File systems align holes to their blocks, but this code does not rely on it.
        whole = [
            (extent.offset // 8 * 8, -(-(extent.offset + extent.length) // 8) * 8)
            for extent in leaf.extents(start, length)
            if extent.state == plane.DATA
        ]
        whole = [(a, min(b, start + length) - a) for a, b in whole]
    for offset, size in whole:
        for at in range(offset, offset + size, _RUN_ENTRIES * 8):
            data = structure.overlay.read(at, min(_RUN_ENTRIES * 8, offset + size - at))
            yield (at - start) // 8, data


def bat_runs(
    structure: Structure, leaf: plane.Device
) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """First index and entries of each stored run; the entries between runs are zero."""
    for first, data in _stored_runs(structure, leaf):
        yield first, np.frombuffer(data, "<u8").astype(np.uint64)


def is_payload(structure: Structure, indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which entries are of payload blocks (the others are of sector bitmaps or past the end)."""
    ratio = structure.geometry.chunk_ratio
    within = indices % np.uint64(ratio + 1) != ratio
    block = indices - indices // np.uint64(ratio + 1)
    result: npt.NDArray[np.bool_] = within & (block < structure.geometry.blocks)
    return result


def _refuse(structure: Structure, index: int, message: str, reason: Reason) -> DamagedError:
    return DamagedError(message, reason=reason, offset=structure.bat.offset + index * bat.ENTRY_SIZE)


def _among(states: npt.NDArray[np.uint64], wanted: int) -> npt.NDArray[np.bool_]:
    result: npt.NDArray[np.bool_] = (np.uint64(wanted) >> states & np.uint64(1)) != 0
    return result


def check_entries(
    structure: Structure,
    indices: npt.NDArray[np.uint64],
    values: npt.NDArray[np.uint64],
    file_size: int,
) -> tuple[npt.NDArray[np.bool_], DamagedError | None]:
    """Which of these payload entries break a rule, and the error of the first.

    Args:
        structure: of the image.
        indices: of the entries.
        values: the entries.
        file_size: bytes of the file after replay.
    """
    states = bat.state_of(values)
    offsets = bat.offset_of(values)
    blocks = indices - indices // np.uint64(structure.geometry.chunk_ratio + 1)
    starts = blocks * np.uint64(structure.geometry.block_size)
    needed = np.minimum(
        np.uint64(structure.geometry.block_size),
        np.uint64(structure.geometry.virtual_size)
        - np.minimum(starts, np.uint64(structure.geometry.virtual_size)),
    )
    stored = _among(states, _STORED)
    bad_state = ~_among(states, _VALID)
    bad_reserved = bat.reserved_of(values) != 0
    bad_offset = stored & (
        (offsets < HEADER_SECTION)
        | (offsets > np.uint64(file_size))
        | (needed > np.uint64(file_size) - np.minimum(offsets, np.uint64(file_size)))
    )
    bad = bad_state | bad_reserved | bad_offset
    if not bad.any():
        return bad, None
    i = int(np.flatnonzero(bad)[0])
    block, index = int(blocks[i]), int(indices[i])
    if bad_state[i]:
        return bad, _refuse(
            structure, index, f"block {block} has the state {int(states[i])}", Reason.BAT_STATE
        )
    if bad_reserved[i]:
        return bad, _refuse(
            structure, index, f"the entry of block {block} has reserved bits", Reason.BAT_RESERVED
        )
    return bad, _refuse(
        structure,
        index,
        f"block {block} has the offset {int(offsets[i]):#x}, but the file has {file_size:#x} bytes",
        Reason.BAT_OFFSET,
    )


class Taken:
    """The parts of the file that are in use, in units of 1 MiB.

    Attributes:
        furthest: the end of the last block or region, which may be past the end of the file.
        anchors: soft anchors: offsets in UNMAPPED and UNDEFINED entries that nothing else claims.
        blocks: places of payload blocks that are stored.
    """

    def __init__(self, structure: Structure, file_size: int) -> None:
        self._structure = structure
        self._map = np.zeros(-(-file_size // MIB) + 1, np.bool_)
        self.furthest = max(each.end for each in structure.regions)
        self.anchors: set[int] = set()
        self.blocks = 0
        self._claim_span(0, HEADER_SECTION)
        header = structure.header
        self._claim_span(header.log_offset, header.log_offset + header.log_length)
        for each in structure.regions:
            self._claim_span(each.offset, each.end)

    def _claim_span(self, start: int, end: int) -> None:
        self._map[start // MIB : -(-end // MIB)] = True

    def claim(
        self, indices: npt.NDArray[np.uint64], offsets: npt.NDArray[np.uint64], length: int
    ) -> None:
        """Claims ``length`` bytes at each offset.

        Raises:
            DamagedError: another claim overlaps it.
        """
        if not len(offsets):
            return
        span = np.arange(max(1, length // MIB), dtype=np.uint64)
        step = max(1, (1 << 20) // len(span))
        claimed: list[npt.NDArray[np.uint64]] = []
        for first in range(0, len(offsets), step):
            some = offsets[first : first + step] // np.uint64(MIB)
            mibs = (some[:, None] + span).ravel()
            mibs = np.minimum(mibs, np.uint64(len(self._map) - 1))
            # The last cell stands for the part of a block that lies past the end of the file.
            inside = mibs < len(self._map) - 1
            unique, counts = np.unique(mibs[inside], return_counts=True)
            clash = np.flatnonzero(self._map[unique] | (counts > 1))
            if len(clash):
                mib = int(unique[clash[0]])
                low = (offsets // np.uint64(MIB)).astype(np.int64)
                for earlier in claimed:  # undo: claim all or nothing
                    self._map[earlier] = False
                guilty = np.flatnonzero((low <= mib) & (mib < low + len(span)))
                raise _refuse(
                    self._structure,
                    int(indices[guilty[-1]]),
                    f"two structures overlap at {mib * MIB:#x}",
                    Reason.BAT_OVERLAP,
                )
            self._map[unique] = True
            claimed.append(unique)
        self.furthest = max(self.furthest, int(offsets.max()) + length)

    @property
    def end(self) -> int:
        """The end of all claimed space, rounded up to 1 MiB."""
        return max(self._last * MIB, round_up(self.furthest, MIB))

    @property
    def _last(self) -> int:
        taken = np.flatnonzero(self._map[:-1])
        return int(taken[-1]) + 1 if len(taken) else 0

    def free_bytes(self, size: int) -> int:
        """Unclaimed bytes of a file of ``size`` bytes."""
        return int((~self._map[: size // MIB]).sum()) * MIB

    def gaps(self, length: int) -> npt.NDArray[np.uint64]:
        """Offsets of free places of ``length`` bytes (a multiple of 1 MiB) before the end."""
        free = np.concatenate(([False], ~self._map[: self._last], [False]))
        edges = np.flatnonzero(np.diff(free.astype(np.int8)))
        size = length // MIB
        found = [
            np.arange(start, stop - size + 1, size, dtype=np.uint64)
            for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
            if stop - start >= size
        ]
        return np.concatenate(found) * np.uint64(MIB) if found else np.empty(0, np.uint64)


def survey(structure: Structure, leaf: plane.Device) -> Taken:
    """Validates the whole BAT.

    Raises:
        DamagedError: an entry is invalid, or two entries claim the same place.
    """
    file_size = structure.overlay.size
    taken = Taken(structure, file_size)
    block_size = structure.geometry.block_size
    for first, values in bat_runs(structure, leaf):
        indices = np.arange(first, first + len(values), dtype=np.uint64)
        payload = is_payload(structure, indices)
        _, error = check_entries(structure, indices[payload], values[payload], file_size)
        if error is not None:
            raise error
        states, offsets = bat.state_of(values), bat.offset_of(values)
        stored = payload & _among(states, _STORED)
        taken.claim(indices[stored], offsets[stored], block_size)
        anchored = payload & _among(states, _ANCHORED) & (offsets >= HEADER_SECTION)
        anchored &= offsets <= np.uint64(max(0, file_size - block_size))
        taken.claim(indices[anchored], offsets[anchored], block_size)
        taken.anchors.update(offsets[anchored].tolist())
        taken.blocks += int(stored.sum())
        bitmaps = ~payload & (states >= bat.BitmapState.PRESENT) & (offsets >= HEADER_SECTION)
        bitmaps &= indices < structure.geometry.entries
        bitmaps &= offsets <= np.uint64(max(0, file_size - MIB))
        taken.claim(indices[bitmaps], offsets[bitmaps], MIB)
    return taken


def block_counts(structure: Structure, leaf: plane.Device) -> dict[str, int]:
    """Payload blocks by state, under the names of :class:`BlockState` in lower case."""
    geometry, counts = structure.geometry, [0] * 8
    period, last_block = geometry.chunk_ratio + 1, geometry.blocks - 1
    end = last_block + last_block // geometry.chunk_ratio + 1  # behind the last payload entry
    for first, data in _stored_runs(structure, leaf):
        # The state is in the low bits of an entry's first byte; every period-th entry is a bitmap's.
        states = data[:: bat.ENTRY_SIZE].translate(_STATE_OF_BYTE)[: max(0, end - first)]
        bitmaps = states[(geometry.chunk_ratio - first) % period :: period]
        for state in range(8):
            counts[state] += states.count(state) - bitmaps.count(state)
    counts[BlockState.NOT_PRESENT] += geometry.blocks - sum(counts)
    return {state.name.lower(): counts[state] for state in BlockState}
