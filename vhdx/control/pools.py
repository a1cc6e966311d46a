# SPDX-License-Identifier: MIT
"""Pools that a server has open: their operations are asked of it, and carried out there."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from vhdx import place
from vhdx.control import api, client
from vhdx.control.operations import Operation, Stream
from vhdx.errors import NotFoundError, VhdxError
from vhdx.spaces import DiskSpec, Pool, PoolReport, Scrubbed, hints
from vhdx.spaces.states import MediaType, Provisioning, Resiliency, Usage
from vhdx.volume import opened_pool, pool_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vhdx.image import Disk

__all__ = ["OPERATIONS", "PoolOfServer", "pool_of_server"]


class AddDisk(api.Request, frozen=True):
    """See :meth:`vhdx.Pool.add_disk`; the path is absolute."""

    name: str
    path: str
    size: int | None
    media: int
    usage: int
    latency: str | None
    force: bool


class OfDisk(api.Request, frozen=True):
    """A disk by its name, and its new usage."""

    name: str
    usage: int = 0


class ScrubArguments(api.Request, frozen=True):
    """See :meth:`vhdx.Pool.scrub`."""

    space: str | None
    repair: bool


class NewName(api.Request, frozen=True):
    """Of a space, or of the pool."""

    new: str
    name: str = ""


class SpaceArguments(api.Request, frozen=True):
    """See :meth:`vhdx.Pool.create_space`."""

    name: str
    size: int = 0
    resiliency: str = "Mirror"
    copies: int | None = None
    columns: int | None = None
    interleave: int | None = None
    provisioning: int = 1
    media: int = 0
    has_volume: bool = True


def _pool(disk: Disk) -> Pool:
    name = pool_of(disk.path)
    pool = None if name is None else opened_pool(name)
    if pool is None:
        raise NotFoundError("the image is in no pool", path=disk.path)
    return pool


def _report(stream: Stream, disk: Disk, arguments: api.NoArguments) -> PoolReport:
    del stream, arguments
    return _pool(disk).report()


def _repair(stream: Stream, disk: Disk, arguments: api.NoArguments) -> PoolReport:
    del arguments
    return _pool(disk).repair(progress=stream.progress, cancel=stream.cancelled.is_set)


def _scrub(stream: Stream, disk: Disk, arguments: ScrubArguments) -> Scrubbed:
    return _pool(disk).scrub(
        arguments.space,
        repair=arguments.repair,
        progress=stream.progress,
        cancel=stream.cancelled.is_set,
    )


def _add_disk(stream: Stream, disk: Disk, arguments: AddDisk) -> api.Done:
    del stream
    spec = DiskSpec(
        arguments.name,
        arguments.path,
        arguments.size,
        MediaType(arguments.media),
        Usage(arguments.usage),
        arguments.latency,
    )
    _pool(disk).add_disk(spec, force=arguments.force)
    return api.Done()


def _remove_disk(stream: Stream, disk: Disk, arguments: OfDisk) -> api.Done:
    _pool(disk).remove_disk(arguments.name, progress=stream.progress, cancel=stream.cancelled.is_set)
    return api.Done()


def _set_usage(stream: Stream, disk: Disk, arguments: OfDisk) -> api.Done:
    del stream
    _pool(disk).set_usage(arguments.name, Usage(arguments.usage))
    return api.Done()


def _create_space(stream: Stream, disk: Disk, arguments: SpaceArguments) -> api.Done:
    del stream
    _pool(disk).create_space(
        arguments.name,
        arguments.size,
        resiliency=Resiliency(arguments.resiliency),
        copies=arguments.copies,
        columns=arguments.columns,
        interleave=arguments.interleave,
        provisioning=Provisioning(arguments.provisioning),
        media=MediaType(arguments.media),
        has_volume=arguments.has_volume,
    )
    return api.Done()


def _delete_space(stream: Stream, disk: Disk, arguments: SpaceArguments) -> api.Done:
    del stream
    _pool(disk).delete_space(arguments.name)
    return api.Done()


def _resize_space(stream: Stream, disk: Disk, arguments: SpaceArguments) -> api.Done:
    del stream
    _pool(disk).resize_space(arguments.name, arguments.size)
    return api.Done()


def _rename(stream: Stream, disk: Disk, arguments: NewName) -> api.Done:
    del stream
    _pool(disk).rename(arguments.new)
    return api.Done()


def _rename_space(stream: Stream, disk: Disk, arguments: NewName) -> api.Done:
    del stream
    _pool(disk).rename_space(arguments.name, arguments.new)
    return api.Done()


OPERATIONS: Mapping[str, Operation] = {
    "pool-report": Operation(api.NoArguments, _report),
    "pool-repair": Operation(api.NoArguments, _repair),
    "pool-scrub": Operation(ScrubArguments, _scrub),
    "pool-add-disk": Operation(AddDisk, _add_disk),
    "pool-remove-disk": Operation(OfDisk, _remove_disk),
    "pool-set-usage": Operation(OfDisk, _set_usage),
    "pool-create-space": Operation(SpaceArguments, _create_space),
    "pool-delete-space": Operation(SpaceArguments, _delete_space),
    "pool-resize-space": Operation(SpaceArguments, _resize_space),
    "pool-rename": Operation(NewName, _rename),
    "pool-rename-space": Operation(NewName, _rename_space),
}


class PoolOfServer:
    """A pool that a server of this user has open, with what can be asked of it.

    Attributes:
        problems: none are known here.
    """

    def __init__(self, owner: client.Owner) -> None:
        self._owner = owner
        self.problems: dict[str, VhdxError] = {}

    def __enter__(self) -> PoolOfServer:
        return self

    def __exit__(self, *_: object) -> None:
        """The server keeps the pool."""

    def report(self) -> PoolReport:
        """See :meth:`vhdx.Pool.report`."""
        return msgspec.convert(self._owner.ask("pool-report"), PoolReport)

    def settle(self, seconds: float = 60.0) -> bool:
        """The server repairs by itself."""
        del seconds
        return True

    def repair(self, *, progress: Callable[[int, int], None] | None = None) -> PoolReport:
        """See :meth:`vhdx.Pool.repair`."""
        return msgspec.convert(self._owner.ask("pool-repair", progress=progress), PoolReport)

    def scrub(
        self,
        name: str | None = None,
        *,
        repair: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Scrubbed:
        """See :meth:`vhdx.Pool.scrub`."""
        arguments = ScrubArguments(name, repair)
        found = self._owner.ask("pool-scrub", arguments, progress=progress)
        return msgspec.convert(found, Scrubbed)

    def add_disk(self, spec: DiskSpec, *, force: bool = False) -> None:
        """See :meth:`vhdx.Pool.add_disk`."""
        path = os.path.abspath(spec.path)
        arguments = AddDisk(
            spec.name, path, spec.size, int(spec.media), int(spec.usage), spec.latency, force
        )
        self._owner.ask("pool-add-disk", arguments)

    def remove_disk(self, name: str, *, progress: Callable[[int, int], None] | None = None) -> None:
        """See :meth:`vhdx.Pool.remove_disk`."""
        self._owner.ask("pool-remove-disk", OfDisk(name), progress=progress)

    def set_usage(self, name: str, usage: Usage) -> None:
        """See :meth:`vhdx.Pool.set_usage`."""
        self._owner.ask("pool-set-usage", OfDisk(name, int(usage)))

    def create_space(self, name: str, size: int, **terms: Any) -> None:
        """See :meth:`vhdx.Pool.create_space`."""
        plain: dict[str, Any] = {
            key: value.value if isinstance(value, Resiliency) else value
            for key, value in terms.items()
        }
        for key in ("provisioning", "media"):
            if key in plain:
                plain[key] = int(plain[key])
        self._owner.ask("pool-create-space", SpaceArguments(name, size, **plain))

    def rename(self, name: str) -> None:
        """See :meth:`vhdx.Pool.rename`."""
        self._owner.ask("pool-rename", NewName(name))

    def rename_space(self, name: str, new: str) -> None:
        """See :meth:`vhdx.Pool.rename_space`."""
        self._owner.ask("pool-rename-space", NewName(new, name))

    def delete_space(self, name: str) -> None:
        """See :meth:`vhdx.Pool.delete_space`."""
        self._owner.ask("pool-delete-space", SpaceArguments(name))

    def resize_space(self, name: str, size: int) -> None:
        """See :meth:`vhdx.Pool.resize_space`."""
        self._owner.ask("pool-resize-space", SpaceArguments(name, size))


def pool_of_server(name: str) -> PoolOfServer | None:
    """The pool of this name that a server of this user has open, or None."""
    with contextlib.suppress(VhdxError):
        for server in client.servers(everywhere=True):
            for export in server.exports:
                if not place.is_host(export.path) and pool_of(export.path) == name:
                    found = PoolOfServer(client.Owner(server, export.name))
                    # Another pool may have the same name, with other hints.
                    if UUID(str(found.report().id)) == hints.find_hint(name).pool:
                        return found
    return None
