# SPDX-License-Identifier: MIT
"""NBD front end: the handshake in Python, the transmission phase in C.

Source: NetworkBlockDevice doc/proto.md. :mod:`vhdx.front.nbd.handshake` is a pure state machine over
bytes; :mod:`vhdx.front.nbd.server` owns sockets and threads.
"""

from typing import TYPE_CHECKING

from vhdx import lazy

if TYPE_CHECKING:
    from vhdx.front.nbd.address import inherited_socket
    from vhdx.front.nbd.handshake import ExportTerms, Handshake, Negotiated
    from vhdx.front.nbd.server import Server

__all__ = [
    "ExportTerms",
    "Handshake",
    "Negotiated",
    "Server",
    "inherited_socket",
]

__getattr__ = lazy.exports(
    __name__,
    {
        "vhdx.front.nbd.address": "inherited_socket",
        "vhdx.front.nbd.handshake": "ExportTerms Handshake Negotiated",
        "vhdx.front.nbd.server": "Server",
    },
)
