# SPDX-License-Identifier: MIT
"""The NBD server: its listener, its connections and their limits, and its shutdown.

Threads: one thread accepts connections, and each connection has its own thread. That thread runs
the handshake in Python, and then the transmission phase in C with the GIL released. ``_lock``
guards the table of connections.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Self

from vhdx import plane
from vhdx.errors import ProtocolError, VhdxError
from vhdx.front.nbd.address import Listener, uri_of
from vhdx.front.nbd.client import Client, name_of, negotiate, terms_of
from vhdx.front.nbd.handshake import ExportTerms, Handshake, Negotiated
from vhdx.host import Export, ServerOptions, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from vhdx.image.disk import Disk
    from vhdx.qos import Domain, Flow

__all__ = ["Server"]

_log = logging.getLogger(__name__)
_NOTHING = [0] * len(plane.ConnectionCounters._fields)


class Server:
    """Serves disks over NBD until :meth:`close`.

    Args:
        exports: a path or an open :class:`Disk` for each export name. The server opens and closes
            images given as paths. A Disk stays the caller's: it is coherent with the clients, and
            cannot be closed while it is served. With a single export, "" is another name for it.
        listen: ``nbd+unix:///?socket=PATH``, ``nbd://HOST[:PORT]``, or a listening socket, which is
            closed, but not removed, at the end. None creates a private unix socket.
        options: how the disks are served.

    Attributes:
        session: the disks, and what they share.

    Raises:
        InvalidArgumentError, InUseError, HostIOError: the server cannot listen.
        VhdxError: an image cannot be opened.
    """

    def __init__(
        self,
        exports: Mapping[str, Disk | str | os.PathLike[str]],
        listen: str | socket.socket | None = None,
        options: ServerOptions | None = None,
    ) -> None:
        options = ServerOptions() if options is None else options
        self._limits = options.limits
        self._lock = threading.Lock()
        # Under _lock:
        self._clients: set[Client] = set()
        self._closing = False
        self._failures: list[BaseException] = []
        self._slots = 0
        self._ended: dict[str, list[int]] = {}  # counters of closed connections
        # Not guarded:
        self._closed = threading.Event()
        self._first, self._last = contextlib.ExitStack(), contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.session = Session(exports, options)
            stack.callback(self.session.close)
            self._listener = Listener(listen, next(iter(exports)) or "disk")
            stack.callback(self._listener.close)
            self.session.begin()
            self._cleanup = stack.pop_all()
        self._acceptor = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._acceptor.start()

    # ---- state and counters ----

    @property
    def uri(self) -> str:
        """The URI of the first export."""
        return next(iter(self.uris.values()))

    @property
    def uris(self) -> dict[str, str]:
        """The URI of each export, by name."""
        return {name: uri_of(self._listener.address, name) for name in self.session.exports}

    @property
    def socket_path(self) -> str | None:
        """The path of the unix socket, or None with TCP."""
        return self._listener.address.path

    def exports(self) -> dict[str, Disk]:
        """The disks, by name."""
        return self.session.disks()

    @property
    def qos(self) -> Domain:
        """The QoS of the disks."""
        return self.session.qos

    def at_end(self, *, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Registers callbacks: :meth:`close` calls ``before`` first, and ``after`` last."""
        self._first.callback(before)
        self._last.callback(after)

    @property
    def connections(self) -> int:
        """The number of connected clients."""
        with self._lock:
            return len(self._clients)

    def counters(self) -> list[tuple[str, plane.ConnectionCounters]]:
        """The export and the counters of each connection that is past its handshake."""
        with self._lock:
            return [
                (client.export, client.connection.counters())
                for client in self._clients
                if client.connection is not None
            ]

    def totals(self) -> dict[str, plane.ConnectionCounters]:
        """The summed counters of each export, including those of closed connections."""
        with self._lock:
            found = {name: list(self._ended.get(name, _NOTHING)) for name in self.session.exports}
            for client in self._clients:
                if client.connection is not None:
                    mine = found[client.export]
                    found[client.export] = [
                        a + b for a, b in zip(mine, client.connection.counters(), strict=True)
                    ]
        return {name: plane.ConnectionCounters(*numbers) for name, numbers in found.items()}

    # ---- connections ----

    def _lookup(self, name: str) -> ExportTerms | None:
        if name == "" and len(self.session.exports) == 1:
            name = next(iter(self.session.exports))
        export = self.session.exports.get(name)
        return None if export is None else terms_of(name, export)

    def _accept(self) -> None:
        while True:
            try:
                peer = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                _log.warning("cannot accept a connection: %s", error)
                time.sleep(0.1)  # out of descriptors: retry, since closed connections free some
                continue
            client = Client(peer)
            thread = threading.Thread(
                target=self._serve, args=(client,), name="nbd-connection", daemon=True
            )
            with self._lock:  # so that close() joins only started threads
                full = len(self._clients) >= self._limits.connections
                refuse = self._closing or full
                try:
                    if not refuse:
                        thread.start()
                        client.thread = thread
                        self._clients.add(client)
                except RuntimeError as error:
                    _log.warning("cannot start a thread for a connection: %s", error)
                    refuse = True
            if refuse:
                if full and not self._closing:
                    _log.warning("a client was refused: %d are connected", self._limits.connections)
                peer.close()

    def _forget(self, client: Client) -> None:
        with self._lock:
            if client.connection is not None:
                before = self._ended.get(client.export, _NOTHING)
                did = client.connection.counters()
                self._ended[client.export] = [a + b for a, b in zip(before, did, strict=True)]
                client.connection = None
            self._clients.discard(client)
            peer, client.socket = client.socket, None
        if peer is not None:
            peer.close()

    def _serve(self, client: Client) -> None:
        try:
            negotiated = self._negotiate(client)
            if negotiated is not None:
                self._transmit(client, negotiated)
        except (OSError, ProtocolError) as error:
            _log.info("connection dropped: %s", error)
        except Exception:
            _log.exception("connection failed")
        finally:
            self._forget(client)

    def _negotiate(self, client: Client) -> Negotiated | None:
        assert client.socket is not None
        handshake = Handshake(
            self._lookup,
            lambda: {name: terms_of(name, each) for name, each in self.session.exports.items()},
            largest_payload=self._limits.payload,
            most_options=self._limits.options,
            option_bytes=self._limits.option_bytes,
        )
        seconds = self._limits.handshake_seconds
        return negotiate(client.socket, handshake, seconds, lambda: self._closing)

    def _transmit(self, client: Client, negotiated: Negotiated) -> None:
        export = self.session.exports[negotiated.export]
        initiator = name_of(client.socket)
        flow = self.qos.connect(negotiated.export, initiator)
        try:
            self._run(client, negotiated, export, flow)
        finally:
            self.qos.disconnect(flow)
        # Reclaim trimmed space even if the client did not flush after a trim. A failure is ignored
        # here: it poisons the disk, and later requests report it.
        with contextlib.suppress(VhdxError):
            export.disk.reclaim()

    def _run(self, client: Client, negotiated: Negotiated, export: Export, flow: Flow) -> None:
        with self._lock:
            if self._closing or client.socket is None:
                return
            client.socket.settimeout(None)
            fd = client.socket.detach()
            client.socket = None
            self._slots += 1
            client.export = negotiated.export
            client.connection = connection = plane.Connection(
                fd,
                flow.throttle,
                self.session.pool,
                early=negotiated.early,
                slot=self._slots,
                read_only=export.disk.read_only,
                structured=negotiated.structured,
                context_id=negotiated.context_id,
                largest_payload=self._limits.payload,
                requests_limit=self._limits.requests,
                bytes_limit=self._limits.connection_bytes,
                meter=flow.meter,
            )
        flow.set_under_way(lambda: connection.counters().under_way)
        code = connection.serve()
        if code == plane.CANCELLED:
            _log.warning(
                "a client of export %r was disconnected: it did not read its replies, and "
                "another client needed the memory that they took",
                negotiated.export,
            )
        elif code < 0:
            reason = plane.describe_failure(code)
            _log.info("connection of export %r ended: %s", negotiated.export, reason)

    # ---- shutdown ----

    def close(self, drain_seconds: float = 10.0) -> None:
        """Takes no new requests, finishes those in flight, flushes, and closes the opened images.

        Args:
            drain_seconds: after this time, clients that do not read their replies are disconnected.

        A second call waits for the first; one of the two raises the error if there was one.

        Raises:
            VhdxError: a disk could not be flushed.
        """
        self.stop(drain_seconds)
        with self._lock:
            failure = self._failures.pop() if self._failures else None
        if failure is not None:
            raise failure

    def stop(self, drain_seconds: float = 10.0) -> None:
        """Like :meth:`close`, but keeps an error for the owner's call to :meth:`close`."""
        with self._lock:
            first, self._closing = not self._closing, True
        if first:
            try:
                self._close(drain_seconds)
            except BaseException as error:
                with self._lock:
                    self._failures.append(error)
            self._closed.set()
        self._closed.wait()

    def _close(self, drain_seconds: float) -> None:
        self._first.close()
        with self._lock:
            clients = list(self._clients)
            for client in clients:
                if client.connection is not None:
                    client.connection.stop()
                elif client.socket is not None:
                    with contextlib.suppress(OSError):
                        client.socket.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + drain_seconds
        for cut in (False, True):
            for client in clients:
                connection = client.connection
                if cut and connection is not None:
                    connection.abort()
                if client.thread is not None:
                    client.thread.join(None if cut else max(0.0, deadline - time.monotonic()))
        with self._last, contextlib.ExitStack() as stack:
            stack.callback(self._cleanup.close)
            stack.callback(self._acceptor.join)
            stack.callback(self._listener.stop)
            stack.callback(self.session.flush)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
