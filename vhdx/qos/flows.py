# SPDX-License-Identifier: MIT
"""What is known of a flow, and of a disk under one name. The registry's lock guards all of it."""

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
"""The time between two checks of which disks are busy."""


class Flow:
    """What one initiator does to one disk.

    Attributes:
        disk: the name of its disk.
        initiator: who it is, as far as that can be told.
        throttle: the device that its requests go through.
        meter: counts them.
    """

    def __init__(
        self, disk: str, initiator: str, throttle: plane.Throttle, meter: plane.Meter
    ) -> None:
        self.disk, self.initiator = disk, initiator
        self.throttle, self.meter = throttle, meter
        self.history = History()
        self._under_way: Callable[[], int] | None = None

    def set_under_way(self, count: Callable[[], int]) -> None:
        """Tells how to count its requests that are under way; any thread may call ``count``."""
        self._under_way = count

    def under_way(self) -> int:
        """Its requests that are under way now; 0 until :meth:`set_under_way`."""
        return 0 if self._under_way is None else self._under_way()


class DiskState:
    """A disk under one name. All names of one image share what is wanted of it.

    Attributes:
        path: the real path of the image.
        attachment: its place on the shared device.
        limits: what its flows pay; shared by all its names.
        settings, policy_id: what is wanted of it.
        watch: whether it gets its minimum; shared by all its names.
        busy: for each check of the last second, whether enough requests were under way.
        history: figures of this name.
        departed: what flows did that have left.
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
