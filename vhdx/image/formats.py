# SPDX-License-Identifier: MIT
"""Names of the formats, and the file name suffixes of raw images."""

__all__ = ["FORMATS", "RAW_SUFFIXES"]

FORMATS = ("vhdx", "vhd", "raw")
RAW_SUFFIXES = (".raw", ".img")
"""A file with such a suffix is opened as a raw image, whatever its content."""
