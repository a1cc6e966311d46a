# SPDX-License-Identifier: MIT
"""Finds the servers of this user by their control sockets, and asks them."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from vhdx.control import wire
from vhdx.errors import InUseError, ProtocolError, Reason, VhdxError
from vhdx.nbd.address import is_alive, runtime_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    import aiohttp

__all__ = ["Owner", "ServerInfo", "find_owner", "servers"]

_ANSWER_SECONDS = 10.0
_LONGEST_LINE = 16 << 20


@dataclass(frozen=True)
class ServerInfo:
    """A server of this user.

    Attributes:
        socket: its control socket.
        pid: its process.
        started: seconds since 1970.
        exports: name, uri, path, key, format, virtual_size (bytes), read_only, connections.
        connections: export and counters.
    """

    socket: Path
    pid: int
    started: float
    exports: list[dict[str, Any]]
    connections: list[dict[str, Any]]

    def stop(self, seconds: float = 60.0) -> None:
        """Asks it to end, and waits until it has closed its images.

        Raises:
            InUseError: it has not ended after ``seconds``.
        """
        _run(_json(self.socket, "POST", "/v1/stop"))
        deadline = time.monotonic() + seconds
        while self.socket.exists() and is_alive(self.socket):
            if time.monotonic() > deadline:
                raise InUseError(
                    f"process {self.pid} has not ended after {seconds:g} s", path=self.socket
                )
            time.sleep(0.02)


@dataclass(frozen=True)
class Owner:
    """The server that holds an image, and the export that it is."""

    server: ServerInfo
    export: str

    def ask(
        self,
        operation: str,
        *,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        item: Callable[[Any], None] | None = None,
        **arguments: Any,
    ) -> Any:
        """Has the owner do something; returns its result, or raises its exception.

        Args:
            operation: info, map, resize, compact or snapshot.
            progress: called with what is done and what is to do.
            cancel: asked now and then; when it answers True, the owner stops.
            item: called with parts of a long result.
            arguments: of the operation.
        """
        path = f"/v1/exports/{quote(self.export, safe='')}/{operation}"

        async def talk() -> Any:
            async for line in _lines(self.server.socket, path, arguments, cancel):
                if "error" in line:
                    raise wire.error_of(line["error"])
                if "result" in line:
                    return line["result"]
                if "progress" in line and progress is not None:
                    progress(*line["progress"])
                elif "item" in line and item is not None:
                    item(line["item"])
            raise ProtocolError("the server ended before its answer", path=self.server.socket)

        return _run(talk())


def servers() -> list[ServerInfo]:
    """The servers of this user that answer, oldest first; sockets of dead ones are removed."""
    found = []
    for path in sorted(runtime_directory().glob(f"*{wire.SUFFIX}")):
        if not is_alive(path):
            continue
        try:
            facts = _run(_json(path, "GET", "/v1/server"))
            found.append(ServerInfo(path, **facts))
        except (VhdxError, TypeError):
            continue  # it ends just now, or is of another kind
    return sorted(found, key=lambda server: (server.started, server.pid))


def find_owner(path: str | os.PathLike[str]) -> Owner | None:
    """The server of this user that serves the image at ``path``, or None."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    key = [status.st_dev, status.st_ino]
    for server in servers():
        for export in server.exports:
            if export["key"] == key:
                return Owner(server, export["name"])
    return None


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    import aiohttp

    try:
        return asyncio.run(work)
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        if isinstance(error, VhdxError):
            raise
        raise ProtocolError(f"the server's control socket failed: {error!r}") from error


def _session(socket: Path, seconds: float | None) -> aiohttp.ClientSession:
    import aiohttp  # only those who ask a server pay for it

    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(os.fspath(socket)),
        timeout=aiohttp.ClientTimeout(total=seconds),
        read_bufsize=_LONGEST_LINE,
    )


async def _json(socket: Path, method: str, path: str) -> Any:
    async with (
        _session(socket, _ANSWER_SECONDS) as session,
        session.request(method, f"http://vhdx{path}") as answer,
    ):
        await _check(answer, socket)
        return await answer.json()


async def _check(answer: aiohttp.ClientResponse, socket: Path) -> None:
    if answer.status != 200:
        text = (await answer.text())[:200]
        raise ProtocolError(f"the server answered {answer.status}: {text}", path=socket)


async def _lines(
    socket: Path, path: str, arguments: dict[str, Any], cancel: Callable[[], bool] | None
) -> AsyncIterator[dict[str, Any]]:
    async with (
        _session(socket, None) as session,
        session.post(f"http://vhdx{path}", json=arguments) as answer,
    ):
        await _check(answer, socket)
        async for line in answer.content:
            yield json.loads(line)
            if cancel is not None and cancel():
                raise VhdxError("it was cancelled", reason=Reason.CANCELLED)
