# SPDX-License-Identifier: MIT
"""VHDX images ([MS-VHDX]): engine, journal, space, chains, checks."""
