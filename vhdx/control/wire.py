# SPDX-License-Identifier: MIT
"""What goes over a control socket: lines of JSON, and exceptions in them.

An operation is answered with one JSON object a line: any number of ``{"progress": [done, total]}``
and ``{"item": ...}``, then one ``{"result": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

from typing import Any

from vhdx import errors
from vhdx.errors import Reason, VhdxError

__all__ = ["SUFFIX", "VERSION", "error_of", "object_of"]

VERSION = 1
"""Of the interface; stands in every path, as ``/v1/``."""

SUFFIX = ".control"
"""Of the control sockets in the runtime directory."""


def object_of(error: BaseException) -> dict[str, Any]:
    """``error`` as JSON has it."""
    if not isinstance(error, VhdxError):
        return {"type": "VhdxError", "message": f"the server failed: {error!r}"}
    return {
        "type": type(error).__name__,
        "message": error.message,
        "reason": error.reason.value,
        "path": error.path,
        "offset": error.offset,
        "hint": error.hint,
    }


def error_of(found: dict[str, Any]) -> VhdxError:
    """The exception that :func:`object_of` wrote; an unknown kind is a plain VhdxError."""
    kind = getattr(errors, str(found.get("type")), VhdxError)
    if not (isinstance(kind, type) and issubclass(kind, VhdxError)):
        kind = VhdxError
    try:
        reason = Reason(str(found.get("reason")))
    except ValueError:
        reason = None
    return kind(
        str(found.get("message", "the server failed")),
        reason=reason,
        path=found.get("path"),
        offset=found.get("offset"),
        hint=found.get("hint"),
    )
