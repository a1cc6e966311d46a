# SPDX-License-Identifier: MIT
"""The server of one attached image: ``python -m vhdx.mounting.daemon``.

It runs in a process of its own until it is asked to end. The process that starts it reads one line
of JSON from it: ``{"size": ..., "sector_size": ...}`` when it accepts connections, else ``{"error":
...}``. When it ends, it writes what became of the image to a file, which it replaces as a whole. If
there is no such file, then the server was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vhdx import image, lazy
from vhdx.control import api, service
from vhdx.mounting.messages import Result, Started, Wanted

if TYPE_CHECKING:
    from vhdx.front import nbd

__all__ = ["main"]

_DRAIN_SECONDS = 10.0


def _write_result(path: str, result: Result) -> None:
    new = Path(f"{path}.new")
    new.write_text(json.dumps(msgspec.to_builtins(result)))
    new.replace(path)


def _tell(started: Started) -> None:
    sys.stdout.write(json.dumps(msgspec.to_builtins(started)) + "\n")
    sys.stdout.flush()
    with Path(os.devnull).open("w") as nowhere:  # the reader has closed its end by the next time
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _failed_writes(server: nbd.Server) -> int:
    return sum(each.failed_writes for each in server.totals().values())


def main() -> None:
    """Serves the image that the JSON in the first argument names."""
    wanted = msgspec.convert(json.loads(sys.argv[1]), Wanted)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the image stays attached when its user logs out
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    lazy.load_everything("vhdx", but=("vhdx.cli", "vhdx.mounting"))
    try:
        mode = "r" if wanted.read_only else "r+"
        disk = image.open(wanted.path, mode, format=wanted.format, parent_search=wanted.parent_search)
        listen = f"nbd+unix:///?socket={wanted.socket}"
        server = service.serve(
            {wanted.name: disk}, listen=listen, read_only=wanted.read_only, on_stop=ended.set
        )
    except Exception as error:
        _tell(Started(error=api.ErrorReport.of(error)))
        return
    try:
        _tell(Started(disk.size, disk.logical_sector_size))
        ended.wait()
    except BrokenPipeError:  # the command that wanted it was killed
        pass
    problem: str | None = None
    try:
        with contextlib.closing(disk):
            server.close(_DRAIN_SECONDS)
    except Exception as error:
        problem = str(error)
    _write_result(wanted.result, Result(_failed_writes(server), problem))


if __name__ == "__main__":
    main()
