# SPDX-License-Identifier: MIT
"""Gives released space back to the host when nobody flushes.

Space of trimmed and zeroed blocks is free as soon as a commit made the change durable. A guest that
trims and then rests never asks for that commit. One thread a process asks for it instead: one second
after the last release, or at once when much is waiting.
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
    """The thread, and the devices whose flush is due at a time (monotonic seconds)."""

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
            # The device may be closed. Any other failure is shown to its next user.
            with contextlib.suppress(VhdxError):
                device.flush()
            del device  # nobody is kept open by this thread

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
            return  # a forked child has no such thread
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()


_lock = threading.Lock()


def _unlock_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it when the process forked


os.register_at_fork(after_in_child=_unlock_in_child)
_reclaimers: list[_Reclaimer] = []  # under _lock: one, of this process


def flush_soon(device: plane.Device, *, much: bool) -> None:
    """Has ``device`` flushed a second after the last call for it, or at once when ``much`` waits."""
    with _lock:
        if not _reclaimers or _reclaimers[0].process != os.getpid():
            try:
                _reclaimers[:] = [_Reclaimer()]
            except RuntimeError:  # no thread can begin: the space comes back at the next flush
                return
        _reclaimers[0].add(device, 0.0 if much else _IDLE_SECONDS)
