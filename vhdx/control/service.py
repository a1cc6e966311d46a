# SPDX-License-Identifier: MIT
"""A server's control socket: it lists what is served and changes it while it is served.

Threads: one runs the event loop; each operation runs on a thread of a small executor, because it
may take long. Only processes of the same user are answered (the kernel says who connects).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import secrets
import socket
import struct
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from vhdx.control import wire
from vhdx.control.metrics import METRICS_TYPE, exposition
from vhdx.control.qos import change_qos
from vhdx.errors import ClosedError, InvalidArgumentError, NotFoundError, Reason, VhdxError
from vhdx.front import nbd
from vhdx.host import Limits, ServerOptions
from vhdx.host.runtime import listen_unix, runtime_directory
from vhdx.qos import NORMALISED_UNIT, Scheduling, Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from vhdx.image import Disk
    from vhdx.qos.monitor import Alert

    Progress = Callable[[int, int], None]
    Operation = Callable[["_Stream", Disk, dict[str, Any]], Any]

__all__ = ["Control", "serve"]

_log = logging.getLogger(__name__)
_http_log = logging.getLogger(f"{__name__}.http")
_WORKERS = 8
_LARGEST_REQUEST = 64 << 10
_EXTENTS_AT_ONCE = 1000
_PROGRESS_SECONDS = 0.1
_LAST_ANSWER_SECONDS = 2.0
_MOST_EVENTS, _EVENT_POLL_SECONDS, _MOST_LISTENERS = 1000, 0.5, 100
_PATIENCE_SECONDS, _POLL_SECONDS = 60.0, 0.2
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


def _is_a_fault(record: logging.LogRecord) -> bool:
    """Of ours: who sends no HTTP is told so, and nobody else needs to know."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


_http_log.addFilter(_is_a_fault)


