# SPDX-License-Identifier: MIT
"""Operations that a signal handler never interrupts in the middle.

Python runs signal handlers on the main thread, between any two instructions, and Ctrl-C raises
KeyboardInterrupt there. Such an exception must not cut off an operation that moves data or changes
a file. So an operation that is called on the main thread runs on a worker thread. The main thread
waits for it and calls the caller's callbacks (progress, cancel). When a handler raises, the
operation is asked to stop as if ``cancel`` had returned True. The main thread waits until the
operation has ended, then re-raises the exception. Handlers run on no other thread, so an operation
that is called on another thread runs there directly.
"""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import functools
import inspect
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from vhdx.errors import HostIOError

__all__ = [
    "DONE_NOTE",
    "Cancel",
    "Completion",
    "Progress",
    "caller",
    "completing",
    "uninterrupted",
    "uninterruptible",
]

_P = ParamSpec("_P")
_Result = TypeVar("_Result")

DONE_NOTE = "the operation was done by then"
"""Note on the exception of an interruption that came after the operation had succeeded."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the total bytes."""

Cancel = Callable[[], bool]
"""Returns whether the operation must stop."""

Work = Callable[[Progress | None, Cancel], _Result]

_POLL_SECONDS = 0.1  # an interruption can lose a wake-up, so a waiting thread checks again


_local = threading.local()


def caller() -> object:
    """Identifies the caller: an operation and the calls of its callbacks share one identity.

    An operation compares identities to detect a call from a callback of another operation.
    """
    return getattr(_local, "root", None) or threading.get_ident()


class Completion:
    """The progress of the operation inside :func:`completing`.

    The operation's thread sets both attributes; any thread may read them.

    Attributes:
        begun: the operation has started.
        done: the operation has succeeded.
    """

    def __init__(self) -> None:
        self.begun = self.done = False


@contextlib.contextmanager
def completing() -> Iterator[Completion]:
    """Wraps one operation on the main thread; an interruption that comes too late is discarded.

    If the operation succeeds, it returns its result although a handler raised. The handler should
    check the completion and raise nothing once ``done`` is set.
    """
    before, _local.completion = getattr(_local, "completion", None), Completion()
    try:
        yield _local.completion
    finally:
        _local.completion = before


def _never() -> bool:
    return False


def uninterrupted(
    work: Work[_Result], progress: Progress | None = None, cancel: Cancel | None = None
) -> _Result:
    """Runs ``work`` to its end.

    Args:
        work: receives two functions, for progress and for cancellation.
        progress: the caller's callback; runs on the calling thread.
        cancel: likewise; None where only an interruption stops the work.

    Returns:
        What ``work`` returned.

    Raises:
        BaseException: what ``work`` raised, or what a signal handler raised on the main thread. The
            handler's exception has the exception that ended the work as its cause. If the work
            succeeded, a note says so; inside :func:`completing` its result is returned instead.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return work(progress, _never if cancel is None else cancel)
    return _Job(progress, cancel).run(work)


def uninterruptible(function: Callable[_P, _Result]) -> Callable[_P, _Result]:
    """Decorates an operation so that it runs under :func:`uninterrupted`.

    If it has keyword-only arguments ``progress`` and ``cancel``, they are the caller's callbacks.
    """
    names = inspect.signature(function).parameters

    @functools.wraps(function)
    def operation(*args: _P.args, **kwargs: _P.kwargs) -> _Result:
        if threading.get_ident() != threading.main_thread().ident:
            return function(*args, **kwargs)

        def work(progress: Progress | None, cancel: Cancel) -> _Result:
            given: dict[str, Any] = dict(kwargs)
            if "progress" in names:
                given["progress"] = progress
            if "cancel" in names:
                given["cancel"] = cancel
            return function(*args, **given)

        progress, cancel = kwargs.get("progress"), kwargs.get("cancel")
        return uninterrupted(work, progress, cancel)  # type: ignore[arg-type]

    return operation


class _Call:
    """A callback that the main thread must run."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.answered = threading.Event()
        self.result: object = None
        self.error: BaseException | None = None

    def answer(self) -> None:
        """Runs the callback and stores its result or error.

        A BaseException that is no Exception, such as KeyboardInterrupt, propagates.
        """
        try:
            self.result = self.function()
        except Exception as error:
            self.error = error
        self.answered.set()


