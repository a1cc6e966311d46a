# SPDX-License-Identifier: MIT
"""What a pool does with spaces: a part of :class:`vhdx.Pool`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vhdx.errors import InUseError
from vhdx.interrupts import uninterruptible
from vhdx.spaces import space_changes
from vhdx.spaces.leases import Leases
from vhdx.spaces.opening import attach_spaces
from vhdx.spaces.states import MediaType, Provisioning, Resiliency

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vhdx import plane
    from vhdx.spaces.core import Core

__all__ = ["SpacesOfPool"]


class SpacesOfPool:
    """The spaces of an open pool.

    Attributes:
        leases: who uses which space.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._detached = attach_spaces(core)
        self.leases = Leases(core, self._detached)

    @uninterruptible
    def create_space(
        self,
        name: str,
        size: int,
        *,
        resiliency: Resiliency = Resiliency.MIRROR,
        copies: int | None = None,
        columns: int | None = None,
        interleave: int | None = None,
        provisioning: Provisioning = Provisioning.THIN,
        media: MediaType = MediaType.UNSPECIFIED,
        has_volume: bool = True,
    ) -> None:
        """Makes a space.

        Args:
            name: of the space; unique in the pool.
            size: bytes, a multiple of 4096.
            resiliency: simple or mirror.
            copies: of a mirror, 2 or 3; 2 when None.
            columns: over how many disks each copy is striped. When None as many as the disks allow,
                up to 8 (simple) or 4 (mirror), and for a mirror one disk is left for rebuilding.
            interleave: bytes on a column before the next one, a power of two; when None 256 KiB, or
                the slab if that is smaller.
            provisioning: thin takes slabs when they are written first, fixed takes all now.
            media: use only disks of this type.
            has_volume: it will hold a volume with files.

        Raises:
            InvalidArgumentError, ExistsError, NoSpaceError: as the message says.
        """
        space_changes.create(
            self._core,
            name,
            size,
            resiliency=resiliency,
            copies=copies,
            columns=columns,
            interleave=interleave,
            provisioning=provisioning,
            media=media,
            has_volume=has_volume,
        )

    @uninterruptible
    def delete_space(self, name: str) -> None:
        """Deletes a space and what it holds.

        Raises:
            NotFoundError: there is none of this name.
            InUseError: it is in use.
        """
        with self._core.lock:
            number = space_changes.find(self._core, name).number
            if self.leases.is_used(number):
                raise InUseError(f"space {name!r} is in use", path=self._core.state.settings.name)
            give_back = space_changes.delete(self._core, name)
            self._detached.pop(number, None)
        give_back()

    @uninterruptible
    def resize_space(self, name: str, size: int) -> None:
        """Makes a space larger, while it is used.

        Raises:
            InvalidArgumentError: it would become smaller.
            NoSpaceError: a fixed space does not fit into the pool; nothing was changed.
        """
        space_changes.resize(self._core, name, size)

    @uninterruptible
    def rename_space(self, name: str, new: str) -> None:
        """Gives a space another name.

        Raises:
            NotFoundError, InvalidArgumentError, ExistsError: as the message says.
            InUseError: it is in use.
        """
        with self._core.lock:
            space = space_changes.find(self._core, name)
            if self.leases.is_used(space.number):
                raise InUseError(
                    f"space {name!r} is in use, and keeps its name",
                    path=self._core.state.settings.name,
                )
            space_changes.rename(self._core, space, new)

    def space_names(self) -> list[str]:
        """The names of all spaces."""
        return [space.name for space in self._core.state.spaces.values()]

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[plane.Layout]:
        """Lends the device of a space; the pool is not closed meanwhile.

        Yields:
            The device (:class:`vhdx.plane.Device`).
        """
        number = self.leases.take(name)
        try:
            yield self.leases.device(number)
        finally:
            self.leases.give_back(number)
