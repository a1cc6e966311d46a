# SPDX-License-Identifier: MIT
"""Files in images, read without root and without mounting.

The readers of file systems are dissect's, an optional dependency (``pip install 'vhdx[files]'``).
They run in a process of their own (:mod:`vhdx.files.reader`), because of their copyleft licence, and
because what they parse is hostile.
"""

from vhdx.files.messages import FileEntry
from vhdx.files.reading import copy_out, list_files, read_file

__all__ = ["FileEntry", "copy_out", "list_files", "read_file"]
