# SPDX-License-Identifier: MIT
"""NBD front end: the handshake in Python, the transmission phase in C.

Source: NetworkBlockDevice doc/proto.md. :mod:`vhdx.nbd.handshake` is a pure state machine over
bytes; :mod:`vhdx.nbd.server` owns sockets, threads and limits.
"""

from typing import TYPE_CHECKING

from vhdx import lazy

if TYPE_CHECKING:
    from vhdx.nbd.address import inherited_socket
    from vhdx.nbd.handshake import ExportTerms, Handshake, Negotiated
    from vhdx.nbd.server import Limits, Server, serve

__all__ = [
    "ExportTerms",
    "Handshake",
    "Limits",
    "Negotiated",
    "Server",
    "inherited_socket",
    "serve",
]

__getattr__ = lazy.exports(
    __name__,
    {
        "vhdx.nbd.address": "inherited_socket",
        "vhdx.nbd.handshake": "ExportTerms Handshake Negotiated",
        "vhdx.nbd.server": "Limits Server serve",
    },
)
