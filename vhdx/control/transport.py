# SPDX-License-Identifier: MIT
"""The client side of HTTP and JSON over the control socket of a server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vhdx.control import api
from vhdx.errors import NotFoundError, ProtocolError, VhdxError

__all__ = ["ask", "get_text", "lines_of"]

_LONGEST_LINE = 16 << 20
_JSON = "application/json"
_OK, _NOT_FOUND = 200, 404


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, seconds: float | None) -> None:
        super().__init__("vhdx", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


@contextlib.contextmanager
def lines_of(
    path: Path, method: str, target: str, body: object, seconds: float | None
) -> Iterator[Iterator[dict[str, Any]]]:
    """Sends one request, and yields the decoded lines of the answer.

    Args:
        path: the path of the control socket.
        method, target: HTTP method and target of the request.
        body: the object to send as JSON; None sends no body.
        seconds: the timeout of each socket operation; None waits without a limit.

    Raises:
        NotFoundError: the server has nothing at ``target``.
        ProtocolError: the server does not answer, or its answer is not JSON.
        VhdxError: the error that the server reports.
    """
    connection = _Connection(path, seconds)
    try:
        with _failures(path):
            data = None if body is None else api.encode(body)
            connection.request(method, target, data, {"Content-Type": _JSON})
            response = connection.getresponse()
            if response.status != _OK:
                raise _failure(response, path)
        yield _decoded(response, path)
    finally:
        connection.close()


@contextlib.contextmanager
def _failures(path: Path) -> Iterator[None]:
    """Turns errors of the socket, of HTTP and of JSON into a ProtocolError."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        if isinstance(error, VhdxError):
            raise
        raise ProtocolError(f"the server does not answer: {error!r}", path=path) from error


def _decoded(response: http.client.HTTPResponse, path: Path) -> Iterator[dict[str, Any]]:
    while True:
        with _failures(path):
            line = response.readline(_LONGEST_LINE)
            if not line:
                return
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ProtocolError("a line of the answer is not a JSON object", path=path)
        yield found


def _failure(response: http.client.HTTPResponse, path: Path) -> VhdxError:
    if response.getheader("Content-Type", "").partition(";")[0] == _JSON:
        found = json.loads(response.read(_LONGEST_LINE))
        error = found.get("error") if isinstance(found, dict) else None
        return api.decode_reply(error, api.ErrorReport).exception()
    text = response.read(1000).decode(errors="replace")
    kind = NotFoundError if response.status == _NOT_FOUND else ProtocolError
    return kind(f"the server answered {response.status}: {text}", path=path)


def ask(path: Path, method: str, target: str, body: object, seconds: float | None) -> Any:
    """Sends one request, and returns the first line of the answer; raises as :func:`lines_of`."""
    with lines_of(path, method, target, body, seconds) as lines:
        found = next(lines, None)
    if found is None:
        raise ProtocolError("the server ended before it answered", path=path)
    return found


def get_text(path: Path, target: str, seconds: float) -> str:
    """Gets ``target`` from the server at ``path`` as text."""
    connection = _Connection(path, seconds)
    try:
        with _failures(path):
            connection.request("GET", target)
            response = connection.getresponse()
            if response.status != _OK:
                raise _failure(response, path)
            return response.read().decode(errors="replace")
    finally:
        connection.close()
