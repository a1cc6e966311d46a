# SPDX-License-Identifier: MIT
"""Mounts an image for the duration of a ``with`` block."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhdx.interrupts import DONE_NOTE
from vhdx.mounting.mount_image import mount
from vhdx.mounting.unmount_image import unmount

if TYPE_CHECKING:
    from collections.abc import Iterator

    StrPath = str | os.PathLike[str]

__all__ = ["mounted"]


@contextlib.contextmanager
def mounted(path: StrPath, directory: StrPath | None = None, **settings: Any) -> Iterator[Path]:
    """Mounts an image for the duration of a ``with`` block.

    Args:
        path: of the image.
        directory: an empty directory; None: a temporary one.
        settings: as for :func:`mount`. With ``snapshot=True``, the changes are thrown away at the
            end of the block; use :func:`mount` and :func:`unmount` to keep them.

    Yields:
        The path of the directory.

    Raises:
        VhdxError: as :func:`mount`, and at the end as :func:`unmount`.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            made = tempfile.mkdtemp(prefix="vhdx-")
            stack.callback(_remove_directory, made)
            directory = made
        snapshot = bool(settings.get("snapshot"))
        try:
            done = mount(path, directory, **settings)
        except KeyboardInterrupt as error:
            if DONE_NOTE in getattr(error, "__notes__", ()):
                unmount(directory, discard=snapshot)
            raise
        stack.callback(unmount, done.directory, discard=snapshot)
        yield Path(done.directory)


def _remove_directory(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)  # not empty while something is still mounted there
