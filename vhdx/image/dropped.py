# SPDX-License-Identifier: MIT
"""Images whose Disk was dropped without being closed.

A finaliser never waits, and a close does: it makes data durable. So a dropped image is closed on a
thread of its own. Whoever opens an image waits for those closes before a lock is in its way.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import threading
import warnings
from typing import Protocol

__all__ = ["close_dropped", "wait_for_dropped"]

_log = logging.getLogger(__name__)
_closing: set[threading.Thread] = set()


class _Image(Protocol):
    def close(self) -> None:
        """Makes everything durable and lets go of the files."""


def close_dropped(image: _Image, name: str) -> None:
    """Closes ``image``, whose Disk (called ``name`` in the warning) is gone; called by finalisers."""
    warnings.warn(f"unclosed disk {name}", ResourceWarning, stacklevel=3)
    thread = threading.Thread(target=_close, args=(image, name), name="vhdx-dropped", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends
        _close(image, name)
        return
    _closing.add(thread)


def _close(image: _Image, name: str) -> None:
    try:
        image.close()
    except Exception as error:
        if not sys.is_finalizing():
            _log.error("unclosed disk %s: %s", name, error)
    finally:
        _closing.discard(threading.current_thread())


def wait_for_dropped() -> bool:
    """Waits until every dropped image is closed; returns whether there was one."""
    waited = False
    for thread in list(_closing):
        if thread is not threading.current_thread():
            with contextlib.suppress(RuntimeError):
                thread.join()
            waited = True
        _closing.discard(thread)
    return waited


atexit.register(wait_for_dropped)
