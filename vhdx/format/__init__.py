# SPDX-License-Identifier: MIT
"""On-disk structures of VHDX and VHD: parsing, validating and packing, without any I/O.

The source for VHDX is [MS-VHDX] v6.0 (2021-06-25); each structure cites its section. Values from a
file are validated here, once, when they are parsed.
"""
