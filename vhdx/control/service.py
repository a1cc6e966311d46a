# SPDX-License-Identifier: MIT
"""The server side of the control socket: reports about the server, and changes to served disks.

Threads: one thread runs the event loop. Each operation may take long, so it runs on a thread of a
small executor. The server answers only processes of its own user, which the kernel identifies.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from vhdx import place
from vhdx.control import api
from vhdx.control.metrics import METRICS_TYPE, exposition
from vhdx.control.operations import Operation, Stream, chosen, refusal
from vhdx.control.qos import change_qos
from vhdx.errors import ClosedError, InvalidArgumentError, NotFoundError, VhdxError
from vhdx.front import nbd
from vhdx.host import Limits, ServerOptions
from vhdx.host.runtime import CONTROL_SUFFIX, listen_unix, process_of, runtime_directory
from vhdx.qos import NORMALISED_UNIT, Scheduling, Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from vhdx.image import Disk
    from vhdx.qos.monitor import Alert


__all__ = ["Control", "serve"]

_log = logging.getLogger(__name__)
_http_log = logging.getLogger(f"{__name__}.http")
_WORKERS = 8
_LARGEST_REQUEST = 64 << 10
_LAST_ANSWER_SECONDS = 2.0
_MOST_EVENTS, _EVENT_POLL_SECONDS, _MOST_LISTENERS = 1000, 0.5, 100
_LONGEST_SUBSCRIPTION = 86_400.0


def _is_a_fault(record: logging.LogRecord) -> bool:
    """Whether to log a record: a client's invalid HTTP is answered but not logged."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


_http_log.addFilter(_is_a_fault)


def _pool_operations() -> Mapping[str, Operation]:
    from vhdx.control import pools  # numpy and more, for servers of images in pools only

    return pools.OPERATIONS


