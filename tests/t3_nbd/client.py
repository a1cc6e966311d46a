# SPDX-License-Identifier: MIT
"""A client that speaks NBD byte by byte, so that it can say what no real client would."""

from __future__ import annotations

import socket
import struct

from vhdx.front.nbd import handshake as h


class Client:
    """Connects to a unix socket and negotiates an export, unless told otherwise."""

    def __init__(self, path, export="", *, structured=True, status=True, go=True):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(path)
        assert self.take(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        self.socket.sendall(struct.pack(">I", 3))
        self.structured = structured
        if not go:
            return
        name = export.encode()
        if structured:
            self.option(h.STRUCTURED_REPLY)
        if structured and status:
            query = b"base:allocation"
            data = struct.pack(">I", len(name)) + name + struct.pack(">II", 1, len(query)) + query
            self.option(h.SET_META_CONTEXT, data)
        self.option(h.GO, struct.pack(">I", len(name)) + name + b"\0\0")

    def take(self, length):
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def option(self, number, data=b""):
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.take(20))
            body = self.take(length)
            if kind == 1 or kind >> 31:
                return kind, body

    def send(self, command, cookie=1, offset=0, length=0, *, flags=0, payload=b""):
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)
        self.socket.sendall(header + payload)

    def reply(self):
        """(cookie, error, chunks): chunks are (type, body) of a structured reply."""
        (magic,) = struct.unpack(">I", self.take(4))
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", self.take(12))
            return cookie, error, None
        assert magic == 0x668E33EF, hex(magic)
        chunks, error = [], 0
        while True:
            flags, kind, cookie, length = struct.unpack(">HHQI", self.take(16))
            body = self.take(length)
            if kind >> 15:
                (error,) = struct.unpack_from(">I", body)
            else:
                chunks.append((kind, body))
            if flags & 1:
                return cookie, error, chunks
            assert self.take(4) == b"\x66\x8e\x33\xef"

    def ask(self, command, **fields):
        payload = fields.get("payload", b"")
        if payload:
            fields.setdefault("length", len(payload))
        self.send(command, **fields)
        _, error, chunks = self.reply()
        return error, chunks

    def read(self, offset, length, flags=0):
        error, chunks = self.ask(0, offset=offset, length=length, flags=flags)
        assert error == 0
        if not self.structured:
            return self.take(length)
        data = bytearray(length)
        for kind, body in chunks:
            (at,) = struct.unpack_from(">Q", body)
            if kind == 1:
                data[at - offset : at - offset + len(body) - 8] = body[8:]
        return bytes(data)

    def close(self):
        self.socket.close()

    def __del__(self):
        # A test that ends early leaves no open socket behind.
        if hasattr(self, "socket"):
            self.socket.close()
