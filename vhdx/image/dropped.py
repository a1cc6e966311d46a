# SPDX-License-Identifier: MIT
"""Closes images whose Disk became garbage unclosed, or is still open when the process ends.

A finaliser may run in any thread, inside any call and in the middle of a garbage collection. So the
finaliser only puts the image into a queue, and a thread closes it. This module refers to the image
as long as it is open. So only the Disk can become garbage, never an object that the close needs. An
open that finds the file locked waits for these closes and then tries again.
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
        """Makes everything durable and closes the files."""


_open: dict[int, _Image] = {}  # by id(), until the image is closed or its close is queued
_dropped: queue.SimpleQueue[_Image | threading.Event] = queue.SimpleQueue()
_closed = 0  # number of images closed here; callers only check whether it has changed
_process = 0  # pid of the process in which the thread runs


def keep(disk: object, image: _Image) -> Callable[[], object]:
    """Arranges that ``image`` is closed when ``disk`` is garbage, or at the end of the process.

    Returns:
        A function that ends this; to be called when the image is closed.
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
    except RuntimeError:  # the interpreter is exiting: _close_all closes the open images
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
    """Closes ``image``; logs a failure, because there is no caller to raise it to."""
    global _closed
    try:
        image.close()
    except Exception as error:
        _log.error("unclosed disk %s: %s", image.path, error)
    _closed += 1


def wait_for_dropped() -> int:
    """Waits until every dropped image is closed; returns the number closed so far."""
    if _process == os.getpid():
        done = threading.Event()
        _dropped.put(done)
        done.wait()
    return _closed


def closed_so_far() -> int:
    """The number of dropped images closed so far."""
    return _closed


def _close_all() -> None:
    """Closes all images at the end of the process, while what a close needs still exists."""
    wait_for_dropped()
    while _open:
        _close(_open.popitem()[1])


def _forget_in_child() -> None:
    """A forked child must not close the images of its parent process."""
    global _dropped
    _open.clear()
    _dropped = queue.SimpleQueue()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_in_child)
