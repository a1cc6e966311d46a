# SPDX-License-Identifier: MIT
"""The vocabulary of Storage Spaces: states and settings, with the numbers of the MSFT_* WMI classes.

Sources: "MSFT_PhysicalDisk", "MSFT_VirtualDisk" and "MSFT_StoragePool" of the Windows Storage
Management API, and "Troubleshoot Storage Spaces and Storage Spaces Direct health and operational
states" for the names that people see. A number is None where the documents give none.
"""

from __future__ import annotations

from enum import Enum, IntEnum

__all__ = [
    "DiskStatus",
    "Health",
    "MediaType",
    "PoolStatus",
    "Provisioning",
    "Resiliency",
    "RetirePolicy",
    "SpaceStatus",
    "Usage",
]


class _Named(IntEnum):
    """A setting with a number and the word by which people give it."""

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", "-")


class MediaType(_Named):
    """MSFT_PhysicalDisk.MediaType."""

    UNSPECIFIED = 0
    HDD = 3
    SSD = 4


class Usage(_Named):
    """MSFT_PhysicalDisk.Usage.

    AUTO_SELECT is used for every space, MANUAL_SELECT only for spaces that name it, HOT_SPARE only to
    replace a disk that failed, RETIRED for nothing new: a repair moves its slabs away.
    """

    AUTO_SELECT = 1
    MANUAL_SELECT = 2
    HOT_SPARE = 3
    RETIRED = 4


class Health(_Named):
    """HealthStatus of all classes."""

    HEALTHY = 0
    WARNING = 1
    UNHEALTHY = 2
    UNKNOWN = 5


class Provisioning(_Named):
    """MSFT_VirtualDisk.ProvisioningType: slabs at the first write, or all at once."""

    THIN = 1
    FIXED = 2


class Resiliency(Enum):
    """MSFT_ResiliencySetting.Name."""

    SIMPLE = "Simple"
    MIRROR = "Mirror"

    @property
    def word(self) -> str:
        return self.value.lower()


class RetirePolicy(Enum):
    """MSFT_StoragePool.RetireMissingPhysicalDisks: what happens to a disk that failed or is missing.

    AUTO retires it if a hot spare can take its place, ALWAYS rebuilds into free space, too, and NEVER
    waits for the disk.
    """

    AUTO = "Auto"
    ALWAYS = "Always"
    NEVER = "Never"

    @property
    def word(self) -> str:
        return self.value.lower()


class _Status(Enum):
    """What people see, with its health."""

    def __init__(self, text: str, health: Health, number: int | None) -> None:
        self.text, self.health, self.number = text, health, number


class DiskStatus(_Status):
    """OperationalStatus of a physical disk."""

    OK = ("OK", Health.HEALTHY, 2)
    IN_SERVICE = ("In service", Health.HEALTHY, 11)
    LOST_COMMUNICATION = ("Lost communication", Health.WARNING, 13)
    REMOVING = ("Removing from pool", Health.WARNING, None)
    IO_ERROR = ("IO error", Health.WARNING, None)
    ABNORMAL_LATENCY = ("Abnormal latency", Health.WARNING, None)
    STALE_METADATA = ("Stale metadata", Health.UNHEALTHY, None)
    UNRECOGNIZED_METADATA = ("Unrecognized metadata", Health.UNHEALTHY, None)


class SpaceStatus(_Status):
    """OperationalStatus of a space (a virtual disk of a pool)."""

    OK = ("OK", Health.HEALTHY, 2)
    IN_SERVICE = ("In service", Health.WARNING, 11)
    INCOMPLETE = ("Incomplete", Health.WARNING, 0xD003)
    DEGRADED = ("Degraded", Health.WARNING, 3)
    NO_REDUNDANCY = ("No redundancy", Health.UNHEALTHY, None)
    DETACHED = ("Detached", Health.UNKNOWN, 0xD002)


class PoolStatus(_Status):
    """OperationalStatus of a pool."""

    OK = ("OK", Health.HEALTHY, 2)
    DEGRADED = ("Degraded", Health.WARNING, 3)
    READ_ONLY = ("Read-only", Health.UNKNOWN, None)
