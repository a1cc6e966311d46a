# SPDX-License-Identifier: MIT
"""The partitions of an attached disk, as libblkid finds them (partx(8), blkid(8))."""

from __future__ import annotations

import re
from typing import NamedTuple

from vhdx.errors import HostIOError, InvalidArgumentError
from vhdx.mounting.programs import run

__all__ = ["Content", "Partition", "content_of", "is_reserved", "partitions_of"]

_PAIR = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_HIDDEN = re.compile(r"\\x([0-9a-fA-F]{2})")

# Partition types that hold no files of a user (UEFI 2.10, 5.3.3; Microsoft, CREATE_PARTITION).
_RESERVED = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",  # EFI system partition
    "e3c9e316-0b5c-4db8-817d-f92df00215ae",  # Microsoft reserved
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac",  # Windows recovery
    "21686148-6449-6e6f-744e-656564454649",  # BIOS boot
    "0x27",  # Windows recovery
    "0xef",  # EFI system partition
}
_EXTENDED = {"0x5", "0xf", "0x85"}
_NOTHING, _AMBIVALENT = 2, 8  # exit codes of blkid


class Partition(NamedTuple):
    """A partition: its number, first byte, length in bytes, type (GUID or 0x..) and name."""

    number: int
    offset: int
    length: int
    kind: str
    name: str


class Content(NamedTuple):
    """What a disk or partition holds: "" where it is not known.

    Attributes:
        kind: the type that blkid names, such as ntfs or crypto_LUKS.
        label, uuid: of the file system.
        table: the type of the partition table, if it has one.
    """

    kind: str
    label: str
    uuid: str
    table: str


def is_reserved(partition: Partition) -> bool:
    """Whether it is a partition of the firmware or of the operating system's recovery."""
    return partition.kind in _RESERVED


def partitions_of(view: str, *, size: int, sector_size: int) -> list[Partition]:
    """The partitions inside the disk, in the table's order; extended ones are left out.

    Args:
        view: a file or block device that shows the disk.
        size, sector_size: of the disk, bytes.
    """
    done = run(
        "partx",
        "--pairs",
        "--bytes",
        f"--sector-size={sector_size}",
        "--output=NR,START,SECTORS,TYPE,NAME",
        view,
    )
    found = []
    if done.code != 0 and "failed to read partition table" not in done.err:
        raise HostIOError(f"its partitions cannot be read: {done.complaint}", path=view)
    for line in done.out.split("\n")[:-1]:
        fields = {key: _shown(value) for key, value in _PAIR.findall(line)}
        partition = Partition(
            int(fields["NR"]),
            int(fields["START"]) * 512,
            int(fields["SECTORS"]) * 512,
            fields["TYPE"].lower(),
            fields["NAME"],
        )
        inside = partition.length > 0 and partition.offset + partition.length <= size
        if inside and partition.kind not in _EXTENDED:
            found.append(partition)
    return found


def content_of(view: str, partition: Partition | None, *, size: int) -> Content:
    """What a partition holds, or the whole disk.

    Raises:
        HostIOError: it cannot be read.
        InvalidArgumentError: it has the signatures of several file systems.
    """
    offset, length = (0, size) if partition is None else (partition.offset, partition.length)
    done = run(
        "blkid",
        "--probe",
        "--output=export",
        f"--offset={offset}",
        f"--size={length}",
        view,
    )
    if done.code == _AMBIVALENT:
        raise InvalidArgumentError(
            "it has the signatures of several file systems",
            hint="say which one it is (--fs), or look at it with wipefs",
        )
    if done.code not in {0, _NOTHING}:
        raise HostIOError(f"it cannot be read: {done.complaint}", path=view)
    fields = dict(line.partition("=")[::2] for line in done.out.split("\n"))
    label = fields.get("LABEL", "").replace("\\ ", " ")
    return Content(
        fields.get("TYPE", ""),
        "".join(each if each.isprintable() else "?" for each in label),
        fields.get("UUID", ""),
        fields.get("PTTYPE", ""),
    )


def _shown(value: str) -> str:
    """A value without the escapes of partx."""
    raw = _HIDDEN.sub(lambda match: chr(int(match[1], 16)), value)
    if raw != value:
        raw = raw.encode("latin-1", "replace").decode(errors="replace")
    return "".join(each if each.isprintable() else "?" for each in raw)
