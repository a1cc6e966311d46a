# SPDX-License-Identifier: MIT
"""The open disks of a server, and what they share: a thread pool and Storage QoS.

A session knows no network protocol. Front ends connect clients to it, and the control socket brings
operations on served disks.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from vhdx import lazy, plane
from vhdx.errors import InvalidArgumentError
from vhdx.image.disk import Disk
from vhdx.image.opening import open_disk
from vhdx.qos import Domain, Store

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from vhdx.host.options import ServerOptions

__all__ = ["Export", "Session"]

_LONGEST_NAME = 4096


class Export(NamedTuple):
    """A disk that is served.

    Attributes:
        disk: the disk.
        device: the device below QoS that its requests go to.
    """

    disk: Disk
    device: plane.Device


class Session:
    """Opens disks and serves them to front ends until :meth:`close`.

    Args:
        exports: a path or an open :class:`Disk` for each export name. The session opens and closes
            images given as paths. A Disk stays the caller's, and cannot be closed while it is
            served.
        options: how the disks are served.

    Attributes:
        pool: the thread pool for operations that may block.
        exports: the exports by name, in the order in which they were given.
        qos: the QoS of the disks.

    Raises:
        InvalidArgumentError: there is no export, or an export has an invalid name.
        VhdxError: an image cannot be opened.
    """

    def __init__(
        self, exports: Mapping[str, Disk | str | os.PathLike[str]], options: ServerOptions
    ) -> None:
        if not exports:
            raise InvalidArgumentError("there is nothing to serve")
        lazy.load_everything("vhdx", but=("vhdx.cli",))
        self.exports: dict[str, Export] = {}
        self._options = options
        with contextlib.ExitStack() as stack:
            self.pool = plane.Pool(byte_limit=options.limits.shared_bytes)
            stack.callback(self.pool.close)
            store = None if options.qos_file is None else Store(options.qos_file)
            if store is not None:
                stack.callback(store.close)
            for name, source in exports.items():
                self._add(stack, name, source)
            self.qos = Domain(
                self.pool,
                unit=options.qos_unit,
                store=store,
                hook=options.qos_hook,
                scheduling=options.scheduling,
                sizes=[export.disk.size for export in self.exports.values()],
            )
            stack.callback(self.qos.close)
            for name, export in self.exports.items():
                self.qos.add_disk(name, export.disk.path, export.device, options.qos.get(name))
            self._cleanup = stack.pop_all()

    def _add(
        self, stack: contextlib.ExitStack, name: str, source: Disk | str | os.PathLike[str]
    ) -> None:
        encoded = name.encode(errors="surrogatepass")
        if (
            "\0" in name
            or len(encoded) > _LONGEST_NAME
            or "\ufffd" in encoded.decode(errors="replace")
        ):
            raise InvalidArgumentError(
                f"{name[:80]!r} cannot be the name of an export",
                hint="it must be UTF-8; name it: NAME=PATH",
            )
        read_only = self._options.read_only
        if isinstance(source, Disk):
            disk = source
            if read_only and not disk.read_only:
                raise InvalidArgumentError(
                    f"the disk of export {name!r} is open for writing", hint='open it with "r"'
                )
        else:
            disk = open_disk(source, "r" if read_only else "r+", format=self._options.format)
            stack.callback(disk.close)
        device = disk.share()
        stack.callback(disk.unshare)
        self.exports[name] = Export(disk, device)

    def disks(self) -> dict[str, Disk]:
        """The disks, by name."""
        return {name: export.disk for name, export in self.exports.items()}

    def begin(self) -> None:
        """Saves the QoS settings, and shortens the interpreter's switch interval."""
        self.qos.begin()
        self._cleanup.enter_context(plane.serving())

    def flush(self) -> None:
        """Flushes every writable disk.

        Raises:
            VhdxError: the flush of a disk failed; the other disks were flushed nevertheless.
        """
        with contextlib.ExitStack() as stack:
            for export in self.exports.values():
                if not export.disk.read_only:
                    stack.callback(export.device.flush)

    def close(self) -> None:
        """Ends QoS and closes the images that the session opened; no client may be connected."""
        self._cleanup.close()
