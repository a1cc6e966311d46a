# SPDX-License-Identifier: MIT
"""What the domain knows of a flow, and of a disk under one name. Its lock guards all of it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.qos.monitor import History, Watch
from vhdx.qos.policy import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from vhdx.qos.scheduling import Place, Turns

__all__ = ["TICK_SECONDS", "DiskState", "Flow"]

TICK_SECONDS = 0.05
"""Who is busy is looked at so often."""


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
        self.under_way: Callable[[], int] = lambda: 0
        self.history = History()


class DiskState:
    """A disk under one name, and what is wanted of it: of all its names together."""

    def __init__(
        self,
        path: str,
        device: plane.Device,
        turns: Turns,
        limits: plane.Limits,
        twin: DiskState | None,
    ) -> None:
        self.path, self.lower, self.limits = path, device, limits
        self.settings: Settings = Settings() if twin is None else twin.settings
        self.policy_id: UUID | None = None if twin is None else twin.policy_id
        self.watch: Watch = Watch() if twin is None else twin.watch
        self.place: Place = (
            twin.place
            if twin is not None and twin.lower is device
            else turns.attach(device, None if twin is None else twin.place)
        )
        self.device, self.share = self.place.device, self.place.share
        self.busy: deque[bool] = deque(maxlen=round(1 / TICK_SECONDS))
        self.history = History()
        self.departed = [0] * plane.METER_NUMBERS  # what flows did that have left
