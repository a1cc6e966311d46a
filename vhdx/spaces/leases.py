# SPDX-License-Identifier: MIT
"""Uses of spaces: who has the device of a space, and who keeps the metadata of its content."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.errors import InUseError, VhdxError
from vhdx.spaces import space_changes

if TYPE_CHECKING:
    from vhdx.spaces.core import Core
    from vhdx.spaces.state import Owner

__all__ = ["Leases"]


class Leases:
    """The uses of the spaces of an open pool.

    Args:
        core: of the pool.
        detached: for each space that stays detached why, by number.
    """

    def __init__(self, core: Core, detached: dict[int, str]) -> None:
        self._core, self._detached = core, detached
        self._uses: dict[int, int] = {}  # under the core's lock, as the others
        self._raw: dict[int, list[bool]] = {}  # by space, for each use as a disk whether it writes
        self._owned: set[int] = set()

    def names(self) -> list[str]:
        """The spaces that are in use."""
        return [self._core.state.spaces[number].name for number in self._uses]

    def is_used(self, number: int) -> bool:
        """Whether a space is in use."""
        return number in self._uses

    def has_volume(self, name: str) -> bool:
        """Whether the space holds a volume; else it is a raw disk.

        Raises:
            NotFoundError: there is no such space.
        """
        return space_changes.find(self._core, name).has_volume

    def take(self, name: str) -> int:
        """Begins to use a space; returns its number, for :meth:`device` and :meth:`give_back`."""
        core = self._core
        with core.lock:
            space = space_changes.find(self._core, name)
            if space.number not in core.spaces:
                why = self._detached.get(space.number, "it was detached")
                raise VhdxError(
                    f"space {name!r} is detached: {why}", path=self._core.state.settings.name
                )
            self._uses[space.number] = self._uses.get(space.number, 0) + 1
            return space.number

    def begin_raw(self, name: str, *, write: bool, locked: bool) -> int:
        """Begins to use a space as a disk; returns its number, for :meth:`end_raw`.

        Raises:
            InUseError: it is open in a way that excludes this.
        """
        with self._core.lock:
            number = self.take(name)
            users = self._raw.setdefault(number, [])
            if locked and users and (write or any(users)):
                self.give_back(number)
                pool = self._core.state.settings.name
                raise InUseError(f"space {name!r} is open already in this process", path=pool)
            if locked:
                users.append(write)
            return number

    def end_raw(self, number: int, *, write: bool, locked: bool) -> None:
        """Ends a use as a disk."""
        with self._core.lock:
            if locked:
                self._raw[number].remove(write)
            self.give_back(number)

    def device(self, number: int) -> plane.Layout:
        """The device of a space that is in use."""
        return self._core.spaces[number].layout

    def attach_owner(self, number: int, owner: Owner) -> None:
        """Gives ``owner`` what it recorded for a space, and what it records from now on."""
        core = self._core
        with core.lock:
            if number in self._owned:
                raise InUseError("the volume is open already", path=core.state.settings.name)
            self._owned.add(number)
            kept = core.state.owners.get(number)
            for payload in () if kept is None else list(kept.records()):
                owner.apply(payload)
            core.state.owners[number] = owner

    def detach_owner(self, number: int) -> None:
        """The owner records no more."""
        with self._core.lock:
            self._owned.discard(number)

    def commit_owner(self, number: int, payloads: Iterable[bytes], *, grows: bool) -> None:
        """Makes records of a space's owner durable, and applies them to it.

        Args:
            number: of the space.
            payloads: of the records.
            grows: refused while the ledger has little room.
        """
        core = self._core
        with core.lock:
            records = [core.state.owner_record(number, payload) for payload in payloads]
            core.commit(records, grows=grows)

    def need_room(self) -> None:
        """Raises NoSpaceError while the ledger has little room."""
        with self._core.lock:
            self._core.check()
            self._core.need_room()

    def give_back(self, number: int) -> None:
        """Ends a use of a space."""
        with self._core.lock:
            self._uses[number] -= 1
            if not self._uses[number]:
                del self._uses[number]
