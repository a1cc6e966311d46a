# SPDX-License-Identifier: MIT
"""The handshake as a pure state machine: answers, refusals and limits of the protocol."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdx.errors import ProtocolError
from vhdx.front.nbd import ExportTerms, Handshake
from vhdx.front.nbd import handshake as h

EXPORTS = {
    "disk": ExportTerms("disk", "a disk", 1 << 30, False),
    "frozen": ExportTerms("frozen", "", 512, True),
}


class Joined(Handshake):
    """Gives the answers to what was received as one."""

    def receive(self, data):
        return b"".join(super().receive(data))


def new(exports=EXPORTS, flags=3, **limits):
    alone = next(iter(exports.values())) if len(exports) == 1 else None
    machine = Joined(
        lambda name: exports.get(name) or (alone if name == "" else None),
        lambda: exports,
        **limits,
    )
    assert machine.greeting() == b"NBDMAGICIHAVEOPT\x00\x03"
    if flags is not None:
        assert machine.receive(struct.pack(">I", flags)) == b""
    return machine


def option(number, data=b""):
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def named(name, *wishes, export_bytes=None):
    raw = name.encode() if export_bytes is None else export_bytes
    return struct.pack(">I", len(raw)) + raw + struct.pack(f">H{len(wishes)}H", len(wishes), *wishes)


def queries(name, *texts):
    data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(texts))
    for text in texts:
        data += struct.pack(">I", len(text)) + text.encode()
    return data


def replies(data):
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        found.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def kinds(data):
    return [kind for _, kind, _ in replies(data)]


def test_go_gives_size_flags_and_what_was_wished():
    machine = new()
    machine.receive(option(h.STRUCTURED_REPLY))
    answer = replies(machine.receive(option(h.GO, named("disk", 1, 2, 3, 99))))
    assert [kind for _, kind, _ in answer] == [3, 3, 3, 3, 1]
    info, size, flags = struct.unpack(">HQH", answer[0][2])
    assert (info, size) == (0, 1 << 30)
    wanted = h.HAS_FLAGS | h.SEND_FLUSH | h.SEND_FUA | h.SEND_TRIM | h.SEND_WRITE_ZEROES
    wanted |= h.SEND_DF | h.CAN_MULTI_CONN | h.SEND_CACHE | h.SEND_FAST_ZERO
    assert flags == wanted
    assert answer[1][2] == b"\0\1disk"
    assert answer[2][2] == b"\0\2a disk"
    assert struct.unpack(">HIII", answer[3][2]) == (3, 1, 4096, 32 << 20)
    assert machine.negotiated.export == "disk"
    assert machine.negotiated.structured
    assert machine.negotiated.context_id is None


def test_read_only_export_says_so_and_offers_no_changes():
    machine = new()
    answer = replies(machine.receive(option(h.INFO, named("frozen"))))
    flags = struct.unpack(">HQH", answer[0][2])[2]
    assert flags & h.READ_ONLY
    assert not flags & (h.SEND_TRIM | h.SEND_WRITE_ZEROES | h.SEND_FAST_ZERO | h.SEND_DF)
    assert machine.negotiated is None


def test_info_and_go_agree_byte_for_byte():
    machine = new()
    first = machine.receive(option(h.INFO, named("disk", 3)))
    second = machine.receive(option(h.GO, named("disk", 3)))
    assert [(k, d) for _, k, d in replies(first)] == [(k, d) for _, k, d in replies(second)]


@pytest.mark.parametrize(("flags", "zeroes"), [(3, 0), (1, 124)])
def test_export_name(flags, zeroes):
    machine = new(flags=flags)
    answer = machine.receive(option(h.EXPORT_NAME, b"disk") + b"early")
    assert len(answer) == 10 + zeroes
    assert struct.unpack_from(">Q", answer) == (1 << 30,)
    assert machine.negotiated.early == b"early"


def test_unknown_export():
    machine = new()
    assert kinds(machine.receive(option(h.GO, named("nothing")))) == [h.ERR_UNKNOWN]
    assert kinds(machine.receive(option(h.GO, named("")))) == [h.ERR_UNKNOWN]
    with pytest.raises(ProtocolError):
        machine.receive(option(h.EXPORT_NAME, b"nothing"))


def test_default_export_of_a_single_one():
    machine = new({"only": ExportTerms("only", "", 512, False)})
    answer = replies(machine.receive(option(h.GO, named("", 1))))
    assert answer[1][2] == b"\0\1only"
    assert machine.negotiated.export == "only"


def test_list_is_one_reply_for_each():
    answer = replies(new().receive(option(h.LIST)))
    assert [kind for _, kind, _ in answer] == [2, 2, 1]
    assert answer[0][2] == struct.pack(">I", 4) + b"diska disk"
    assert kinds(new().receive(option(h.LIST, b"x"))) == [h.ERR_INVALID]


def test_meta_contexts():
    machine = new()
    set_option = option(h.SET_META_CONTEXT, queries("disk", "base:allocation", "other:thing"))
    assert kinds(machine.receive(set_option)) == [h.ERR_INVALID]  # not before structured replies
    machine.receive(option(h.STRUCTURED_REPLY))
    listed = replies(machine.receive(option(h.LIST_META_CONTEXT, queries("disk"))))
    assert listed[0][1:] == (4, b"\0\0\0\0base:allocation")
    assert kinds(machine.receive(option(h.LIST_META_CONTEXT, queries("disk", "base:")))) == [4, 1]
    assert kinds(machine.receive(option(h.LIST_META_CONTEXT, queries("disk", "qemu:")))) == [1]
    assert kinds(machine.receive(set_option)) == [4, 1]
    machine.receive(option(h.GO, named("disk")))
    assert machine.negotiated.context_id == 1


@pytest.mark.parametrize(
    "then",
    [
        option(h.SET_META_CONTEXT, queries("disk")),
        option(h.SET_META_CONTEXT, queries("nothing", "base:allocation")),
        option(h.SET_META_CONTEXT, b"\xff\xff\xff\xff"),
        option(h.SET_META_CONTEXT, queries("frozen", "base:allocation")),
    ],
)
def test_a_later_selection_replaces_the_contexts_also_when_it_fails(then):
    machine = new()
    machine.receive(option(h.STRUCTURED_REPLY))
    machine.receive(option(h.SET_META_CONTEXT, queries("disk", "base:allocation")))
    machine.receive(then)
    machine.receive(option(h.GO, named("disk")))
    assert machine.negotiated.context_id is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff\0\0",
        struct.pack(">I", 3) + b"di" + b"\0\0",
        named("disk") + b"x",
        named("disk", 1)[:-1],
        named("", export_bytes=b"a\0b"),
        named("", export_bytes=b"\xff\xfe"),
        named("x" * 4097),
    ],
)
def test_malformed_go_is_an_error_and_the_talk_goes_on(data):
    machine = new()
    assert kinds(machine.receive(option(h.GO, data))) == [h.ERR_INVALID]
    assert kinds(machine.receive(option(h.GO, named("disk")))) == [3, 1]


def test_unknown_options_are_unsupported_and_their_data_is_consumed():
    machine = new()
    for number in (4, 11, 77, (1 << 32) - 1):
        assert kinds(machine.receive(option(number, b"IHAVEOPT" * 9))) == [h.ERR_UNSUP]
    assert kinds(machine.receive(option(h.STARTTLS))) == [h.ERR_POLICY]
    assert kinds(machine.receive(option(h.LIST))) == [2, 2, 1]


def test_abort():
    machine = new()
    assert kinds(machine.receive(option(h.ABORT, b"bye"))) == [1]
    assert machine.finished
    assert machine.negotiated is None


def test_shutting_down():
    machine = new()
    machine.shutting_down = True
    assert kinds(machine.receive(option(h.GO, named("disk")))) == [h.ERR_SHUTDOWN]
    assert kinds(machine.receive(option(h.ABORT))) == [1]


@pytest.mark.parametrize("flags", [4, 7, 1 << 31])
def test_unknown_client_flags_drop(flags):
    machine = new(flags=None)
    with pytest.raises(ProtocolError):
        machine.receive(struct.pack(">I", flags))


def test_options_of_a_client_that_is_not_fixed_newstyle_drop():
    with pytest.raises(ProtocolError):
        new(flags=0).receive(option(h.LIST))
    machine = new(flags=0)
    assert len(machine.receive(option(h.EXPORT_NAME, b"disk"))) == 134


def test_limits():
    machine = new(option_bytes=100)
    with pytest.raises(ProtocolError, match="101 bytes"):
        machine.receive(option(h.LIST, b"x" * 101)[:16])
    machine = new()
    with pytest.raises(ProtocolError, match="4294967295 bytes"):
        machine.receive(b"IHAVEOPT" + struct.pack(">II", h.GO, (1 << 32) - 1))
    machine = new(most_options=5)
    for _ in range(5):
        machine.receive(option(99))
    with pytest.raises(ProtocolError, match="more than 5"):
        machine.receive(option(99))


def test_garbage_is_dropped_at_its_first_wrong_byte():
    for garbage in (b"GET / HTTP/1.1\r\n", b"IHAVEOPX", b"\0"):
        with pytest.raises(ProtocolError):
            new().receive(garbage)


@given(st.binary(max_size=300), st.lists(st.integers(1, 50), max_size=10))
def test_pieces_and_garbage_never_break_it(data, cuts):
    """However the bytes arrive, the same thing happens."""
    stream = struct.pack(">I", 3) + option(h.LIST) + option(h.STRUCTURED_REPLY) + data

    def run(pieces):
        machine, answer = new(flags=None), b""
        try:
            for piece in pieces:
                answer += machine.receive(piece)
                if machine.finished or machine.negotiated is not None:
                    break
        except ProtocolError:
            return answer, "dropped"
        return answer, machine.finished

    pieces, rest = [], stream
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    pieces.append(rest)
    assert run(pieces)[1] == run([stream])[1]


def test_lists_are_counted_and_answered_one_at_a_time():
    many = {f"disk{n}": ExportTerms(f"disk{n}", "x" * 100, 512, False) for n in range(50)}
    machine = new(many, most_options=32)
    answers = Handshake.receive(machine, option(h.LIST) * 1000)
    for _ in range(82):
        assert len(next(answers)) < 10_000
    with pytest.raises(ProtocolError, match="more than 82 options"):
        next(answers)
