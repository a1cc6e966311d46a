# SPDX-License-Identifier: MIT
"""Names of the formats, and of files that have none of their own."""

__all__ = ["FORMATS", "RAW_SUFFIXES"]

FORMATS = ("vhdx", "vhd", "raw")
RAW_SUFFIXES = (".raw", ".img")
"""A file whose name ends so is opened as a raw image, whatever it holds."""