class Control:
    """The control socket of ``server``, from now until the server has closed.

    Args:
        server: what is controlled.
        on_stop: called on a thread of its own when a client wants the server to end.
    """

    def __init__(self, server: nbd.Server, on_stop: Callable[[], None]) -> None:
        self._server, self._on_stop = server, on_stop
        self._started = time.time()
        self._lock = threading.Lock()
        self._closing = False
        self._streams: set[_Stream] = set()
        self._listeners: list[web.Request] = []  # of the loop's thread
        directory = runtime_directory()
        self.path = directory / f"{os.getpid()}-{secrets.token_hex(4)}{wire.SUFFIX}"
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._executor = ThreadPoolExecutor(_WORKERS, "vhdx-control")
        # Not held up by operations; looks not by changes, which wait for the file.
        self._changes = ThreadPoolExecutor(1, "vhdx-qos-change")
        self._looks = ThreadPoolExecutor(1, "vhdx-qos-look")
        ready = threading.Event()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="vhdx-control", daemon=True
        )
        self._thread.start()
        ready.wait()
        for failure in self._failures:
            self._thread.join()
            raise failure
        server.at_end(before=self._refuse, after=self.close)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._listen())
        except BaseException as error:
            self._failures.append(error)
            ready.set()
            self._loop.close()
            return
        ready.set()
        self._loop.run_forever()
        assert self._runner is not None
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _listen(self) -> None:
        application = web.Application(middlewares=[_only_the_owner], client_max_size=_LARGEST_REQUEST)
        application.add_routes(
            [
                web.get("/v1/server", self._describe),
                web.post("/v1/stop", self._stop),
                web.get("/v1/qos", self._describe_qos),
                web.post("/v1/qos", self._change_qos),
                web.get("/metrics", self._metrics),
                web.get("/events", self._events),
                web.post("/v1/operations/{operation}", self._operate),
            ]
        )
        runner = web.AppRunner(
            application,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,  # a client that leaves cancels its operation
            shutdown_timeout=_LAST_ANSWER_SECONDS,
            logger=_http_log,
        )
        await runner.setup()
        listener = listen_unix(os.fspath(self.path))
        self.path.chmod(0o600)  # the directory let nobody else in before
        await web.SockSite(runner, listener).start()
        self._runner = runner

    def _refuse(self) -> None:
        """The server is about to close: what takes long is cancelled, and nothing begins."""
        with self._lock:
            self._closing = True
            streams = list(self._streams)
        for stream in streams:
            stream.abort()
        # Who listens sees the end; who does not read does not hold it up.
        self._loop.call_soon_threadsafe(
            self._loop.call_later, 2 * _EVENT_POLL_SECONDS, self._cut_listeners
        )

    def _cut_listeners(self) -> None:
        for request in self._listeners:
            if request.transport is not None:
                request.transport.abort()

    def close(self) -> None:
        """Answers nobody any more, and removes the socket; operations under way were finished."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._executor.shutdown(wait=False)
        self._changes.shutdown(wait=False)
        self._looks.shutdown(wait=False)

    # ---- answers ----

    async def _describe(self, request: web.Request) -> web.Response:
        del request
        exports = self._server.exports()
        connections = self._server.counters()
        uris = self._server.uris
        return web.json_response(
            {
                "pid": os.getpid(),
                "started": self._started,
                "exports": [
                    {
                        "name": name,
                        "uri": uris[name],
                        "path": os.path.abspath(disk.path),
                        "key": list(disk.key),
                        "format": disk.format,
                        "virtual_size": disk.size,
                        "read_only": disk.read_only,
                        "connections": sum(export == name for export, _ in connections),
                    }
                    for name, disk in exports.items()
                ],
                "connections": [
                    {"export": export, **counters._asdict()} for export, counters in connections
                ],
            }
        )

    async def _stop(self, request: web.Request) -> web.Response:
        del request
        threading.Thread(target=self._on_stop, name="vhdx-stop", daemon=True).start()
        return web.json_response({"result": None})

    async def _describe_qos(self, request: web.Request) -> web.Response:
        del request
        try:
            found = await self._loop.run_in_executor(self._looks, self._server.qos.describe)
        except ClosedError as error:
            return _refusal(error)
        return web.json_response({"pid": os.getpid(), **found})

    async def _change_qos(self, request: web.Request) -> web.Response:
        """One change of what is wanted; it may write a file, so it is a thread's."""
        try:
            body = await _body(request)
            change = functools.partial(change_qos, self._server.qos, body)
            result = await self._loop.run_in_executor(self._changes, change)
        except VhdxError as error:
            return _refusal(error)
        return web.json_response({"result": result})

    async def _metrics(self, request: web.Request) -> web.Response:
        del request
        try:
            text = await self._loop.run_in_executor(self._looks, exposition, self._server)
        except ClosedError as error:
            raise web.HTTPServiceUnavailable(text=str(error)) from error
        return web.Response(body=text, headers={"Content-Type": METRICS_TYPE})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Alerts, one JSON object a line: those of before, then each as it comes."""
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_MOST_EVENTS)

        def put(event: dict[str, Any]) -> None:
            with contextlib.suppress(asyncio.QueueFull):  # a client that does not read loses some
                queue.put_nowait(event)

        domain = self._server.qos
        if len(self._listeners) >= _MOST_LISTENERS:
            raise web.HTTPServiceUnavailable(text=f"{_MOST_LISTENERS} listen to events already")

        def note(alert: Alert) -> None:
            self._loop.call_soon_threadsafe(put, alert.as_dict())

        self._listeners.append(request)
        with domain.listening(note) as before, contextlib.ExitStack() as stack:
            stack.callback(self._listeners.remove, request)
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                for alert in before:
                    await response.write(json.dumps(alert.as_dict()).encode() + b"\n")
                while not self._closing:
                    try:
                        event = await asyncio.wait_for(queue.get(), _EVENT_POLL_SECONDS)
                    except TimeoutError:
                        continue
                    await response.write(json.dumps(event).encode() + b"\n")
        return response

    async def _operate(self, request: web.Request) -> web.StreamResponse:
        try:
            work, disk, arguments = self._asked(request, await _body(request))
        except VhdxError as error:
            return _refusal(error)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        stream = _Stream(request, response, self._loop, self._server.qos.pace)
        with self._lock:
            refused = self._closing
            if not refused:
                self._streams.add(stream)
        try:
            if refused:
                raise ClosedError("the server is closing")
            done = self._loop.run_in_executor(self._executor, work, stream, disk, arguments)
            try:
                result = await asyncio.shield(done)
            except asyncio.CancelledError:
                stream.cancelled.set()  # the client has left
                await asyncio.wait([done])
                raise
            await stream.send({"result": result})
        except asyncio.CancelledError:
            raise
        except ConnectionError:
            stream.cancelled.set()
        except Exception as error:
            if not isinstance(error, VhdxError):
                _log.exception("an operation on %s failed", disk.path)
            with contextlib.suppress(ConnectionError):
                await stream.send({"error": wire.object_of(error)})
        finally:
            with self._lock:
                self._streams.discard(stream)
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    def _asked(self, request: web.Request, body: Any) -> tuple[Operation, Disk, dict[str, Any]]:
        """What is to be done, on which disk, and how."""
        operation = request.match_info["operation"]
        if not isinstance(body, dict) or not isinstance(body.get("arguments", {}), dict):
            raise InvalidArgumentError("a request is a JSON object")
        if operation not in _OPERATIONS:
            raise InvalidArgumentError(f"there is no operation {operation!r}")
        disk = self._server.exports().get(str(body.get("export")))
        if disk is None:
            raise NotFoundError(f"there is no export {body.get('export')!r}")
        return _OPERATIONS[operation], disk, body.get("arguments", {})


_STATUS = {
    Reason.NOT_FOUND: 404,
    Reason.IN_USE: 409,
    Reason.INTERNAL: 500,
    Reason.CLOSED: 503,
    Reason.NO_SPACE: 507,
}


def _refusal(error: VhdxError) -> web.Response:
    """What is said of a request before anything was done for it."""
    return web.json_response({"error": wire.object_of(error)}, status=_STATUS.get(error.reason, 400))


async def _body(request: web.Request) -> Any:
    try:
        return await request.json()
    except (ValueError, LookupError, RecursionError, web.HTTPRequestEntityTooLarge) as error:
        raise InvalidArgumentError(f"the request is no JSON that can be read: {error!r}") from error


class _Stream:
    """The answer to one operation; its thread sends lines through the event loop."""

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        loop: asyncio.AbstractEventLoop,
        pace: Callable[[int], None],
    ) -> None:
        self._request, self._response, self._loop = request, response, loop
        self.pace = pace
        self._next_progress = 0.0
        self._underway: Future[None] | None = None
        self.cancelled = threading.Event()

    def abort(self) -> None:
        """Ends the operation, and cuts its client off."""
        self.cancelled.set()
        transport = self._request.transport
        if transport is not None:
            self._loop.call_soon_threadsafe(transport.abort)

    async def send(self, line: dict[str, Any]) -> None:
        await self._response.write(json.dumps(line, default=str).encode() + b"\n")

    def emit(self, line: dict[str, Any]) -> None:
        """From the operation's thread; waits until the client takes it, but not for ever."""
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
            raise VhdxError("the client has left, or does not listen", reason=Reason.CANCELLED)

    def progress(self, done: int, total: int) -> None:
        """Sends a line of progress now and then, and none while the last one is on its way."""
        now = time.monotonic()
        if self._underway is not None and not self._underway.done():
            return
        if now >= self._next_progress or done == total:
            self._next_progress = now + _PROGRESS_SECONDS
            line = self.send({"progress": [done, total]})
            self._underway = asyncio.run_coroutine_threadsafe(line, self._loop)


