# SPDX-License-Identifier: MIT
"""Disks that are open to be served, and what they share: a pool of threads and Storage QoS.

A session knows no wire. Front ends bring clients to it; operations on served disks reach it through
the control socket.
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
        device: what its requests go to, below QoS.
    """

    disk: Disk
    device: plane.Device


class Session:
    """Opens disks and serves them to front ends until :meth:`close`.

    Args:
        exports: by name, a path or an open :class:`Disk`. A path is opened and closed by the session;
            a Disk stays the caller's, and cannot be closed while it is served.
        options: how they are served.

    Attributes:
        pool: of the threads that do what may block.
        exports: by name, in the order in which they were given.
        qos: what is wanted of the disks, and what they get.

    Raises:
        InvalidArgumentError: there is nothing to serve, or under a name that no export can have.
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
        """Clients can come now."""
        self.qos.begin()
        self._cleanup.enter_context(plane.serving())

    def flush(self) -> None:
        """Makes every disk durable that can be changed.

        Raises:
            VhdxError: one could not; the others were flushed all the same.
        """
        with contextlib.ExitStack() as stack:
            for export in self.exports.values():
                if not export.disk.read_only:
                    stack.callback(export.device.flush)

    def close(self) -> None:
        """Ends QoS and closes what it opened; no client may be left."""
        self._cleanup.close()
