# SPDX-License-Identifier: MIT
"""One NBD connection in its transmission phase (``csrc/front/nbd.h``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vhdx.errors import HostIOError, Reason
from vhdx.plane._native import ffi, lib

if TYPE_CHECKING:
    from vhdx.plane.device import Device, Pool
    from vhdx.plane.pacing import Meter

__all__ = ["CONNECTION_BYTES", "Connection", "ConnectionCounters"]

CONNECTION_BYTES: int = lib.VX_NBD_CONNECTION_BYTES
"""Bytes that a connection may use without charging the pool (``VX_NBD_CONNECTION_BYTES``)."""


class ConnectionCounters(NamedTuple):
    """The counters of a connection; bytes are payload (see ``vx_nbd_counters``)."""

    reads: int
    writes: int
    disconnects: int
    flushes: int
    trims: int
    caches: int
    write_zeroes: int
    block_statuses: int
    bytes_read: int
    bytes_written: int
    errors: int
    failed_writes: int
    pooled: int
    under_way: int


class Connection:
    """Serves a socket; :meth:`serve` runs on the caller's thread with the GIL released.

    Args:
        fd: a connected stream socket in blocking mode; the connection takes ownership of it.
        device: the device to serve.
        pool: runs operations that may block.
        early: bytes already received that follow the handshake.
        slot: a number that differs between connections.
        read_only, structured: as negotiated.
        context_id: the id of the base:allocation context, or None if it was not selected.
        largest_payload, requests_limit, bytes_limit: see ``vx_nbd_terms``.
        meter: counts the requests of the connection.
    """

    def __init__(
        self,
        fd: int,
        device: Device,
        pool: Pool,
        *,
        early: bytes,
        slot: int,
        read_only: bool,
        structured: bool,
        context_id: int | None,
        largest_payload: int,
        requests_limit: int,
        bytes_limit: int,
        meter: Meter | None = None,
    ) -> None:
        terms = ffi.new("vx_nbd_terms *")
        terms.largest_payload = largest_payload
        terms.requests_limit, terms.bytes_limit = requests_limit, bytes_limit
        terms.epoch_slot = slot & 0xFFFFFFFF
        terms.read_only, terms.structured = read_only, structured
        terms.block_status = context_id is not None
        terms.context_id = 0 if context_id is None else context_id
        handle = lib.vx_nbd_create(fd, device.handle, pool.handle, terms, early, len(early))
        if handle == ffi.NULL:
            raise HostIOError("the host is out of memory", reason=Reason.NO_MEMORY)
        self._keep = (device, pool, meter)
        self._handle = ffi.gc(handle, lib.vx_nbd_destroy)
        if meter is not None:
            lib.vx_nbd_set_meter(self._handle, meter.handle)

    def serve(self) -> int:
        """Serves until the client disconnects or :meth:`stop` is called; 0, or a negative code."""
        return lib.vx_nbd_serve(self._handle)

    def stop(self) -> None:
        """Takes no new requests; requests in flight are finished and answered."""
        lib.vx_nbd_stop(self._handle)

    def abort(self) -> None:
        """Closes the connection; requests in flight are finished but not answered."""
        lib.vx_nbd_abort(self._handle)

    def counters(self) -> ConnectionCounters:
        """Reads the counters; each number is exact, but they are not read at the same instant."""
        found = ffi.new("vx_nbd_counters *")
        lib.vx_nbd_counters_of(self._handle, found)
        rest = (
            found.bytes_read,
            found.bytes_written,
            found.errors,
            found.failed_writes,
            found.pooled,
            found.under_way,
        )
        return ConnectionCounters._make([*found.requests, *rest])
