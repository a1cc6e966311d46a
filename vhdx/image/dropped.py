# SPDX-License-Identifier: MIT
"""Images whose Disk was dropped without being closed.

A finaliser never waits, and a close does: it makes data durable. So a dropped image is closed on a
thread of its own. An open that meets a lock waits for these closes and then tries again.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from typing import Protocol

__all__ = ["close_dropped", "close_now", "closed_so_far", "wait_for_dropped"]

_log = logging.getLogger(__name__)
_closing: set[threading.Thread] = set()
_closed = 0  # how many were closed; callers only check whether it has changed


class _Image(Protocol):
    def close(self) -> None:
        """Makes everything durable and lets go of the files."""


def close_dropped(image: _Image, name: str) -> None:
    """Closes ``image``, whose Disk (called ``name`` in the warning) is gone; called by finalisers."""
    thread = threading.Thread(target=close_now, args=(image, name), name="vhdx-dropped", daemon=True)
    _closing.add(thread)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends, or there are too many threads
        _closing.discard(thread)
        close_now(image, name)
    warnings.warn(f"unclosed disk {name}", ResourceWarning, stacklevel=3)


def close_now(image: _Image, name: str) -> None:
    """Closes ``image``; what fails is logged, because nobody is there to be told."""
    global _closed
    try:
        image.close()
    except Exception as error:
        if not sys.is_finalizing():
            _log.error("unclosed disk %s: %s", name, error)
    _closed += 1
    if not sys.is_finalizing():
        _closing.discard(threading.current_thread())


def wait_for_dropped() -> int:
    """Waits until every dropped image is closed; returns how many were closed so far."""
    for thread in list(_closing):
        if thread is not threading.current_thread():
            with contextlib.suppress(RuntimeError):  # it has not begun yet
                thread.join()
    return _closed


def closed_so_far() -> int:
    """How many dropped images were closed so far."""
    return _closed
