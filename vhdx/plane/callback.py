# SPDX-License-Identifier: MIT
"""Devices behind Python objects, and the upcalls from C."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Protocol

from vhdx.errors import HostIOError, Reason
from vhdx.plane import failures
from vhdx.plane._native import ffi, lib
from vhdx.plane.device import Device, Operation, RawExtent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Backend", "Callback"]


class Backend(Protocol):
    """The storage behind a callback device; each method may be called from several threads.

    Raising a :class:`vhdx.errors.VhdxError` refuses the request; any other exception poisons the
    device.
    """

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fills ``buffer``."""

    def pwrite(self, data: memoryview, offset: int) -> None:
        """Writes ``data``; durable only after the next flush."""

    def zero(self, offset: int, length: int) -> None:
        """Makes the range read as zeros."""

    def trim(self, offset: int, length: int) -> None:
        """May discard the content of the range."""

    def flush(self) -> None:
        """Makes all earlier writes durable."""

    def extents(self, offset: int, length: int) -> Iterable[RawExtent]:
        """Runs that cover the range, in order."""

    def resize(self, size: int) -> None:
        """Changes the size to ``size`` bytes."""


class Callback(Device):
    """A device whose content is stored by a :class:`Backend` (``csrc/leaf/callback.h``)."""

    def __init__(self, backend: Backend, size: int, *, read_only: bool = False) -> None:
        identity = failures.new_identity()
        self.backend = backend
        failures.register(identity, self)
        super().__init__(lib.vx_callback_create(size, read_only, identity, upcalls()))

    def perform(self, request: Any) -> None:
        """Carries out ``request`` (a ``vx_request *``)."""
        backend, offset, length = self.backend, request.offset, request.length
        operation = request.operation
        if operation == Operation.READ:
            with _lent(memoryview(ffi.buffer(request.buffer, length))) as view:
                backend.pread_into(view, offset)
        elif operation == Operation.WRITE:
            data = memoryview(ffi.buffer(request.buffer, length)).toreadonly()
            with _lent(data) as view:
                backend.pwrite(view, offset)
        elif operation == Operation.ZERO:
            backend.zero(offset, length)
        elif operation == Operation.TRIM:
            backend.trim(offset, length)
        elif operation == Operation.EXTENTS:
            self._extents(request)
        if operation == Operation.FLUSH or request.flags & lib.VX_FUA:
            backend.flush()

    def _extents(self, request: Any) -> None:
        count = 0
        for extent in self.backend.extents(request.offset, request.length):
            if count == request.extent_capacity:
                break
            slot = request.extents[count]
            slot.offset, slot.length = extent.offset, extent.length
            slot.state = extent.state
            slot.depth = -1 if extent.state == lib.VX_EXTENT_HOLE else request.depth
            count += 1
        request.extent_count = count


@contextlib.contextmanager
def _lent(view: memoryview) -> Iterator[memoryview]:
    """Releases ``view`` at the end: C owns the memory, so no view of it may outlive the upcall."""
    try:
        yield view
    finally:
        with contextlib.suppress(BufferError):  # a traceback still refers to a part of it
            view.release()


def _guarded(identity: int, method: str, argument: Any) -> int:
    owner = failures.lookup(identity)
    if owner is None:
        return failures.E_CLOSED
    try:
        getattr(owner, method)(argument)
    except BaseException as error:
        return failures.code_of(error)
    return 0


@ffi.def_extern(error=failures.E_UPCALL)
def vx_python_fault(identity: int, fault: Any) -> int:
    return _guarded(identity, "answer", fault)


@ffi.def_extern(error=failures.E_UPCALL)
def vx_python_perform(identity: int, request: Any) -> int:
    return _guarded(identity, "perform", request)


@ffi.def_extern(error=failures.E_UPCALL)
def vx_python_resize(identity: int, size: int) -> int:
    owner = failures.lookup(identity)
    if owner is None:
        return failures.E_CLOSED
    try:
        owner.backend.resize(size)
    except BaseException as error:
        return failures.code_of(error)
    return 0


_upcalls = ffi.new("vx_upcalls *")
_upcalls.fault = lib.vx_python_fault
_upcalls.perform = lib.vx_python_perform
_upcalls.resize = lib.vx_python_resize

_lock = threading.Lock()
_delegate_of = 0  # the process whose main thread has a delegate; under _lock


def _unlock_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it when the process forked


os.register_at_fork(after_in_child=_unlock_in_child)


def upcalls() -> Any:
    """The ``vx_upcalls`` of every device; starts the delegate thread when needed.

    The delegate carries out the upcalls of the main thread. Python runs signal handlers on the main
    thread, so a signal handler never interrupts an upcall.
    """
    global _delegate_of
    with _lock:
        if _delegate_of != os.getpid():  # not started, or lost in a fork
            _upcalls.delegate = ffi.NULL
            with contextlib.suppress(RuntimeError):  # the interpreter ends: no new threads
                _begin_delegate()
            _delegate_of = os.getpid()
        return _upcalls


def _begin_delegate() -> None:
    delegate = lib.vx_delegate_create(threading.main_thread().ident or 0)
    if delegate == ffi.NULL:
        raise HostIOError("the host is out of memory", reason=Reason.NO_MEMORY)
    process = os.getpid()

    def serve() -> None:
        failures.answer_for_main_thread()
        lib.vx_delegate_serve(delegate)

    thread = threading.Thread(target=serve, name="vhdx-upcalls", daemon=True)
    thread.start()
    _upcalls.delegate = delegate

    def end() -> None:
        if os.getpid() != process:
            return
        lib.vx_delegate_end(delegate)
        thread.join()

    atexit.register(end)
