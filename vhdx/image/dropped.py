# SPDX-License-Identifier: MIT
"""Images whose Disk was dropped without being closed, or is open at the end of the process.

A finaliser may run in any thread, inside any call and in the middle of a garbage collection. So it
only puts the image into a queue, and a thread closes it. The image is held here as long as it is
open: only the Disk can become garbage, and what a close needs is never collected with it. An open
that meets a lock waits for these closes and then tries again.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Protocol

__all__ = ["closed_so_far", "keep", "wait_for_dropped"]

_log = logging.getLogger(__name__)


class _Image(Protocol):
    path: str

    def close(self) -> None:
        """Makes everything durable and lets go of the files."""


_open: dict[int, _Image] = {}  # by identity, until the image is closed or its close is queued
_dropped: queue.SimpleQueue[_Image | threading.Event] = queue.SimpleQueue()
_closed = 0  # how many were closed; callers only check whether it has changed
_process = 0  # the process in which the thread runs


def keep(disk: object, image: _Image) -> Callable[[], object]:
    """Has ``image`` closed when ``disk`` is garbage, or at the end of the process.

    Returns:
        What to call when somebody closes it.
    """
    _begin()
    _open[id(image)] = image
    finaliser = weakref.finalize(disk, _drop, id(image))
    finaliser.atexit = False

    def forget() -> None:
        finaliser.detach()
        _open.pop(id(image), None)

    return forget


def _begin() -> None:
    global _process
    if _process == os.getpid():
        return
    thread = threading.Thread(target=_run, name="vhdx-dropped", daemon=True)
    try:
        thread.start()
        _process = os.getpid()
    except RuntimeError:  # the interpreter ends: what is open is closed by _close_all
        return


def _drop(identity: int) -> None:
    image = _open.pop(identity, None)
    if image is not None:
        _dropped.put(image)
        warnings.warn(f"unclosed disk {image.path!r}", ResourceWarning, stacklevel=2)


def _run() -> None:
    while True:
        each = _dropped.get()
        if isinstance(each, threading.Event):
            each.set()
        else:
            _close(each)
        del each


def _close(image: _Image) -> None:
    """Closes ``image``; what fails is logged, because nobody is there to be told."""
    global _closed
    try:
        image.close()
    except Exception as error:
        _log.error("unclosed disk %s: %s", image.path, error)
    _closed += 1


def wait_for_dropped() -> int:
    """Waits until every dropped image is closed; returns how many were closed so far."""
    if _process == os.getpid():
        done = threading.Event()
        _dropped.put(done)
        done.wait()
    return _closed


def closed_so_far() -> int:
    """How many dropped images were closed so far."""
    return _closed


def _close_all() -> None:
    """At the end of the process, as long as everything that a close needs is there."""
    wait_for_dropped()
    while _open:
        _close(_open.popitem()[1])


def _forget_in_child() -> None:
    """The images of a parent process are not a forked child's to close."""
    global _dropped
    _open.clear()
    _dropped = queue.SimpleQueue()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_in_child)