@web.middleware
async def _only_the_owner(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    peer = None if request.transport is None else request.transport.get_extra_info("socket")
    if peer is None:
        raise web.HTTPForbidden
    found = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if _CREDENTIALS.unpack(found)[1] != os.geteuid():
        raise web.HTTPForbidden(text="this server belongs to another user")
    return await handler(request)


# ---- operations: on a thread of the executor ----


def _option(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name, default)
    if value != default and type(value) is not kind:
        raise InvalidArgumentError(f"{name} must be of type {kind.__name__}")
    return value


def _info(stream: _Stream, disk: Disk, body: dict[str, Any]) -> Any:
    del stream, body
    return {"facts": disk.describe(), "chain": disk.chain}


def _map(stream: _Stream, disk: Disk, body: dict[str, Any]) -> None:
    del body
    some = []
    for extent in disk.extents():
        some.append(extent.as_tuple())
        if len(some) == _EXTENTS_AT_ONCE:
            stream.emit({"item": some})
            some = []
    stream.emit({"item": some})


def _resize(stream: _Stream, disk: Disk, body: dict[str, Any]) -> str | None:
    del stream
    if body.get("size") is None:
        raise InvalidArgumentError("size is missing")
    return disk.resize(
        _option(body, "size", int, None),
        shrink=_option(body, "shrink", bool, False),
        unsafe=_option(body, "unsafe", bool, False),
    )


def _compact(stream: _Stream, disk: Disk, body: dict[str, Any]) -> Any:
    del body
    done = disk.compact(progress=stream.progress, cancel=stream.cancelled.is_set, pace=stream.pace)
    return done.as_dict()


def _snapshot(stream: _Stream, disk: Disk, body: dict[str, Any]) -> str:
    del stream
    checkpoint = _option(body, "checkpoint", str, None)
    if checkpoint is not None and not os.path.isabs(checkpoint):
        raise InvalidArgumentError("the checkpoint's path must be absolute")
    try:
        return disk.snapshot(checkpoint)
    except UnicodeError as error:
        raise InvalidArgumentError("no file can have this name") from error


_OPERATIONS: Mapping[str, Operation] = {
    "info": _info,
    "map": _map,
    "resize": _resize,
    "compact": _compact,
    "snapshot": _snapshot,
}


def serve(
    exports: Mapping[str, Disk | str | os.PathLike[str]],
    *,
    listen: str | socket.socket | None = None,
    read_only: bool = False,
    limits: Limits | None = None,
    format: str | None = None,
    qos: Mapping[str, Settings | Mapping[str, Any]] | None = None,
    qos_file: str | os.PathLike[str] | None = None,
    qos_unit: int = NORMALISED_UNIT,
    qos_hook: str | None = None,
    scheduling: Scheduling | None = None,
    on_stop: Callable[[], None] | None = None,
) -> nbd.Server:
    """Starts to serve disks over NBD; a context manager that stops at its end.

    The server has a control socket in the runtime directory, by which ``vhdx ps``, ``vhdx resize``
    and the like find it. Where there can be none, a warning is logged and it serves all the same.

    Args:
        exports, listen: as for :class:`vhdx.Server`.
        read_only, limits, format, qos, qos_file, qos_unit, qos_hook, scheduling: as for
            :class:`vhdx.host.ServerOptions`.
        on_stop: called when ``vhdx stop`` asks; closes the server when None.

    Raises:
        InvalidArgumentError, InUseError, HostIOError: it cannot listen.
        VhdxError: an image cannot be opened.
    """
    options = ServerOptions(
        read_only=read_only,
        limits=Limits() if limits is None else limits,
        format=format,
        qos={} if qos is None else qos,
        qos_file=qos_file,
        qos_unit=qos_unit,
        qos_hook=qos_hook,
        scheduling=scheduling,
    )
    server = nbd.Server(exports, listen, options)
    try:
        Control(server, server.stop if on_stop is None else on_stop)
    except (OSError, VhdxError) as error:
        _log.warning("there is no control socket: %s", error)
    except BaseException:
        server.close(0)
        raise
    return server