class Control:
    """The control socket of ``server``, from now until the server has closed.

    Args:
        server: the server to control.
        on_stop: called on a new thread when a client asks the server to end.
    """

    def __init__(self, server: nbd.Server, on_stop: Callable[[], None]) -> None:
        self._server, self._on_stop = server, on_stop
        self._started = time.time()
        self._lock = threading.Lock()
        self._closing = False  # under _lock
        self._streams: set[Stream] = set()  # under _lock: operations that run
        self._listeners: list[web.Request] = []  # only used on the loop's thread
        directory = runtime_directory()
        self.path = directory / f"{os.getpid()}-{secrets.token_hex(4)}{CONTROL_SUFFIX}"
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._executor = ThreadPoolExecutor(_WORKERS, "vhdx-control")
        # Changes may wait for the QoS file, and operations take long; neither delays the others.
        self._changes = ThreadPoolExecutor(1, "vhdx-qos-change")
        self._reports = ThreadPoolExecutor(1, "vhdx-qos-report")
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
        ours = f"/v{api.VERSION}"
        application.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/events", self._events),
                web.get("/v1/server", self._describe),
                web.post("/v1/stop", self._stop),
                web.get(f"{ours}/qos", self._report_qos),
                web.post(f"{ours}/qos", self._change_qos),
                web.post(f"{ours}/qos/subscription", self._subscribe),
                web.post(f"{ours}/operations/{{operation}}", self._operate),
                web.route("*", r"/v{version:\d+}/{rest:.*}", self._refuse_version),
            ]
        )
        runner = web.AppRunner(
            application,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,  # a client that disconnects cancels its operation
            shutdown_timeout=_LAST_ANSWER_SECONDS,
            logger=_http_log,
        )
        await runner.setup()
        listener = listen_unix(os.fspath(self.path))
        self.path.chmod(0o600)  # until now the mode of the directory protected it
        await web.SockSite(runner, listener).start()
        self._runner = runner

    def _refuse(self) -> None:
        """Cancels all operations and refuses new ones; called when the server starts to close."""
        with self._lock:
            self._closing = True
            streams = list(self._streams)
        for stream in streams:
            stream.abort()
        # Listeners see the end of their stream; those that do not read are cut off after a delay.
        self._loop.call_soon_threadsafe(
            self._loop.call_later, 2 * _EVENT_POLL_SECONDS, self._cut_listeners
        )

    def _cut_listeners(self) -> None:
        for request in self._listeners:
            if request.transport is not None:
                request.transport.abort()

    def close(self) -> None:
        """Stops the service and removes its socket; by then all operations have ended."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._executor.shutdown(wait=False)
        self._changes.shutdown(wait=False)
        self._reports.shutdown(wait=False)

    # ---- answers ----

    async def _refuse_version(self, request: web.Request) -> web.Response:
        """Refuses a request of another version, and names both versions."""
        theirs = request.match_info["version"]
        if theirs == str(api.VERSION):
            raise web.HTTPNotFound(text=f"there is nothing at {request.path}")
        raise web.HTTPNotFound(
            text=f"process {os.getpid()} speaks version {api.VERSION} of the control interface, and "
            f"the client version {theirs}: use the vhdx that started it ({metadata.version('vhdx')})"
        )

    async def _describe(self, request: web.Request) -> web.Response:
        del request
        connections = self._server.counters()
        uris = self._server.uris
        exports = [
            api.ExportReport(
                name=name,
                uri=uris[name],
                path=os.path.abspath(disk.path) if place.is_host(disk.path) else disk.path,
                key=disk.key,
                format=disk.format,
                virtual_size=disk.size,
                read_only=disk.read_only,
                connections=sum(export == name for export, _ in connections),
            )
            for name, disk in self._server.exports().items()
        ]
        clients = [api.ConnectionReport(name, **did._asdict()) for name, did in connections]
        version = metadata.version("vhdx")
        report = api.ServerReport(os.getpid(), self._started, exports, clients, api.VERSION, version)
        return _reply(report)

    async def _stop(self, request: web.Request) -> web.Response:
        del request
        threading.Thread(target=self._on_stop, name="vhdx-stop", daemon=True).start()
        return _reply(api.Done())

    async def _report_qos(self, request: web.Request) -> web.Response:
        del request
        try:
            return _reply(await self._loop.run_in_executor(self._reports, self._server.qos.report))
        except ClosedError as error:
            return refusal(error)

    async def _subscribe(self, request: web.Request) -> web.Response:
        try:
            wanted = api.decode_request(await _body(request), api.Subscribe)
            if not 0 < wanted.seconds <= _LONGEST_SUBSCRIPTION:
                raise InvalidArgumentError(
                    f"a subscription for {wanted.seconds} s", hint="choose up to a day"
                )
        except VhdxError as error:
            return refusal(error)
        subscribe = functools.partial(self._server.qos.subscribe, wanted.seconds)
        await self._loop.run_in_executor(self._reports, subscribe)
        return _reply(api.Done())

    async def _change_qos(self, request: web.Request) -> web.Response:
        """Makes one QoS change; it may write the QoS file, so it runs on another thread."""
        try:
            kinds = api.ChangeDisk | api.ChangePolicy | api.RemovePolicy
            change = api.decode_request(await _body(request), kinds)
            run = functools.partial(change_qos, self._server.qos, change)
            return _reply(await self._loop.run_in_executor(self._changes, run))
        except VhdxError as error:
            return refusal(error)

    async def _metrics(self, request: web.Request) -> web.Response:
        del request
        try:
            text = await self._loop.run_in_executor(self._reports, exposition, self._server)
        except ClosedError as error:
            raise web.HTTPServiceUnavailable(text=str(error)) from error
        return web.Response(body=text, headers={"Content-Type": METRICS_TYPE})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Streams alerts, one JSON object a line: first the kept ones, then each new one."""
        if len(self._listeners) >= _MOST_LISTENERS:
            raise web.HTTPServiceUnavailable(text=f"there are {_MOST_LISTENERS} listeners already")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        queue: asyncio.Queue[Alert] = asyncio.Queue(_MOST_EVENTS)

        def put(alert: Alert) -> None:
            with contextlib.suppress(asyncio.QueueFull):  # a client that does not read loses alerts
                queue.put_nowait(alert)

        def note(alert: Alert) -> None:
            self._loop.call_soon_threadsafe(put, alert)

        self._listeners.append(request)
        with self._server.qos.listening(note) as before, contextlib.ExitStack() as stack:
            stack.callback(self._listeners.remove, request)
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                for alert in before:
                    await response.write(api.encode(alert) + b"\n")
                while not self._closing:
                    try:
                        alert = await asyncio.wait_for(queue.get(), _EVENT_POLL_SECONDS)
                    except TimeoutError:
                        continue
                    await response.write(api.encode(alert) + b"\n")
        return response

    async def _operate(self, request: web.Request) -> web.StreamResponse:
        try:
            work, disk, arguments = self._wanted(request, await _body(request))
        except VhdxError as error:
            return refusal(error)
        stream = Stream(request, self._loop, self._server.qos.pace)
        with self._lock:
            if self._closing:
                return refusal(ClosedError("the server is closing"))
            self._streams.add(stream)
        try:
            return await self._carry_out(stream, work, disk, arguments)
        except ConnectionError:
            stream.cancelled.set()
            return web.Response()  # the client is gone
        finally:
            with self._lock:
                self._streams.discard(stream)

    async def _carry_out(
        self, stream: Stream, work: Operation, disk: Disk, arguments: Any
    ) -> web.StreamResponse:
        done = self._loop.run_in_executor(self._executor, work.run, stream, disk, arguments)
        try:
            result = await asyncio.shield(done)
        except asyncio.CancelledError:
            stream.cancelled.set()  # the client has disconnected
            await asyncio.wait([done])
            done.exception()  # nobody is there to be told
            raise
        except Exception as error:
            if not isinstance(error, VhdxError):
                _log.exception("an operation on %s failed", disk.path)
            return await stream.fail(error)
        return await stream.finish(result)

    def _wanted(self, request: web.Request, body: bytes) -> tuple[Operation, Disk, Any]:
        """Decodes a request into its operation, the disk, and the arguments."""
        operation = chosen(request.match_info["operation"], _pool_operations)
        found = api.decode_request(body, api.OperationRequest)
        disk = self._server.exports().get(found.export)
        if disk is None:
            raise NotFoundError(f"there is no export {found.export!r}")
        return operation, disk, api.convert_request(found.arguments, operation.arguments)


def _reply(value: object) -> web.Response:
    return web.Response(body=api.encode(value), content_type="application/json")


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise InvalidArgumentError(f"the request is larger than {_LARGEST_REQUEST} bytes") from error


@web.middleware
async def _only_the_owner(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    peer = None if request.transport is None else request.transport.get_extra_info("socket")
    if peer is None:
        raise web.HTTPForbidden
    if process_of(peer).uid != os.geteuid():
        raise web.HTTPForbidden(text="this server belongs to another user")
    return await handler(request)


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
    """Starts a server for disks over NBD; as a context manager, it stops at the end of the block.

    The server has a control socket in the runtime directory, by which commands such as ``vhdx ps``
    and ``vhdx resize`` find it. If the socket cannot be created, a warning is logged and the server
    runs without it.

    Args:
        exports, listen: as for :class:`vhdx.Server`.
        read_only, limits, format, qos, qos_file, qos_unit, qos_hook, scheduling: as for
            :class:`vhdx.host.ServerOptions`.
        on_stop: called when ``vhdx stop`` asks the server to end; None closes the server.

    Raises:
        InvalidArgumentError, InUseError, HostIOError: the server cannot listen.
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
