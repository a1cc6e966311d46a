# SPDX-License-Identifier: MIT
"""On-disk structures of VHDX, as data: parsing, validating and packing, never any I/O.

Source: [MS-VHDX] v6.0 (2021-06-25); sections are cited where a structure is defined. Numbers from a
file are validated here, once, into types that cannot hold a bad value.
"""
