# SPDX-License-Identifier: MIT
"""Converts the error codes of C to exceptions, and exceptions in upcalls to error codes.

C never holds a Python pointer, so an upcall from C looks up its Python object here by identity. An
exception raised in an upcall is kept for the thread, so that the caller of the request gets that
exception and not only an error code.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from typing import Any

from vhdx import errors
from vhdx.plane._native import ffi, lib

__all__ = [
    "CODES",
    "E_CLOSED",
    "E_FORKED",
    "E_IO",
    "E_POISONED",
    "E_RANGE",
    "E_UPCALL",
    "answer_for_main_thread",
    "code_of",
    "describe",
    "error_of",
    "failure_buffer",
    "lookup",
    "new_identity",
    "raise_for",
    "register",
]

# csrc/core/error.h
E_RANGE, E_IO, E_NOSPACE = lib.VX_E_RANGE, lib.VX_E_IO, lib.VX_E_NOSPACE
E_READONLY, E_POISONED, E_CLOSED = lib.VX_E_READONLY, lib.VX_E_POISONED, lib.VX_E_CLOSED
E_NOMEM, E_INVALID, E_CANCELLED = lib.VX_E_NOMEM, lib.VX_E_INVALID, lib.VX_E_CANCELLED
E_MISSING_PARENT, E_NO_PROGRESS = lib.VX_E_MISSING_PARENT, lib.VX_E_NO_PROGRESS
E_FORKED, E_UNSUPPORTED, E_UPCALL = lib.VX_E_FORKED, lib.VX_E_UNSUPPORTED, lib.VX_E_UPCALL
E_DAMAGED, E_PROTOCOL = lib.VX_E_DAMAGED, lib.VX_E_PROTOCOL

_Row = tuple[type[errors.VhdxError], errors.Reason, str, str | None]

CODES: dict[int, _Row] = {
    E_RANGE: (errors.RangeError, errors.Reason.RANGE, "the range is not inside the disk", None),
    E_IO: (errors.HostIOError, errors.Reason.IO, "input/output error", None),
    E_NOSPACE: (
        errors.NoSpaceError,
        errors.Reason.NO_SPACE,
        "no space left on the host",
        "free some space and try again",
    ),
    E_READONLY: (
        errors.ReadOnlyError,
        errors.Reason.READ_ONLY,
        "it is open for reading only",
        'open it with "r+"',
    ),
    E_POISONED: (
        errors.PoisonedError,
        errors.Reason.POISONED,
        "an earlier flush or commit failed, so it is unknown which data is durable",
        "close the image and open it again",
    ),
    E_CLOSED: (errors.ClosedError, errors.Reason.CLOSED, "the disk was closed", None),
    E_NOMEM: (errors.HostIOError, errors.Reason.NO_MEMORY, "the host is out of memory", None),
    E_INVALID: (
        errors.InvalidArgumentError,
        errors.Reason.INVALID_ARGUMENT,
        "an argument is out of its range",
        None,
    ),
    E_MISSING_PARENT: (
        errors.MissingParentError,
        errors.Reason.PARENT_MISSING,
        "the sector lies in a parent that is not open",
        None,
    ),
    E_CANCELLED: (errors.ClosedError, errors.Reason.CANCELLED, "the request was cancelled", None),
    E_NO_PROGRESS: (
        errors.HostIOError,
        errors.Reason.NO_PROGRESS,
        "the fault handler changed nothing (a bug)",
        None,
    ),
    E_FORKED: (
        errors.ClosedError,
        errors.Reason.FORKED,
        "the disk belongs to the process that opened it, not to its child",
        "open it again in the child",
    ),
    E_UNSUPPORTED: (
        errors.UnsupportedError,
        errors.Reason.UNSUPPORTED,
        "the device cannot do this",
        None,
    ),
    E_UPCALL: (
        errors.PoisonedError,
        errors.Reason.INTERNAL,
        "an internal error stopped the device",
        "close the image and open it again",
    ),
    E_DAMAGED: (errors.DamagedError, errors.Reason.TRUNCATED, "the image is damaged", None),
    E_PROTOCOL: (
        errors.ProtocolError,
        errors.Reason.PROTOCOL,
        "the client broke the protocol",
        None,
    ),
}

# Subclasses come first: an exception of a fault handler becomes the code of the first match.
_REFUSALS: tuple[tuple[type[BaseException], int], ...] = (
    (errors.RangeError, E_RANGE),
    (errors.NoSpaceError, E_NOSPACE),
    (errors.ReadOnlyError, E_READONLY),
    (errors.MissingParentError, E_MISSING_PARENT),
    (errors.ClosedError, E_CLOSED),
    (errors.DamagedError, E_DAMAGED),
    (errors.PoisonedError, E_POISONED),
    (errors.HostIOError, E_IO),
    (errors.UnsupportedError, E_UNSUPPORTED),
)

_identities = itertools.count(1)
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class _Raised:
    """Keeps the exception of an upcall until the caller of the request raises it again."""

    def __init__(self) -> None:
        self.error: BaseException | None = None


# The main thread and its delegate share this slot. Only one of them runs at a time.
_of_main_thread = _Raised()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.failure = ffi.new("vx_failure *")
        is_main = threading.get_ident() == threading.main_thread().ident
        self.raised = _of_main_thread if is_main else _Raised()


_thread = _Thread()


def answer_for_main_thread() -> None:
    """Lets this thread carry out upcalls for the main thread, which gets their exceptions."""
    _thread.raised = _of_main_thread


def new_identity() -> int:
    """A number for one device, never used again in this process."""
    return next(_identities)


def register(identity: int, owner: object) -> None:
    """Makes ``owner`` reachable from C by ``identity`` for as long as it lives."""
    _objects[identity] = owner


def lookup(identity: int) -> Any:
    """The object of ``identity``, or None when it is gone."""
    return _objects.get(identity)


def describe(code: int) -> str:
    """The message for a negative code."""
    return CODES[code][2] if code in CODES else f"error {code}"


def failure_buffer() -> Any:
    """This thread's ``vx_failure *``."""
    return _thread.failure


