# SPDX-License-Identifier: MIT
"""Storage Spaces: pools of disks, and spaces of slabs on them, striped and mirrored.

See ``docs/spaces.md`` for what it does and ``docs/on-disk.md`` for its structures.
"""

from vhdx.spaces.disks import DiskSpec
from vhdx.spaces.pool import DEFAULT_SLAB, Pool
from vhdx.spaces.reports import DiskReport, PoolReport, SpaceReport
from vhdx.spaces.scrubbing import Difference, Scrubbed
from vhdx.spaces.space_changes import DEFAULT_INTERLEAVE
from vhdx.spaces.state import Event
from vhdx.spaces.states import MediaType, Provisioning, Resiliency, RetirePolicy, Usage

__all__ = [
    "DEFAULT_INTERLEAVE",
    "DEFAULT_SLAB",
    "Difference",
    "DiskReport",
    "DiskSpec",
    "Event",
    "MediaType",
    "Pool",
    "PoolReport",
    "Provisioning",
    "Resiliency",
    "RetirePolicy",
    "Scrubbed",
    "SpaceReport",
    "Usage",
]
