# SPDX-License-Identifier: MIT
"""Opens legacy VHD images, with their chain of parents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.errors import (
    DamagedError,
    MissingParentError,
    NotFoundError,
    Reason,
    UnsupportedError,
    VhdxError,
)
from vhdx.format import vhd
from vhdx.image.host import open_file
from vhdx.image.parents import existing
from vhdx.image.plain import PlainImage
from vhdx.image.vhd.children import guard_parent
from vhdx.image.vhd.footer import known_footer
from vhdx.image.vhd.image import FixedVhd, VhdImage
from vhdx.place import ImageFile, real

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["open_vhd"]

_LONGEST_CHAIN = 256
_MOST_BLOCKS = 1 << 24


def open_vhd(
    host: ImageFile,
    footer: vhd.Footer,
    *,
    write: bool,
    chain: bool,
    parent_search: Sequence[str],
    pool: plane.Pool,
    force: bool = False,
) -> PlainImage:
    """Opens the VHD in ``host``; the image takes ownership of ``host``, which a failure closes.

    Args:
        host: opened for writing when ``write``.
        footer: of the file.
        write: allow changes; refused for differencing images.
        chain, parent_search: as for :func:`vhdx.open`.
        pool: for background work.
        force: allow changes to an image that has children in its directory.
    """
    if write and not force and host.key != (0, 0):
        try:
            guard_parent(host, footer)
        except BaseException:
            host.close()
            raise
    return _open(host, footer, write, chain, tuple(parent_search), pool, frozenset({host.key}))


def _open(
    host: ImageFile,
    footer: vhd.Footer,
    write: bool,
    chain: bool,
    search: tuple[str, ...],
    pool: plane.Pool,
    seen: frozenset[tuple[int, int]],
) -> PlainImage:
    parent: PlainImage | None = None
    try:
        _check_size(footer)
        if footer.disk_type == vhd.DiskType.FIXED:
            return FixedVhd(host, footer, write=write, pool=pool)
        at = footer.data_offset
        if at > host.leaf.size - vhd.HEADER_SIZE:
            raise DamagedError(
                "the dynamic disk header lies outside the file", reason=Reason.TRUNCATED, offset=at
            )
        header = vhd.parse_header(host.leaf.read(vhd.HEADER_SIZE, at), at, footer)
        if write:
            _refuse_disagreement(host.leaf, footer)
        if -(-footer.virtual_size // header.block_size) > _MOST_BLOCKS:
            raise UnsupportedError(f"it has more than {_MOST_BLOCKS} blocks")
        missing: MissingParentError | None = None
        if footer.disk_type == vhd.DiskType.DIFFERENCING:
            if write:
                raise UnsupportedError(
                    "differencing VHD images can be only read", hint="convert it to VHDX to write it"
                )
            if chain:
                parent = _open_parent(host, header, search, pool, seen)
            else:
                missing = MissingParentError("its parents were not opened (chain=False)")
        return VhdImage(host, footer, header, parent, missing, write=write, pool=pool)
    except BaseException as error:
        host.close()
        if parent is not None:
            parent.close()
        if isinstance(error, VhdxError) and error.path is None:
            error.path = host.path
        raise


def _check_size(footer: vhd.Footer) -> None:
    size = footer.virtual_size
    if not 0 < size <= 2 * vhd.LARGEST_DISK or size % vhd.SECTOR:
        raise DamagedError(f"the footer says that the disk has {size} bytes", reason=Reason.HEADERS)


def _refuse_disagreement(leaf: plane.Device, footer: vhd.Footer) -> None:
    """Refuses to write an image whose two footers describe different disks.

    Raises:
        DamagedError: naming both values.
    """
    try:
        copy = vhd.parse_footer(leaf.read(vhd.FOOTER_SIZE, 0))
    except UnsupportedError as error:
        raise DamagedError(
            f"the copy of the footer at the start of the file cannot be used: {error.message}",
            reason=Reason.HEADERS,
            offset=0,
        ) from error
    if copy is None:
        return  # the first write rewrites the copy
    for what in ("virtual_size", "current_size", "disk_type", "data_offset", "unique_id"):
        last, first = getattr(footer, what), getattr(copy, what)
        if last != first:
            raise DamagedError(
                f"its two footers disagree: {what.replace('_', ' ')} is {last} in the one at the end "
                f"of the file, and {first} in the copy at its start",
                reason=Reason.HEADERS,
                offset=0,
                hint="read or convert it (the one at the end counts); a write could lose blocks",
            )


def _candidates(
    host: ImageFile, header: vhd.DynamicHeader, search: tuple[str, ...]
) -> Iterator[Path]:
    here = Path(real(host.path)).parent
    names = []
    for code, offset, length in header.locators:
        if offset + length > host.leaf.size:
            continue
        path = vhd.parse_locator(code, host.leaf.read(length, offset))
        if path is None:
            continue
        if code == b"W2ru" and not path.anchor:
            yield here.joinpath(*path.parts)
        names.append(path.name)
    names.append(header.parent_name.replace("/", "\\").rpartition("\\")[2])
    for name in filter(None, names):
        for directory in (here, *map(Path, search)):
            yield directory / name


def _open_parent(
    host: ImageFile,
    header: vhd.DynamicHeader,
    search: tuple[str, ...],
    pool: plane.Pool,
    seen: frozenset[tuple[int, int]],
) -> PlainImage:
    if len(seen) >= _LONGEST_CHAIN:
        raise MissingParentError(
            f"the chain of parents is longer than {_LONGEST_CHAIN}", reason=Reason.PARENT_DEPTH
        )
    refusal: VhdxError | None = None
    for candidate in dict.fromkeys(_candidates(host, header, search)):
        path = existing(candidate)
        if path is None:
            continue
        try:
            below = open_file(path, write=False)
        except NotFoundError:
            continue
        if below.key in seen:
            below.close()
            refusal = MissingParentError(
                f"the chain of parents loops back to {path}", reason=Reason.PARENT_CYCLE
            )
            continue
        footer = known_footer(below.leaf)
        if footer is None or footer.unique_id != header.parent_id:
            below.close()
            refusal = MissingParentError(
                f"{path} is another disk than the one that this image was made from",
                reason=Reason.PARENT_CHANGED,
            )
            continue
        return _open(below, footer, False, True, search, pool, seen | {below.key})
    raise refusal or MissingParentError(
        f"its parent was not found (it names {header.parent_name or 'no path at all'})",
        hint="put the parent beside it, or say where it is with --parent-dir (parent_search=)",
    )