def code_of(error: BaseException) -> int:
    """The code that stands for ``error`` in C; the exception itself is kept for this thread."""
    _thread.raised.error = error
    return _code(error)


def _code(error: BaseException) -> int:
    for kind, code in _REFUSALS:
        if isinstance(error, kind):
            return code
    return E_UPCALL


def raise_for(code: int, path: str | None = None) -> None:
    """Raises the exception for ``code``; returns only if ``code`` is not negative.

    Args:
        code: the result of a C call; :func:`failure_buffer` has its details, if any.
        path: the file to name in the message if the device that failed has no path.
    """
    slot = _thread.raised
    raised, slot.error = slot.error, None
    if code >= 0:
        return
    try:
        _raise(code, raised, path)
    finally:
        del raised  # breaks the cycle from the traceback to this frame


def error_of(failure: Any, path: str | None = None) -> errors.VhdxError | None:
    """The exception for a ``vx_failure`` of a request of many; None if its code is 0."""
    if failure.code == 0:
        return None
    kind, reason, message, hint = CODES[failure.code]
    path = getattr(lookup(failure.device), "path", None) or path
    if failure.os_error:
        message = os.strerror(failure.os_error).lower()
    return kind(message, reason=reason, path=path, offset=failure.offset, hint=hint)


def _raise(code: int, raised: BaseException | None, path: str | None) -> None:
    failure = _thread.failure
    if raised is not None and _code(raised) == code and isinstance(raised, errors.VhdxError):
        failure.code = 0
        try:
            raise raised
        finally:
            del raised
    kind, reason, message, hint = CODES[code]
    offset = None
    if failure.code == code:
        offset = failure.offset
        path = getattr(lookup(failure.device), "path", None) or path
        if failure.os_error:
            message = os.strerror(failure.os_error).lower()
        failure.code = 0
    try:
        raise kind(message, reason=reason, path=path, offset=offset, hint=hint) from raised
    finally:
        del raised
