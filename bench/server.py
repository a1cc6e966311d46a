# SPDX-License-Identifier: MIT
"""Our server with a pure-Python thread that never waits: python -m bench.server PATH --listen URI."""

from __future__ import annotations

import signal
import sys
import threading

import vhdx


def _spin() -> None:
    n = 0
    while True:
        n += 1


def main() -> None:
    path, _, uri = sys.argv[1:]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with vhdx.serve({"": path}, listen=uri):
        threading.Thread(target=_spin, daemon=True).start()
        while not stop.wait(0.1):  # the signal may have gone to another thread
            pass


main()
