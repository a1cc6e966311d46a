# SPDX-License-Identifier: MIT
"""Parent locators ([MS-VHDX] 2.6.2.6): how a differencing image finds its parent."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from uuid import UUID

from vhdx.errors import DamagedError, Reason
from vhdx.format.header import NIL

__all__ = ["ParentLocator", "pack_locator", "parse_locator"]

VHDX_TYPE = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
_HEADER = struct.Struct("<16sHH")
_ENTRY = struct.Struct("<IIHH")
assert _HEADER.size == 20
assert _ENTRY.size == 12
_MOST_ENTRIES = 256


@dataclass(frozen=True)
class ParentLocator:
    """Keys and values of a locator, in file order."""

    entries: dict[str, str]

    @property
    def linkages(self) -> tuple[UUID, ...]:
        """DataWriteGuids that the parent may have; Hyper-V's nil parent_linkage2 is skipped."""
        found = []
        for key in ("parent_linkage", "parent_linkage2"):
            try:
                guid = UUID(self.entries[key])
            except (KeyError, ValueError):
                continue
            if guid != NIL:
                found.append(guid)
        return tuple(found)

    @property
    def paths(self) -> tuple[tuple[str, str], ...]:
        """Kind and value of the parent's paths, in the order in which they must be tried."""
        kinds = ("relative_path", "volume_path", "absolute_win32_path")
        return tuple((kind, self.entries[kind]) for kind in kinds if kind in self.entries)


def parse_locator(data: bytes, offset: int) -> ParentLocator:
    """The locator in the item ``data``, which begins at ``offset`` of the file.

    Raises:
        DamagedError: the locator is malformed, has an unknown type, or lacks parent_linkage.
    """

    def refuse(message: str, where: int = 0) -> DamagedError:
        return DamagedError(message, reason=Reason.PARENT_LOCATOR, offset=offset + where)

    if len(data) < _HEADER.size:
        raise refuse("the parent locator is too short")
    kind, _, count = _HEADER.unpack_from(data)
    if UUID(bytes_le=kind) != VHDX_TYPE:
        raise refuse(f"the parent locator is of the unknown type {UUID(bytes_le=kind)}")
    if not 1 <= count <= _MOST_ENTRIES or len(data) < _HEADER.size + _ENTRY.size * count:
        raise refuse(f"the parent locator has {count} entries")
    entries: dict[str, str] = {}
    for i in range(count):
        where = _HEADER.size + _ENTRY.size * i
        key_at, value_at, key_length, value_length = _ENTRY.unpack_from(data, where)
        texts = []
        for at, length in ((key_at, key_length), (value_at, value_length)):
            if at == 0 or length == 0 or at + length > len(data):
                raise refuse("an entry of the parent locator is misplaced", where)
            try:
                texts.append(data[at : at + length].decode("utf-16-le"))
            except UnicodeDecodeError as error:
                raise refuse("an entry of the parent locator is not text", where) from error
        if texts[0] in entries:
            raise refuse(f"the parent locator has {texts[0]!r} twice", where)
        entries[texts[0]] = texts[1]
    if "parent_linkage" not in entries:
        raise refuse("the parent locator has no parent_linkage")
    return ParentLocator(entries)


def pack_locator(locator: ParentLocator) -> bytes:
    """The item's bytes."""
    at = _HEADER.size + _ENTRY.size * len(locator.entries)
    table = bytearray(_HEADER.pack(VHDX_TYPE.bytes_le, 0, len(locator.entries)))
    texts = bytearray()
    for key, value in locator.entries.items():
        encoded = key.encode("utf-16-le"), value.encode("utf-16-le")
        table += _ENTRY.pack(
            at + len(texts),
            at + len(texts) + len(encoded[0]),
            len(encoded[0]),
            len(encoded[1]),
        )
        texts += encoded[0] + encoded[1]
    return bytes(table + texts)
