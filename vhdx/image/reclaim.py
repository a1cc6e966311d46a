# SPDX-License-Identifier: MIT
"""Gives released space back to the host when the guest does not flush.

The space of trimmed and zeroed blocks is free as soon as a commit has made the change durable. A
guest that trims and then is idle never requests that commit. So one thread per process flushes the
device: one second after the last release, or at once when much space waits.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

from vhdx.errors import VhdxError

if TYPE_CHECKING:
    from vhdx import plane

__all__ = ["flush_soon"]

_IDLE_SECONDS = 1.0


class _Reclaimer:
    """The thread, and the time (monotonic seconds) at which each device must be flushed."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._changed = threading.Condition()
        self._due: dict[plane.Device, float] = {}  # under _changed
        self._ending = False  # under _changed
        self._thread = threading.Thread(target=self._run, name="vhdx-reclaim", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def add(self, device: plane.Device, seconds: float) -> None:
        with self._changed:
            self._due[device] = time.monotonic() + seconds
            self._changed.notify()

    def _run(self) -> None:
        while (device := self._next()) is not None:
            # The device may be closed. The next request on it reports any other failure.
            with contextlib.suppress(VhdxError):
                device.flush()
            del device  # so that this thread keeps no device alive

    def _next(self) -> plane.Device | None:
        """The next device whose flush is due; None at the end of the process."""
        with self._changed:
            while not self._ending:
                now = time.monotonic()
                first = min(self._due, key=self._due.__getitem__, default=None)
                if first is not None and self._due[first] <= now:
                    del self._due[first]
                    return first
                self._changed.wait(None if first is None else self._due[first] - now)
                del first
            return None

    def _end(self) -> None:
        if self.process != os.getpid():
            return  # the thread does not exist in a forked child
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()


_lock = threading.Lock()


def _unlock_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it when the process forked


os.register_at_fork(after_in_child=_unlock_in_child)
_reclaimers: list[_Reclaimer] = []  # under _lock; holds at most one


def flush_soon(device: plane.Device, *, much: bool) -> None:
    """Flushes ``device`` a second after the last call for it, or at once if ``much`` waits."""
    with _lock:
        if not _reclaimers or _reclaimers[0].process != os.getpid():
            try:
                _reclaimers[:] = [_Reclaimer()]
            except RuntimeError:  # no thread can start: the next flush returns the space
                return
        _reclaimers[0].add(device, 0.0 if much else _IDLE_SECONDS)
