# SPDX-License-Identifier: MIT
"""Whose turn the GIL is, while C waits for Python.

A thread that wants the GIL asks for it after the interpreter's switch interval. A server makes it
short, so that an answer begins soon beside a thread that computes without end. But then that thread
asks back as soon, and every hand-over costs more than the turn. So while a commit is computed the
interval is long, and where it waits for the disk it is short again: figures in docs/performance.md.
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
_base = _own = sys.getswitchinterval()  # what it is outside of turns; what the program had
_thread = threading.local()


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Answers begin soon, until the last that asked for it leaves."""
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
    """What others wait for is computed, without handing the GIL back and forth."""
    if _servers == 0:
        yield
        return
    _thread.computes = True
    sys.setswitchinterval(_LONG)
    try:
        yield
    finally:
        _thread.computes = False
        sys.setswitchinterval(_base)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """A call into C that lets go of the GIL, and wants it back soon."""
    if not getattr(_thread, "computes", False):
        yield
        return
    sys.setswitchinterval(_base)
    try:
        yield
    finally:
        with _lock:
            if _servers:
                sys.setswitchinterval(_LONG)
