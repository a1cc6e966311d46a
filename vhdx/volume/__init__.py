# SPDX-License-Identifier: MIT
"""Volumes: named files on spaces, and the place ``space://pool/space/name`` of images."""

from vhdx.volume.place import (
    lend_pool,
    list_files,
    opened_pool,
    pool_of,
    remove_file,
    rename_file,
)
from vhdx.volume.volume import FileInfo, Volume

__all__ = [
    "FileInfo",
    "Volume",
    "lend_pool",
    "list_files",
    "opened_pool",
    "pool_of",
    "remove_file",
    "rename_file",
]
