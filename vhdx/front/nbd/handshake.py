# SPDX-License-Identifier: MIT
"""The fixed newstyle handshake of a server (proto.md, "Newstyle negotiation"), without sockets.

Bytes from the client go in and replies come out, until the client has chosen an export or must be
dropped. Sizes from the wire are checked before any data is stored, so ``option_bytes`` bounds the
memory that a client can make the server use.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from vhdx.errors import ProtocolError

__all__ = ["ExportTerms", "Handshake", "Negotiated"]

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_OPTION_MAGIC = b"IHAVEOPT"
_REPLY_MAGIC = 0x0003E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED_REPLY = range(1, 9)
LIST_META_CONTEXT, SET_META_CONTEXT = 9, 10

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
_ERROR = 1 << 31
ERR_UNSUP, ERR_POLICY, ERR_INVALID = _ERROR + 1, _ERROR + 2, _ERROR + 3
ERR_UNKNOWN, ERR_SHUTDOWN, ERR_TOO_BIG = _ERROR + 6, _ERROR + 7, _ERROR + 9

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1 << 0, 1 << 1, 1 << 2, 1 << 3
SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF = 1 << 5, 1 << 6, 1 << 7
CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO = 1 << 8, 1 << 10, 1 << 11

_BASE_ALLOCATION = "base:allocation"
_CONTEXT_ID = 1
_LONGEST_STRING = 4096


@dataclass(frozen=True)
class ExportTerms:
    """The facts about an export that a client may learn.

    Attributes:
        name: the canonical name, as LIST shows it.
        description: for people.
        size: bytes.
        read_only: whether it refuses changes.
        preferred_block: bytes.
    """

    name: str
    description: str
    size: int
    read_only: bool
    preferred_block: int = 4096


@dataclass(frozen=True)
class Negotiated:
    """The negotiated parameters of the transmission phase.

    Attributes:
        export: the canonical name of the chosen export.
        structured: whether replies are structured.
        context_id: the id of the base:allocation context, or None if it was not selected.
        early: bytes already received that follow the handshake.
    """

    export: str
    structured: bool
    context_id: int | None
    early: bytes


@dataclass
class _Contexts:
    export: str = ""
    allocation: bool = False


@dataclass
class Handshake:
    """One client's negotiation.

    Args:
        lookup: returns the terms of the export with the name that the client gave, or None; an
            alias such as "" returns terms with the canonical name.
        names: returns the exports that LIST shows.
        largest_payload: largest payload in bytes of a READ or WRITE.
        most_options: options before the client is dropped; the first LIST raises it by the number
            of exports.
        option_bytes: largest size in bytes of the data of one option.
    """

    lookup: Callable[[str], ExportTerms | None]
    names: Callable[[], Mapping[str, ExportTerms]]
    largest_payload: int = 32 << 20
    most_options: int = 32
    option_bytes: int = 64 << 10
    negotiated: Negotiated | None = None
    finished: bool = False
    shutting_down: bool = False
    _input: bytearray = field(default_factory=bytearray)
    _flags: int | None = None
    _options: int = 0
    _listed: bool = False
    _structured: bool = False
    _contexts: _Contexts = field(default_factory=_Contexts)

    def greeting(self) -> bytes:
        """The first message of the server."""
        return _GREETING.pack(b"NBDMAGIC", _OPTION_MAGIC, _FIXED_NEWSTYLE | _NO_ZEROES)

    def receive(self, data: bytes) -> Iterator[bytes]:
        """Takes bytes from the client, and yields the replies one at a time.

        An option is parsed only after the reply to the previous option was taken, so only one reply
        is in memory. At the end ``negotiated`` is set if the transmission phase begins, and
        ``finished`` if the connection must be closed once the replies are sent.

        Raises:
            ProtocolError: the client must be dropped at once.
        """
        self._input += data
        if self._flags is None:
            if len(self._input) < 4:
                return
            (self._flags,) = struct.unpack_from(">I", self._input)
            del self._input[:4]
            if self._flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES):
                raise ProtocolError(f"the client set unknown flags {self._flags:#x}")
        while not self.finished and self.negotiated is None:
            option = self._next_option()
            if option is None:
                break
            yield self._answer(*option)

    def _next_option(self) -> tuple[int, bytes] | None:
        if len(self._input) < _OPTION.size:
            if not _OPTION_MAGIC.startswith(bytes(self._input[:8])):
                raise ProtocolError("the client sent bytes that are not an option")
            return None
        magic, option, length = _OPTION.unpack_from(self._input)
        if magic != _OPTION_MAGIC:
            raise ProtocolError("the client sent bytes that are not an option")
        if length > self.option_bytes:
            raise ProtocolError(f"option {option} has too much data: {length} bytes")
        if len(self._input) < _OPTION.size + length:
            return None
        data = bytes(self._input[_OPTION.size : _OPTION.size + length])
        del self._input[: _OPTION.size + length]
        self._options += 1
        if self._options > self.most_options:
            raise ProtocolError(f"the client sent more than {self.most_options} options")
        return option, data

    def _answer(self, option: int, data: bytes) -> bytes:
        if option == EXPORT_NAME:
            return self._export_name(data)
        if not self._flags or not self._flags & _FIXED_NEWSTYLE:
            raise ProtocolError("the client sent an option without the fixed newstyle flag")
        if option == ABORT:
            self.finished = True
            return _reply(option, REP_ACK)
        if self.shutting_down:
            return _refuse(option, ERR_SHUTDOWN, "the server is shutting down")
        if option == LIST:
            return self._list(data)
        if option in {INFO, GO}:
            return self._info_or_go(option, data)
        if option == STRUCTURED_REPLY:
            if data:
                return _refuse(option, ERR_INVALID, "STRUCTURED_REPLY takes no data")
            self._structured = True
            return _reply(option, REP_ACK)
        if option in {LIST_META_CONTEXT, SET_META_CONTEXT}:
            return self._meta_context(option, data)
        if option == STARTTLS:
            return _refuse(option, ERR_POLICY, "this server has no TLS")
        return _refuse(option, ERR_UNSUP, f"option {option} is not known")

    def _flags_of(self, terms: ExportTerms) -> int:
        flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE
        if self._structured:
            flags |= SEND_DF
        if terms.read_only:
            return flags | READ_ONLY
        return flags | SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO

    def _export_name(self, data: bytes) -> bytes:
        # The protocol has no error reply to this option, so the client is dropped on failure.
        name = _text(data)
        terms = None if name is None or self.shutting_down else self.lookup(name)
        if name is None or terms is None:
            raise ProtocolError("the client asked for an export that is not available")
        self._begin(name, terms)
        zeroes = b"" if (self._flags or 0) & _NO_ZEROES else bytes(124)
        return struct.pack(">QH", terms.size, self._flags_of(terms)) + zeroes

    def _begin(self, name: str, terms: ExportTerms) -> None:
        chosen = self._structured and self._contexts.allocation and self._contexts.export == name
        self.negotiated = Negotiated(
            terms.name, self._structured, _CONTEXT_ID if chosen else None, bytes(self._input)
        )
        self._input.clear()

    def _list(self, data: bytes) -> bytes:
        if data:
            return _refuse(LIST, ERR_INVALID, "LIST takes no data")
        answer = bytearray()
        names = self.names()
        if not self._listed:
            self.most_options += len(names)
            self._listed = True
        for name, terms in names.items():
            encoded = name.encode()
            body = (
                struct.pack(">I", len(encoded)) + encoded + terms.description.encode(errors="replace")
            )
            answer += _reply(LIST, REP_SERVER, body)
        return bytes(answer) + _reply(LIST, REP_ACK)

    def _info_or_go(self, option: int, data: bytes) -> bytes:
        name = None
        if len(data) >= 6:
            (length,) = struct.unpack_from(">I", data)
            if length <= len(data) - 6 and length <= _LONGEST_STRING:
                name = _text(data[4 : 4 + length])
                (count,) = struct.unpack_from(">H", data, 4 + length)
                if len(data) != 6 + length + 2 * count:
                    name = None
        if name is None:
            return _refuse(option, ERR_INVALID, "the name or the list of requests is malformed")
        terms = self.lookup(name)
        if terms is None:
            return _refuse(option, ERR_UNKNOWN, f"there is no export {_shown(name)}")
        wishes = set(struct.unpack_from(f">{count}H", data, 6 + length))
        answer = _reply(
            option,
            REP_INFO,
            struct.pack(">HQH", INFO_EXPORT, terms.size, self._flags_of(terms)),
        )
        if INFO_NAME in wishes:
            answer += _reply(option, REP_INFO, struct.pack(">H", INFO_NAME) + terms.name.encode())
        if INFO_DESCRIPTION in wishes:
            answer += _reply(
                option,
                REP_INFO,
                struct.pack(">H", INFO_DESCRIPTION) + terms.description.encode(errors="replace"),
            )
        if INFO_BLOCK_SIZE in wishes:
            answer += _reply(
                option,
                REP_INFO,
                struct.pack(">HIII", INFO_BLOCK_SIZE, 1, terms.preferred_block, self.largest_payload),
            )
        if option == GO:
            self._begin(name, terms)
        return answer + _reply(option, REP_ACK)

    def _meta_context(self, option: int, data: bytes) -> bytes:
        if option == SET_META_CONTEXT:
            self._contexts = _Contexts()  # drops an earlier selection even if this option fails
        parsed = _parse_queries(data)
        if parsed is None:
            return _refuse(option, ERR_INVALID, "the name or the queries are malformed")
        if not self._structured:
            return _refuse(option, ERR_INVALID, "structured replies must be negotiated first")
        name, queries = parsed
        if self.lookup(name) is None:
            return _refuse(option, ERR_UNKNOWN, f"there is no export {_shown(name)}")
        listing = option == LIST_META_CONTEXT
        wanted = _BASE_ALLOCATION in queries or (listing and (not queries or "base:" in queries))
        answer = b""
        if wanted:
            body = struct.pack(">I", 0 if listing else _CONTEXT_ID) + _BASE_ALLOCATION.encode()
            answer = _reply(option, REP_META_CONTEXT, body)
        if option == SET_META_CONTEXT:
            self._contexts = _Contexts(name, wanted)
        return answer + _reply(option, REP_ACK)


def _parse_queries(data: bytes) -> tuple[str, list[str]] | None:
    def string(at: int) -> tuple[str, int] | None:
        if len(data) - at < 4:
            return None
        (length,) = struct.unpack_from(">I", data, at)
        if length > _LONGEST_STRING or length > len(data) - at - 4:
            return None
        text = _text(data[at + 4 : at + 4 + length])
        return None if text is None else (text, at + 4 + length)

    name = string(0)
    if name is None or len(data) - name[1] < 4:
        return None
    (count,) = struct.unpack_from(">I", data, name[1])
    at = name[1] + 4
    queries = []
    while count:
        query = string(at)
        if query is None:
            return None
        queries.append(query[0])
        at = query[1]
        count -= 1
    return (name[0], queries) if at == len(data) else None


def _text(data: bytes) -> str | None:
    if len(data) > _LONGEST_STRING or b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _shown(name: str) -> str:
    return repr(name[:80])


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return _REPLY.pack(_REPLY_MAGIC, option, kind, len(data)) + data


def _refuse(option: int, kind: int, message: str) -> bytes:
    return _reply(option, kind, message.encode()[:_LONGEST_STRING])
