# SPDX-License-Identifier: MIT
"""Crash-safe records on one or several devices, for everything that keeps metadata.

A pool keeps its disks, slabs and events in a ledger, a volume its files and extents. See
``docs/on-disk.md`` for the format and ``docs/durability.md`` for the proof.
"""

from vhdx.ledger.layout import Member, Record
from vhdx.ledger.ledger import Ledger, Recovered

__all__ = ["Ledger", "Member", "Record", "Recovered"]
