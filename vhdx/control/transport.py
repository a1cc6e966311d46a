# SPDX-License-Identifier: MIT
"""HTTP and JSON over a server's control socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vhdx.errors import ProtocolError, VhdxError

__all__ = ["answer", "get_text"]

_LONGEST_LINE = 16 << 20
_JSON = "application/json"


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
def answer(
    path: Path, method: str, target: str, body: dict[str, Any] | None, seconds: float | None
) -> Iterator[Iterator[dict[str, Any]]]:
    """The lines of the answer to one request; ``seconds`` of silence are an error, None waits."""
    connection = _Connection(path, seconds)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, target, data, {"Content-Type": _JSON})
        response = connection.getresponse()
        if (
            response.status != 200
            and response.getheader("Content-Type", "").partition(";")[0] != _JSON
        ):
            text = response.read(200).decode(errors="replace")
            raise ProtocolError(f"the server answered {response.status}: {text}", path=path)
        yield _lines(response)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, VhdxError):
            raise
        raise ProtocolError(f"the server does not answer: {error!r}", path=path) from error
    finally:
        connection.close()


def _lines(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline(_LONGEST_LINE):
        yield json.loads(line)


def get_text(path: Path, target: str, seconds: float) -> str:
    """The text behind ``target`` on the socket at ``path``."""
    connection = _Connection(path, seconds)
    try:
        connection.request("GET", target)
        return connection.getresponse().read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise ProtocolError(f"the server does not answer: {error!r}", path=path) from error
    finally:
        connection.close()
