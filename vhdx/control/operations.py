# SPDX-License-Identifier: MIT
"""Operations on a served disk, and the stream of lines that answers each.

An operation may take long, so it runs on a thread of an executor. It sends lines through the event
loop. It is cancelled when its client disconnects.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web

from vhdx.control import api
from vhdx.errors import InvalidArgumentError, NotFoundError, Reason, VhdxError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from vhdx.image import Disk
    from vhdx.image.contract import Compacted

__all__ = ["OPERATIONS", "Operation", "Stream", "chosen", "refusal"]

_EXTENTS_AT_ONCE = 1000
_PROGRESS_SECONDS = 0.1
_PATIENCE_SECONDS, _POLL_SECONDS = 60.0, 0.2
_STATUS = {
    Reason.NOT_FOUND: 404,
    Reason.IN_USE: 409,
    Reason.INTERNAL: 500,
    Reason.CLOSED: 503,
    Reason.NO_SPACE: 507,
}


def refusal(error: BaseException) -> web.Response:
    """The answer to a request that failed before its first line."""
    reason = error.reason if isinstance(error, VhdxError) else Reason.INTERNAL
    body = api.encode({"error": api.ErrorReport.of(error)})
    return web.Response(body=body, status=_STATUS.get(reason, 400), content_type="application/json")


class Stream:
    """The answer to one operation.

    Args:
        request: the request to answer.
        loop: the event loop of the service.
        pace: called before background I/O with its size in bytes; blocks until it may start.

    Attributes:
        cancelled: set when the client has disconnected or the server closes.
    """

    def __init__(
        self,
        request: web.Request,
        loop: asyncio.AbstractEventLoop,
        pace: Callable[[int], None],
    ) -> None:
        self._request, self._loop, self.pace = request, loop, pace
        self._response: web.StreamResponse | None = None  # only used on the loop's thread
        self._sending = asyncio.Lock()
        self._ended = False  # under _sending: nothing more is sent
        self._next_progress = 0.0  # only used on the operation's thread
        self._underway: Future[None] | None = None
        self.cancelled = threading.Event()

    def abort(self) -> None:
        """Cancels the operation, and disconnects its client."""
        self.cancelled.set()
        transport = self._request.transport
        if transport is not None:
            self._loop.call_soon_threadsafe(transport.abort)

    async def send(self, line: dict[str, Any]) -> None:
        """Sends a line; the first line is preceded by the HTTP header."""
        async with self._sending:
            if self._ended:
                return
            if self._response is None:
                response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
                await response.prepare(self._request)
                self._response = response
            await self._response.write(api.encode(line) + b"\n")

    async def finish(self, result: Any) -> web.StreamResponse:
        """Sends the result, which ends the answer."""
        await self.send({"result": result})
        assert self._response is not None
        await self._response.write_eof()
        return self._response

    async def fail(self, error: BaseException) -> web.StreamResponse:
        """Reports ``error``: as an HTTP status, or as a line if lines were sent before."""
        async with self._sending:
            if self._response is None:
                self._ended = True  # a line of progress may still be waiting
                return refusal(error)
        await self.send({"error": api.ErrorReport.of(error)})
        await self._response.write_eof()
        return self._response

    def emit(self, line: dict[str, Any]) -> None:
        """Sends a line from the operation's thread, and waits until it is sent.

        Raises:
            VhdxError: the client has disconnected, or has not read for a minute.
        """
        sent = asyncio.run_coroutine_threadsafe(self.send(line), self._loop)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                sent.result(_POLL_SECONDS)
            except TimeoutError:
                if not self.cancelled.is_set() and time.monotonic() < deadline:
                    continue
            except ConnectionError:
                pass
            else:
                return
            self.abort()
            raise VhdxError("the client has disconnected or does not read", reason=Reason.CANCELLED)

    def progress(self, done: int, total: int) -> None:
        """Sends progress, at most ten lines a second, and none before the last one is sent."""
        now = time.monotonic()
        if self._underway is not None and not self._underway.done():
            return
        if now >= self._next_progress or done == total:
            self._next_progress = now + _PROGRESS_SECONDS
            line = self.send({"progress": [done, total]})
            self._underway = asyncio.run_coroutine_threadsafe(line, self._loop)


class Operation(NamedTuple):
    """An operation on a disk: the type of its arguments, and the function that runs it."""

    arguments: Any
    run: Callable[[Stream, Disk, Any], Any]


def chosen(name: str, others: Callable[[], Mapping[str, Operation]]) -> Operation:
    """The operation of that name, or of ``others`` if its name begins with "pool-".

    Raises:
        NotFoundError: there is none.
    """
    known = others() if name.startswith("pool-") else OPERATIONS
    operation = known.get(name)
    if operation is None:
        raise NotFoundError(f"there is no operation {name!r}")
    return operation


def _info(stream: Stream, disk: Disk, arguments: api.NoArguments) -> api.Info:
    del stream, arguments
    return api.Info(disk.describe(), disk.chain)


def _map(stream: Stream, disk: Disk, arguments: api.NoArguments) -> api.Done:
    del arguments
    some = []
    for extent in disk.extents():
        some.append(extent.as_tuple())
        if len(some) == _EXTENTS_AT_ONCE:
            stream.emit({"item": some})
            some = []
    stream.emit({"item": some})
    return api.Done()


def _resize(stream: Stream, disk: Disk, arguments: api.ResizeArguments) -> api.Resized:
    del stream
    note = disk.resize(arguments.size, shrink=arguments.shrink, unsafe=arguments.unsafe)
    return api.Resized(note)


def _compact(stream: Stream, disk: Disk, arguments: api.NoArguments) -> Compacted:
    del arguments
    return disk.compact(progress=stream.progress, cancel=stream.cancelled.is_set, pace=stream.pace)


def _snapshot(stream: Stream, disk: Disk, arguments: api.SnapshotArguments) -> api.SnapshotTaken:
    del stream
    checkpoint = arguments.checkpoint
    if checkpoint is not None and not os.path.isabs(checkpoint):
        raise InvalidArgumentError("the checkpoint's path must be absolute")
    try:
        return api.SnapshotTaken(disk.snapshot(checkpoint))
    except UnicodeError as error:
        raise InvalidArgumentError("no file can have this name") from error


OPERATIONS: Mapping[str, Operation] = {
    "info": Operation(api.NoArguments, _info),
    "map": Operation(api.NoArguments, _map),
    "resize": Operation(api.ResizeArguments, _resize),
    "compact": Operation(api.NoArguments, _compact),
    "snapshot": Operation(api.SnapshotArguments, _snapshot),
}
