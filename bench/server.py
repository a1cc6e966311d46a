# SPDX-License-Identifier: MIT
"""Our server as benchmarks want it: python -m bench.server [OPTION] PATH --listen URI.

With ``--spin`` a pure-Python thread beside it never waits; with ``--no-throttle`` no throttle is
between connections and disks.
"""

from __future__ import annotations

import signal
import sys
import threading

import vhdx
from vhdx import plane
from vhdx.plane._native import lib


def _spin() -> None:
    n = 0
    while True:
        n += 1


class _NoThrottle(plane.Device):
    """The disk itself, where a throttle would be."""

    def __init__(self, lower: plane.Device, *_: object) -> None:
        super().__init__(lib.vx_device_reference(lower.handle), lower.path)

    def set_group(self, _: object) -> None:
        """Nothing is limited."""

    def waiting(self) -> tuple[int, int]:
        """Nothing waits."""
        return 0, 0


def main() -> None:
    *options, path, _, uri = sys.argv[1:]
    if "--no-throttle" in options:
        plane.Throttle = _NoThrottle  # type: ignore[assignment, misc]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with vhdx.serve({"": path}, listen=uri):
        if "--spin" in options:
            threading.Thread(target=_spin, daemon=True).start()
        while not stop.wait(0.1):  # the signal may have gone to another thread
            pass


main()
