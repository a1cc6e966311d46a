# SPDX-License-Identifier: MIT
"""Lists, reads and copies files of images, by a reader in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any

import msgspec

from vhdx.control.api import ErrorReport
from vhdx.errors import Reason, VhdxError
from vhdx.files.messages import Copied, FileEntry, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    StrPath = str | os.PathLike[str]

__all__ = ["copy_out", "list_files", "read_file"]

_PIECE = 1 << 16


@contextlib.contextmanager
def _reader(wanted: Wanted) -> Iterator[IO[bytes]]:
    """What a reader writes; if the block is left early, the reader is ended and cleans up.

    Raises:
        VhdxError: the reader failed.
    """
    request = json.dumps(msgspec.to_builtins(wanted))
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "vhdx.files.reader", request],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            yield child.stdout
        except BaseException:
            child.terminate()
            child.wait()
            raise
        said = child.stderr.read()
        if child.wait() == 0:
            return
    try:
        report = msgspec.convert(json.loads(said), ErrorReport)
    except ValueError:
        lines = said.decode(errors="replace").strip().splitlines()
        what = lines[-1] if lines else f"it ended with {child.returncode}"
        raise VhdxError(f"the reader failed: {what}", path=wanted.image) from None
    raise report.exception()


def _wanted(action: str, path: StrPath, inside: str, settings: dict[str, Any]) -> Wanted:
    search = [os.path.abspath(os.fsdecode(each)) for each in settings.pop("parent_search", ())]
    return Wanted(
        action=action,
        image=os.fsdecode(path),
        path=inside,
        parent_search=search,
        **settings,
    )


def list_files(
    path: StrPath,
    inside: str = "/",
    *,
    partition: str | None = None,
    format: str | None = None,
    parent_search: Sequence[StrPath] = (),
) -> list[FileEntry]:
    """The files of a directory in an image, by name; or a single file.

    Args:
        path: of the image.
        inside: the path in its file system.
        partition: number of a partition, or the name of a logical volume; "0" is the whole disk, and
            None the only one with a file system.
        format, parent_search: as for :func:`vhdx.open`.

    Raises:
        NotFoundError: there is no such image, partition or file.
        UnsupportedError: dissect is not installed, or it does not know the file system.
        VhdxError: the image or the file system cannot be read.
    """
    settings = {"partition": partition, "format": format, "parent_search": parent_search}
    with _reader(_wanted("list", path, inside, settings)) as out:
        return [msgspec.convert(json.loads(line), FileEntry) for line in out]


def read_file(
    path: StrPath,
    inside: str,
    *,
    partition: str | None = None,
    format: str | None = None,
    parent_search: Sequence[StrPath] = (),
) -> Iterator[bytes]:
    """The content of a file in an image, in pieces.

    Args:
        path, inside, partition, format, parent_search: as for :func:`list_files`.

    Raises:
        VhdxError: as :func:`list_files`.
    """
    settings = {"partition": partition, "format": format, "parent_search": parent_search}
    with _reader(_wanted("read", path, inside, settings)) as out:
        while piece := out.read(_PIECE):
            yield piece


def copy_out(
    path: StrPath,
    inside: str,
    destination: StrPath,
    *,
    recursive: bool = False,
    force: bool = False,
    partition: str | None = None,
    format: str | None = None,
    parent_search: Sequence[StrPath] = (),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Copies a file, or a directory, of an image to the host; returns how many files were copied.

    Zeros become holes. Owners, access control lists, devices and alternate streams are not copied.

    Args:
        path, inside, partition, format, parent_search: as for :func:`list_files`.
        destination: the new path, or an existing directory to copy into.
        recursive: allow a directory.
        force: replace an existing file; a directory is never replaced.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ExistsError: the destination exists.
        VhdxError: as :func:`list_files`; or some files could not be copied, and the rest was.
    """
    state = Copied(0, 0, 0, [])
    settings = {
        "partition": partition,
        "format": format,
        "parent_search": parent_search,
        "recursive": recursive,
        "force": force,
        "destination": os.path.abspath(os.fsdecode(destination)),
    }
    try:
        with _reader(_wanted("copy", path, inside, settings)) as out:
            for line in out:
                state = msgspec.convert(json.loads(line), Copied)
                if progress is not None:
                    progress(state.done, state.total)
    except KeyboardInterrupt as error:
        if recursive:
            what = f"what was copied to {os.fsdecode(destination)} stays"
            raise error from VhdxError(what, reason=Reason.CANCELLED)
        raise
    if state.failures:
        more = len(state.failures) - 1
        others = f" (and {more} others)" if more else ""
        raise VhdxError(
            f"copied {state.files} files, but not {state.failures[0]}{others}",
            reason=Reason.IO,
            path=f"{os.fsdecode(path)}:{inside}",
        )
    return state.files
