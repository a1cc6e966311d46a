# SPDX-License-Identifier: MIT
"""The state of a flow and of an export of a disk. The lock of the registry guards all of it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.qos.monitor import History, Watch
from vhdx.qos.policy import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from vhdx.qos.shared_device import Attachment

__all__ = ["TICK_SECONDS", "DiskState", "Flow"]

TICK_SECONDS = 0.05
"""Seconds from one check of which disks are busy to the next."""


class Flow:
    """The requests of one initiator to one disk.

    Attributes:
        disk: the name of its disk.
        initiator: a name for the client, such as its process or address; "?" if unknown.
        throttle: the device that its requests go through.
        meter: counts its requests.
    """

    def __init__(
        self, disk: str, initiator: str, throttle: plane.Throttle, meter: plane.Meter
    ) -> None:
        self.disk, self.initiator = disk, initiator
        self.throttle, self.meter = throttle, meter
        self.history = History()
        self._under_way: Callable[[], int] | None = None

    def set_under_way(self, count: Callable[[], int]) -> None:
        """Sets the function that counts its requests in flight; any thread may call ``count``."""
        self._under_way = count

    def under_way(self) -> int:
        """The number of its requests in flight; 0 until :meth:`set_under_way` is called."""
        return 0 if self._under_way is None else self._under_way()


class DiskState:
    """One export of a disk. All exports of one image share its settings.

    Attributes:
        path: the real path of the image.
        attachment: its place on the shared device.
        limits: the limits of its flows; shared by all exports of the image.
        settings, policy_id: its own settings, and the id of its policy.
        watch: whether it gets its minimum; shared by all exports of the image.
        busy: for each check in the last second, whether enough requests were in flight.
        history: samples of this export.
        departed: the summed counts of flows whose initiators have left.
    """

    def __init__(
        self, path: str, attachment: Attachment, limits: plane.Limits, alias: DiskState | None
    ) -> None:
        self.path, self.attachment, self.limits = path, attachment, limits
        self.settings: Settings = Settings() if alias is None else alias.settings
        self.policy_id: UUID | None = None if alias is None else alias.policy_id
        self.watch: Watch = Watch() if alias is None else alias.watch
        self.busy: deque[bool] = deque(maxlen=round(1 / TICK_SECONDS))
        self.history = History()
        self.departed = [0] * plane.METER_NUMBERS