class _Job:
    """One operation on a worker thread; ``_lock`` guards ``_begun`` and ``_given_up``."""

    def __init__(self, progress: Progress | None, cancel: Cancel | None) -> None:
        self._progress, self._cancel = progress, cancel
        self._root: object = getattr(_local, "root", None) or object()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._begun = self._given_up = False
        self._completion: Completion | None = getattr(_local, "completion", None)
        self._stopping = False
        self._done = False
        self._result: object = None
        self._error: BaseException | None = None

    def run(self, work: Work[_Result]) -> _Result:
        context = contextvars.copy_context()
        try:
            try:
                _thread.start_new_thread(self._work, (context, work))
            except RuntimeError as refusal:
                if not sys.is_finalizing() and "shutdown" not in str(refusal):
                    raise HostIOError(f"the operation needs a thread: {refusal}") from refusal
                return self._work_here(work)
            while not self._done:
                self._answer_one()
        except BaseException as interruption:
            self._stopping = True
            begun = self._waited_to_the_end()
            if begun and self._error is not None and self._error is not interruption:
                raise interruption from self._error
            if not begun or self._error is not None or self._completion is None:
                self._result = None  # the caller does not get it
                if begun and self._error is None:
                    interruption.add_note(DONE_NOTE)
                raise
        # The worker thread may live a moment longer and would keep the result alive.
        result, self._result = self._result, None
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback refers to this frame: this breaks the reference cycle
        return result  # type: ignore[return-value]

    def _work_here(self, work: Work[_Result]) -> _Result:
        """Runs the work here, at interpreter exit, when no thread can start and no handler runs."""
        result = work(self._progress, _never if self._cancel is None else self._cancel)
        if self._completion is not None:
            self._completion.begun = self._completion.done = True
        return result

    def _answer_one(self) -> None:
        try:
            call = self._calls.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return
        if call is not None:
            before = getattr(_local, "root", None), getattr(_local, "completion", None)
            _local.root, _local.completion = self._root, None  # it may call other operations
            try:
                call.answer()
            finally:
                _local.root, _local.completion = before

    def _waited_to_the_end(self) -> bool:
        """Waits until the work has ended, and ignores every exception meanwhile.

        Returns:
            False if the work had not begun; it never will.
        """
        while True:
            try:
                with self._lock:
                    self._given_up = not self._begun
                    if self._given_up or self._done:
                        return self._begun
                self._calls.get(timeout=_POLL_SECONDS)
            except BaseException:  # noqa: S112 - the work was already asked to stop
                continue

    # ---- on the worker thread ----

    def _work(self, context: contextvars.Context, work: Work[object]) -> None:
        with self._lock:
            if self._given_up:
                return
            self._begun = True
        if self._completion is not None:
            self._completion.begun = True
        _local.root = self._root
        progress = None if self._progress is None else self._tell
        try:
            self._result = context.run(work, progress, self._asks_to_stop)
            if self._completion is not None:
                self._completion.done = True
        except BaseException as error:
            self._error = error
        self._done = True
        self._calls.put(None)

    def _tell(self, done: int, total: int) -> None:
        report = self._progress
        if report is not None and not self._stopping:
            self._ask(lambda: report(done, total))

    def _asks_to_stop(self) -> bool:
        if self._stopping:
            return True
        return self._cancel is not None and bool(self._ask(self._cancel))

    def _ask(self, function: Callable[[], object]) -> object:
        call = _Call(function)
        self._calls.put(call)
        while not call.answered.wait(_POLL_SECONDS):
            if self._stopping:
                return True
        if call.error is not None:
            raise call.error
        return call.result
