# SPDX-License-Identifier: MIT
"""Makes the disk of an image and its partitions block devices."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from vhdx.errors import InvalidArgumentError
from vhdx.interrupts import uninterruptible
from vhdx.mounting import partitions, records
from vhdx.mounting.attaching import Wish, attached, key_of, require_root
from vhdx.mounting.devices import content_in, device_of, find_partitions
from vhdx.mounting.records import Attachment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    StrPath = str | os.PathLike[str]

__all__ = ["Attached", "AttachedDevice", "attach"]


class AttachedDevice(NamedTuple):
    """A block device of an attached image, and what is in it; length in bytes."""

    device: str
    partition: int | None
    length: int
    filesystem: str
    label: str


class Attached(NamedTuple):
    """What :func:`attach` did: the way ("nbd" or "fuse"), and the devices, the disk first."""

    way: str
    devices: tuple[AttachedDevice, ...]


@uninterruptible
def attach(
    path: StrPath,
    *,
    read_only: bool = False,
    via: str | None = None,
    format: str | None = None,
    parent_search: Sequence[StrPath] = (),
    cancel: Callable[[], bool] | None = None,
) -> Attached:
    """Makes the disk of an image and its partitions block devices, until :func:`detach`.

    Args:
        path, read_only, via, format, parent_search, cancel: as for :func:`mount`.

    Raises:
        VhdxError: as :func:`mount`.
    """
    require_root()
    key = key_of(path)
    wish = Wish(
        path=os.path.abspath(os.fsdecode(path)),
        read_only=read_only,
        kept=True,
        via=via,
        snapshot=False,
        format=format,
        parent_search=[os.fsdecode(each) for each in parent_search],
        cancel=cancel,
    )
    with records.locked(key, cancel), attached(key, wish) as attachment:
        attachment.kept = True
        attachment.save()
        return Attached(attachment.way, tuple(_all_devices(attachment)))


def _all_devices(attachment: Attachment) -> Iterator[AttachedDevice]:
    for partition in (None, *find_partitions(attachment)):
        length = attachment.size if partition is None else partition.length
        try:
            content = content_in(attachment, partition)
        except InvalidArgumentError:
            content = partitions.Content("ambiguous", "", "", "")
        device = device_of(attachment, partition)
        if device not in attachment.devices:
            attachment.devices = [*attachment.devices, device]
            attachment.save()
        number = None if partition is None else partition.number
        name = content.label or ("" if partition is None else partition.name)
        kind = content.kind or content.table
        yield AttachedDevice(device.path, number, length, kind, name)
