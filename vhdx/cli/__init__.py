# SPDX-License-Identifier: MIT
"""The ``vhdx`` command.

The modules of the commands take a moment to load. So :func:`main` installs its signal handlers
first: a signal during the load ends the command with a message and exit code 130, too.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["INTERRUPTED", "SIGNALS", "end_at_once", "main"]

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command; one that is ignored from the start (nohup) stays ignored."""


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Ends the process at once. The command has not begun, so there is nothing to undo."""
    del number, frame
    os.write(2, b"vhdx: interrupted: nothing was changed\n")
    os._exit(INTERRUPTED)


def main() -> None:
    """Runs the command that the arguments name; does not return."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end_at_once)
    from vhdx.cli import commands

    commands.main(prog_name="vhdx")
