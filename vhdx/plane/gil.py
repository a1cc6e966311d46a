# SPDX-License-Identifier: MIT
"""Sets the interpreter's switch interval for times when C waits for Python.

A thread that waits for the GIL requests it after the switch interval. A server makes the interval
short, so that an upcall starts soon even while another thread computes without a pause. But the
other thread then requests the GIL back just as soon, and each hand-over costs more than the work
between two of them. So the interval is long while a commit is computed, and short again while the
commit waits for the disk. Measurements are in docs/performance.md.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["computing", "serving", "waiting"]

_SHORT, _LONG = 10e-6, 1e-3  # seconds

_lock = threading.Lock()
_servers = 0
_base = _own = sys.getswitchinterval()  # outside of commits; and set by the program
_thread = threading.local()


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Makes the switch interval short until the last such block ends."""
    global _servers, _base, _own
    with _lock:
        if _servers == 0:
            _own = sys.getswitchinterval()
            _base = min(_own, _SHORT)
            sys.setswitchinterval(_base)
        _servers += 1
    try:
        yield
    finally:
        with _lock:
            _servers -= 1
            if _servers == 0:
                _base = _own
                sys.setswitchinterval(_base)


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Makes the interval long around a computation that other threads wait for."""
    if _servers == 0:
        yield
        return
    _thread.depth = depth = getattr(_thread, "depth", 0) + 1
    sys.setswitchinterval(_LONG)
    try:
        yield
    finally:
        _thread.depth = depth - 1
        if depth == 1:  # the outermost commit restores the interval
            sys.setswitchinterval(_base)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Makes the interval short, inside :func:`computing`, around a call that releases the GIL."""
    if not getattr(_thread, "depth", 0):
        yield
        return
    sys.setswitchinterval(_base)
    try:
        yield
    finally:
        with _lock:
            if _servers:
                sys.setswitchinterval(_LONG)
