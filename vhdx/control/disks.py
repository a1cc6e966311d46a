# SPDX-License-Identifier: MIT
"""Operations on an image that work the same whether it is idle or served.

An idle image is opened here. If a server of this user serves the image, that server carries out the
operation. If another program holds the image, the operation fails, and the error names the program.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from vhdx import image, lazy
from vhdx.control.client import Owner, find_owner, suspects
from vhdx.errors import InUseError
from vhdx.image.contract import Compacted
from vhdx.image.disk import Extent
from vhdx.interrupts import uninterruptible

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vhdx.control import api

    StrPath = str | os.PathLike[str]
else:
    api = lazy.Module("vhdx.control.api")

__all__ = ["compact", "extents", "info", "resize", "snapshot"]


_Result = TypeVar("_Result")


class _Info(NamedTuple):
    facts: dict[str, Any]
    chain: list[dict[str, Any]]


def _either(
    path: StrPath, idle: Callable[[], _Result], served: Callable[[Owner], _Result]
) -> _Result:
    try:
        return idle()
    except InUseError as error:
        owner = find_owner(path)
        if owner is None:
            error.hint = suspects() or error.hint
            raise
    return served(owner)


@uninterruptible
def info(
    path: StrPath,
    *,
    format: str | None = None,
    parent_search: Sequence[StrPath] = (),
    chain: bool = True,
    view: image.View | None = None,
) -> dict[str, Any]:
    """What ``vhdx info --json`` prints, with the layers under "chain"; sizes in bytes.

    Args:
        path: the path of the image.
        format, parent_search, chain, view: as for :func:`vhdx.open`; ignored if a server holds the
            image.
    """

    def idle() -> _Info:
        search = parent_search
        with image.open(path, format=format, parent_search=search, chain=chain, view=view) as disk:
            return _Info(disk.describe(), disk.chain)

    def served(owner: Owner) -> _Info:
        found = api.decode_reply(owner.ask("info"), api.Info)
        return _Info(found.facts, found.chain)

    # A server cannot apply a view, so an image with a view is opened here.
    found = idle() if view not in {None, image.View()} else _either(path, idle, served)
    return {**found.facts, "path": os.fsdecode(path), "chain": found.chain}


@uninterruptible
def extents(
    path: StrPath, *, format: str | None = None, parent_search: Sequence[StrPath] = ()
) -> list[Extent]:
    """The extents of the whole disk; see :meth:`vhdx.Disk.extents`."""

    def idle() -> list[Extent]:
        with image.open(path, format=format, parent_search=parent_search) as disk:
            return list(disk.extents())

    def served(owner: Owner) -> list[Extent]:
        found: list[Extent] = []

        def take(some: Any) -> None:
            found.extend(Extent(*each) for each in api.decode_reply(some, api.ExtentItems))

        owner.ask("map", item=take)
        return found

    return _either(path, idle, served)


@uninterruptible
def resize(
    path: StrPath,
    size: int,
    *,
    shrink: bool = False,
    unsafe: bool = False,
    move_gpt: bool = False,
    force: bool = False,
) -> str | None:
    """Changes the virtual size of an image; see :meth:`vhdx.Disk.resize`.

    Args:
        path: the path of the image.
        size, shrink, unsafe, move_gpt: as there; a GPT is not moved while the image is served.
        force: resize even if a child is based on the image; that child becomes invalid.

    Returns:
        A note about what is left to do in the guest, or None.
    """

    def idle() -> str | None:
        with image.open(path, "r+", force=force) as disk:
            return disk.resize(size, shrink=shrink, unsafe=unsafe, move_gpt=move_gpt)

    def served(owner: Owner) -> str | None:
        if move_gpt:
            raise InUseError(
                "it is served, and a guest may use its GPT, so the GPT cannot be moved",
                path=path,
                hint="stop the server first (vhdx stop), or let the guest move it",
            )
        arguments = api.ResizeArguments(size, shrink, unsafe)
        return api.decode_reply(owner.ask("resize", arguments), api.Resized).note

    return _either(path, idle, served)


@uninterruptible
def compact(
    path: StrPath,
    *,
    parent_search: Sequence[StrPath] = (),
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Compacted:
    """Frees the space of zeroed and trimmed blocks; see :meth:`vhdx.Disk.compact`.

    The content does not change, so images that are based on this image stay valid.
    """

    def idle() -> Compacted:
        return image.compact(path, parent_search=parent_search, progress=progress, cancel=cancel)

    def served(owner: Owner) -> Compacted:
        return api.decode_reply(owner.ask("compact", progress=progress, cancel=cancel), Compacted)

    return _either(path, idle, served)


@uninterruptible
def snapshot(path: StrPath, checkpoint: StrPath | None = None, *, force: bool = False) -> str:
    """Makes the image a checkpoint with a new child on top; see :meth:`vhdx.Disk.snapshot`.

    Args:
        path: the path of the image.
        checkpoint: the path for the present state.
        force: proceed even if a child in its directory is based on it; that child becomes invalid.

    Returns:
        The path of the checkpoint.
    """

    def served(owner: Owner) -> str:
        name = None if checkpoint is None else os.path.abspath(os.fsdecode(checkpoint))
        taken = owner.ask("snapshot", api.SnapshotArguments(name))
        return api.decode_reply(taken, api.SnapshotTaken).checkpoint

    return _either(path, lambda: image.snapshot(path, checkpoint, force=force), served)
