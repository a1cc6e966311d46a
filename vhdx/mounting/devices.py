# SPDX-License-Identifier: MIT
"""Which partition is meant, and the block devices of an attached image."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx.errors import InvalidArgumentError, NotFoundError, VhdxError
from vhdx.mounting import filesystems, partitions, system, ways
from vhdx.mounting.programs import run
from vhdx.mounting.records import Attachment, Device
from vhdx.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "choose_partition",
    "content_in",
    "device_of",
    "find_partitions",
    "give_up",
    "needs_replay",
]


def find_partitions(attachment: Attachment) -> list[partitions.Partition]:
    """The partitions of the disk, as it is now."""
    assert attachment.view is not None
    if attachment.way == "nbd":  # what was written through partitions is not in this cache
        run("blockdev", "--flushbufs", attachment.view)
    return partitions.partitions_of(
        attachment.view, size=attachment.size, sector_size=attachment.sector_size
    )


def content_in(
    attachment: Attachment, partition: partitions.Partition | None, wanted: str | None = None
) -> partitions.Content:
    """What a partition holds, or the whole disk; its type is the ``wanted`` one, if there is one."""
    assert attachment.view is not None
    try:
        content = partitions.content_of(attachment.view, partition, size=attachment.size)
    except InvalidArgumentError:
        if wanted is None:
            raise
        content = partitions.Content("", "", "", "")
    return content if wanted is None else content._replace(kind=wanted)


def _described(attachment: Attachment, found: list[partitions.Partition]) -> str:
    words = []
    for each in found:
        try:
            content = content_in(attachment, each)
        except VhdxError:
            content = partitions.Content("ambiguous", "", "", "")
        name = content.label or each.name
        words.append(
            f"{each.number} ({content.kind or 'no file system'}, {format_size(each.length)}"
            + (f", {name!r})" if name else ")")
        )
    return ", ".join(words)


def choose_partition(
    attachment: Attachment, number: int | None, filesystem: str | None
) -> partitions.Partition | None:
    """The wanted partition; without a wish, the only one that can be mounted.

    Raises:
        NotFoundError: there is no such partition.
        InvalidArgumentError: a partition must be chosen.
    """
    found = find_partitions(attachment)
    if number == 0:
        return None
    if number is not None:
        for each in found:
            if each.number == number:
                return each
        there = _described(attachment, found)
        raise NotFoundError(
            f"there is no partition {number}",
            path=attachment.image,
            hint=f"there are {there}" if there else "the disk has no partitions",
        )
    if not found:
        return None
    usable = []
    for each in found:
        with contextlib.suppress(VhdxError):
            content = content_in(attachment, each)
            if (content.kind or filesystem) and not partitions.is_reserved(each):
                usable.append(each)
    if len(found) == 1:
        usable = found
    if len(usable) != 1:
        raise InvalidArgumentError(
            f"it has the partitions {_described(attachment, found)}",
            path=attachment.image,
            hint="choose one with --partition N",
        )
    return usable[0]


def device_of(attachment: Attachment, partition: partitions.Partition | None) -> Device:
    """A block device for the partition: one of the attachment's, or a new one."""
    number = None if partition is None else partition.number
    shown = (0, attachment.size) if partition is None else (partition.offset, partition.length)
    for each in attachment.devices:  # the disk may have other partitions by now
        if each.partition == number and (each.offset, each.length) == shown:
            return each
    return ways.of(attachment).device(attachment, partition)


def give_up(attachment: Attachment, device: Device) -> None:
    """Detaches a device that was made for a mount."""
    if not device.loop or system.detach_loop(device.path):
        attachment.devices = [each for each in attachment.devices if each != device]
        attachment.save()


@contextlib.contextmanager
def _scratch(attachment: Attachment) -> Iterator[Path]:
    """An empty directory of the attachment."""
    path = attachment.directory / f"try-{secrets.token_hex(2)}"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        path.rmdir()


def needs_replay(attachment: Attachment, partition: partitions.Partition | None, kind: str) -> bool:
    """Tries a read-only mount on a read-only device of its own."""
    device = ways.attach_loop(attachment, partition, read_only=True)
    try:
        with _scratch(attachment) as directory:
            return filesystems.needs_replay(kind, device, directory)
    finally:
        system.detach_loop(device)
