# SPDX-License-Identifier: MIT
"""The interpreter's switch interval, while C waits for Python.

A thread that wants the GIL requests it after the switch interval. A server makes the interval short,
so that an upcall begins soon beside a thread that computes without end. But that thread then requests
the GIL back just as soon, and each hand-over costs more than the work between two of them. So the
interval is long while a commit is computed, and short again while the commit waits for the disk.
Figures are in docs/performance.md.
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
_base = _own = sys.getswitchinterval()  # outside of commits; and what the program had
_thread = threading.local()


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Makes the switch interval short until the last block that asked for it ends."""
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
    """Makes the interval long while something is computed that others wait for."""
    if _servers == 0:
        yield
        return
    _thread.depth = depth = getattr(_thread, "depth", 0) + 1
    sys.setswitchinterval(_LONG)
    try:
        yield
    finally:
        _thread.depth = depth - 1
        if depth == 1:  # a commit inside another one leaves the interval to that one
            sys.setswitchinterval(_base)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Makes the interval short around a call into C that releases the GIL."""
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
