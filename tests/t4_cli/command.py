# SPDX-License-Identifier: MIT
"""Runs the command as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

VHDX = [sys.executable, "-m", "vhdx.cli"]


def run(*arguments, code=0):
    """What it prints: on standard output, or on standard error where it is to fail."""
    done = subprocess.run([*VHDX, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def suspend(process):
    """Returns when the process is stopped; the signal alone takes its time."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
