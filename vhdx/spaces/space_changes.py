# SPDX-License-Identifier: MIT
"""Makes, enlarges and deletes spaces of an open pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from uuid import uuid4

from vhdx import plane
from vhdx.errors import ExistsError, InvalidArgumentError, NoSpaceError, NotFoundError
from vhdx.spaces.allocating import allocate, release_members
from vhdx.spaces.core import Core
from vhdx.spaces.disks import check_name
from vhdx.spaces.space import LARGEST_SPACE, Space
from vhdx.spaces.state import NONE, SpaceState
from vhdx.spaces.states import MediaType, Provisioning, Resiliency, Usage
from vhdx.units import KIB, format_size

__all__ = ["DEFAULT_INTERLEAVE", "create", "delete", "find", "rename", "resize"]

DEFAULT_INTERLEAVE = 256 * KIB
_MOST_ROWS = 1 << 22
_MOST_COLUMNS = {Resiliency.SIMPLE: 8, Resiliency.MIRROR: 4}  # of automatic choice


def find(core: Core, name: str) -> SpaceState:
    """The space of this name.

    Raises:
        NotFoundError: there is none.
    """
    space = core.state.space_named(name)
    if space is None:
        names = ", ".join(each.name for each in core.state.spaces.values()) or "none"
        raise NotFoundError(
            f"there is no space {name!r}; there are: {names}", path=core.state.settings.name
        )
    return space


def create(
    core: Core,
    name: str,
    size: int,
    *,
    resiliency: Resiliency,
    copies: int | None,
    columns: int | None,
    interleave: int | None,
    provisioning: Provisioning,
    media: MediaType,
    has_volume: bool,
) -> None:
    """Makes a space; see :meth:`vhdx.spaces.Pool.create_space`."""
    check_name(name, "a space")
    with core.lock:
        core.check()
        if core.state.space_named(name) is not None:
            raise ExistsError(f"there is a space {name!r} already", path=core.state.settings.name)
        space = SpaceState(
            number=max(core.state.spaces, default=0) + 1,
            id=uuid4(),
            name=name,
            resiliency=resiliency,
            provisioning=provisioning,
            columns=0,
            copies=_copies(resiliency, copies),
            interleave=_checked_interleave(interleave, core.state.settings.slab),
            size=_checked_size(size),
            has_volume=has_volume,
            media=media,
        )
        space.columns = _columns(core, space, columns)
        _check_rows(core, space)
        core.commit(
            [core.state.space_record(space), core.event("space-created", name, name)], grows=True
        )
        try:
            if provisioning is Provisioning.FIXED:
                _allocate_all(core, core.state.spaces[space.number])
        except BaseException:
            core.commit([core.state.space_gone_record(space.number)])
            raise
        Space(core, core.state.spaces[space.number], after_crash=False)


def _allocate_all(core: Core, space: SpaceState) -> None:
    members = allocate(core, space, range(len(space.rows)))
    try:
        core.commit(list(core.state.rows_records(space, 0, members)), grows=True)
    except NoSpaceError:
        release_members(core, members)
        raise


def _columns(core: Core, space: SpaceState, wanted: int | None) -> int:
    """The number of columns, checked against the disks."""
    usable = [
        disk
        for disk in core.state.disks.values()
        if core.usable(disk.index)
        and disk.usage is Usage.AUTO_SELECT
        and space.media in {MediaType.UNSPECIFIED, disk.media}
    ]
    most = len(usable) // space.copies
    kind = "simple space" if space.copies == 1 else f"mirror of {space.copies} copies"
    if wanted is None:
        # A mirror leaves a disk out, so that there is room to rebuild another one.
        spared = len(usable) - (1 if space.copies > 1 else 0)
        wanted = max(1, min(spared // space.copies, _MOST_COLUMNS[space.resiliency]))
    if not 1 <= wanted <= plane.MOST_COLUMNS:
        raise InvalidArgumentError(f"a space has 1 to {plane.MOST_COLUMNS} columns")
    if wanted > most:
        needed = wanted * space.copies
        raise InvalidArgumentError(
            f"a {kind} with {wanted} columns needs {needed} disks, and {len(usable)} can be used",
            path=core.state.settings.name,
            hint=f"add {needed - len(usable)} disks" + (f", or use {most} columns" if most else ""),
        )
    return wanted


def delete(core: Core, name: str) -> Callable[[], None]:
    """Deletes a space that nobody uses; under the lock.

    Returns:
        Gives its slabs back. To be called without the lock, because a repair of the space may wait
        for the lock.
    """
    core.check()
    space = find(core, name)
    core.commit([core.state.space_gone_record(space.number), core.event("space-deleted", name, name)])
    attached = core.spaces.pop(space.number, None)

    def give_back() -> None:
        if attached is not None:
            attached.layout.close()
        with core.lock:
            if attached is not None:
                for where in attached.filling.values():
                    core.slabs.release(*where)
                attached.filling.clear()  # else the repair that fills them releases them again
            for member in space.rows[space.rows["state"] != NONE]:
                index, slab = int(member["disk"]), int(member["slab"])
                core.slabs.release(index, slab)
                if core.usable(index):
                    core.give_back_space(index, slab)

    return give_back


def rename(core: Core, space: SpaceState, new: str) -> None:
    """Gives a space another name; under the lock."""
    core.check()
    check_name(new, "a space")
    if core.state.space_named(new) is not None and new != space.name:
        raise ExistsError(f"there is a space {new!r} already", path=core.state.settings.name)
    renamed = replace(space, name=new)
    core.commit([core.state.space_record(renamed), core.event("space-renamed", new, space.name)])
    attached = core.spaces.get(space.number)
    if attached is not None:
        attached.layout.path = f"space://{core.state.settings.name}/{new}"


def resize(core: Core, name: str, size: int) -> None:
    """Makes a space larger; see :meth:`vhdx.spaces.Pool.resize_space`."""
    with core.lock:
        core.check()
        space = find(core, name)
        attached = core.spaces.get(space.number)
        if attached is not None and size > attached.layout.largest_size:
            raise InvalidArgumentError(
                f"a space that is open cannot become larger than "
                f"{format_size(attached.layout.largest_size)}",
                path=core.state.settings.name,
            )
        if _checked_size(size) < space.size:
            raise InvalidArgumentError(
                f"space {name!r} has {space.size} bytes, and cannot become smaller",
                path=core.state.settings.name,
            )
        larger = replace(space, size=size)
        _check_rows(core, larger)
        first = len(space.rows)
        records = [core.state.space_record(larger)]
        count = larger.row_count(core.state.settings.slab) - first
        members = None
        if count > 0 and space.provisioning is Provisioning.FIXED:
            members = allocate(core, space, range(first, first + count))
            records += core.state.rows_records(space, first, members)
        try:
            core.commit(records, grows=True)
        except NoSpaceError:
            if members is not None:
                release_members(core, members)
            raise
        if attached is not None:
            attached.grow()


def _check_rows(core: Core, space: SpaceState) -> None:
    rows, slab = space.row_count(core.state.settings.slab), core.state.settings.slab
    if rows > _MOST_ROWS:
        raise InvalidArgumentError(
            f"a space of {format_size(space.size)} has {rows} rows of slabs of {format_size(slab)}, "
            f"and {_MOST_ROWS} is the most",
            path=core.state.settings.name,
            hint=f"use at most {format_size(_MOST_ROWS * slab * space.columns)}",
        )


def _copies(resiliency: Resiliency, copies: int | None) -> int:
    if resiliency is Resiliency.SIMPLE:
        if copies not in {None, 1}:
            raise InvalidArgumentError("a simple space has one copy")
        return 1
    if copies is None:
        return 2
    if copies not in {2, 3}:
        raise InvalidArgumentError("a mirror has 2 or 3 copies")
    return copies


def _checked_interleave(interleave: int | None, slab: int) -> int:
    if interleave is None:
        return min(DEFAULT_INTERLEAVE, slab)
    if interleave < 4096 or interleave > slab or interleave & (interleave - 1):
        raise InvalidArgumentError(
            f"an interleave of {interleave} bytes is impossible",
            hint=f"use a power of two from 4 KiB to the slab, {format_size(slab)}",
        )
    return interleave


def _checked_size(size: int) -> int:
    if size <= 0 or size % 4096 or size > LARGEST_SPACE:
        raise InvalidArgumentError(
            f"a space of {size} bytes is impossible",
            hint=f"use a multiple of 4096 up to {format_size(LARGEST_SPACE)}",
        )
    return size
