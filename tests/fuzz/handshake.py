# SPDX-License-Identifier: MIT
"""The handshake: streams of options, and a second parser that says what must come of them."""

from __future__ import annotations

import random
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhdx.front.nbd import Negotiated


def option_stream(rng: random.Random) -> bytes:
    """A stream of options, good and bad."""
    stream = struct.pack(">I", rng.choice([3, 3, 3, 1, 0, 7, rng.getrandbits(32)]))
    for _ in range(rng.randrange(40)):
        number = rng.choice([*range(13), rng.getrandbits(32)])
        name = rng.choice([b"disk", b"", b"other", b"x" * rng.randrange(5000), rng.randbytes(9)])
        data = b""
        if number in {6, 7}:
            wishes = [rng.randrange(6) for _ in range(rng.randrange(4))]
            data = struct.pack(">I", len(name)) + name
            data += struct.pack(f">H{len(wishes)}H", len(wishes), *wishes)
        elif number in {9, 10}:
            queries = [rng.choice([b"base:allocation", b"base:", rng.randbytes(5)])] * rng.randrange(
                3
            )
            data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
            for query in queries:
                data += struct.pack(">I", len(query)) + query
        elif number == 1:
            data = name
        elif rng.random() < 0.2:
            data = rng.randbytes(rng.randrange(300))
        if rng.random() < 0.15 and data:
            at = rng.randrange(len(data))
            data = data[:at] + rng.choice([b"", b"\xff\xff\xff\xff", b"\0"]) + data[at + 1 :]
        length = len(data) if rng.random() < 0.97 else rng.getrandbits(rng.choice([8, 17, 32]))
        stream += b"IHAVEOPT" + struct.pack(">II", number, length) + data
    return stream


EXPORTS = {"disk": ("d", 1 << 30, False), "other": ("", 1, True)}
MOST_OPTIONS, MOST_BYTES, LONGEST = 32, 64 << 10, 4096


class Dropped(Exception):
    """The client must be dropped."""


@dataclass
class Session:
    """What must come of a stream, by the words of the protocol and our limits."""

    stream: bytes
    at: int = 0
    replies: list[tuple[int, int, int]] = field(default_factory=list)  # option, kind, info
    structured: bool = False
    context: str | None = None  # the export for which it was chosen
    export: str | None = None
    over: bool = False
    by_name: bool = False

    def run(self) -> None:
        """Up to the end of the stream, the choice of an export or an ABORT."""
        if len(self.stream) < 4:
            return
        (flags,) = struct.unpack_from(">I", self.stream)
        self.at = 4
        if flags > 3:
            raise Dropped
        options, most, listed = 0, MOST_OPTIONS, False
        while not self.over:
            head = self.stream[self.at : self.at + 16]
            if head[:8] != b"IHAVEOPT"[: len(head)]:
                raise Dropped
            if len(head) < 16:
                return
            option, length = struct.unpack(">II", head[8:])
            if length > MOST_BYTES:
                raise Dropped
            data = self.stream[self.at + 16 : self.at + 16 + length]
            if len(data) < length:
                return
            self.at += 16 + length
            options += 1
            if options > most or (option != 1 and not flags & 1):
                raise Dropped
            if option == 3 and not data and not listed:
                most, listed = most + len(EXPORTS), True
            self.option(option, data)

    def say(self, option: int, kind: int, info: int = -1) -> None:
        self.replies.append((option, kind, info))

    def option(self, option: int, data: bytes) -> None:
        invalid = 1 << 31 | 3
        if option == 1:
            if not text(data) or data.decode() not in EXPORTS:
                raise Dropped
            self.export, self.over, self.by_name = data.decode(), True, True
        elif option == 2:
            self.over = True
            self.say(2, 1)
        elif option in {3, 8} and data:
            self.say(option, invalid)
        elif option == 3:
            for _ in EXPORTS:
                self.say(3, 2)
            self.say(3, 1)
        elif option == 5:
            self.say(5, 1 << 31 | 2)
        elif option in {6, 7}:
            self.wishes(option, data, invalid)
        elif option == 8:
            self.structured = True
            self.say(8, 1)
        elif option in {9, 10}:
            self.contexts(option, data, invalid)
        else:
            self.say(option, 1 << 31 | 1)

    def wishes(self, option: int, data: bytes, invalid: int) -> None:
        size = int.from_bytes(data[:4])
        name, rest = data[4 : 4 + size], data[4 + size :]
        if len(data) < 6 or len(name) < size or len(rest) < 2 or not text(name):
            return self.say(option, invalid)
        if len(rest) != 2 + 2 * int.from_bytes(rest[:2]):
            return self.say(option, invalid)
        if name.decode() not in EXPORTS:
            return self.say(option, 1 << 31 | 6)
        wishes = set(struct.unpack(f">{len(rest) // 2 - 1}H", rest[2:]))
        for info in sorted({0} | wishes & {1, 2, 3}):
            self.say(option, 3, info)
        self.say(option, 1)
        if option == 7:
            self.export, self.over = name.decode(), True
        return None

    def contexts(self, option: int, data: bytes, invalid: int) -> None:
        if option == 10:
            self.context = None
        strings = []
        rest = data
        count = 1
        while count:
            size = int.from_bytes(rest[:4])
            if len(rest) < 4 + size or not text(rest[4 : 4 + size]):
                return self.say(option, invalid)
            strings.append(rest[4 : 4 + size].decode())
            rest = rest[4 + size :]
            count -= 1
            if len(strings) == 1:
                if len(rest) < 4:
                    return self.say(option, invalid)
                count, rest = int.from_bytes(rest[:4]), rest[4:]
        if rest or not self.structured:
            return self.say(option, invalid)
        name, *queries = strings
        if name not in EXPORTS:
            return self.say(option, 1 << 31 | 6)
        listed = option == 9 and (not queries or "base:" in queries)
        if "base:allocation" in queries or listed:
            self.say(option, 4)
            if option == 10:
                self.context = name
        return self.say(option, 1)


def text(data: bytes) -> bool:
    try:
        data.decode()
    except ValueError:
        return False
    return len(data) <= LONGEST and 0 not in data


def parse_replies(answer: bytes) -> list[tuple[int, int, int]]:
    found = []
    while answer:
        magic, option, kind, length = struct.unpack_from(">QIII", answer)
        if magic != 0x3E889045565A9 or len(answer) < 20 + length or length > 8300:
            raise AssertionError("a malformed reply")
        info = int.from_bytes(answer[20:22]) if kind == 3 else -1
        found.append((option, kind, info))
        answer = answer[20 + length :]
    return found


def one_stream(stream: bytes, size: int) -> bool:
    """Whether it came to the end. Raises on a bug."""
    from vhdx.errors import ProtocolError
    from vhdx.front.nbd import ExportTerms, Handshake

    terms = {name: ExportTerms(name, *rest) for name, rest in EXPORTS.items()}
    machine, expected = Handshake(terms.get, lambda: terms), Session(stream)
    try:
        expected.run()
        dropped = False
    except Dropped:
        dropped = True
    answer, sent = bytearray(), 0
    try:
        while sent < len(stream) and machine.negotiated is None and not machine.finished:
            got = b"".join(machine.receive(stream[sent : sent + size]))
            sent = min(sent + size, len(stream))
            answer += got
            if len(machine._input) > MOST_BYTES + 16 + size:
                raise AssertionError("it hoards what it receives")
    except ProtocolError:
        if not dropped:
            raise AssertionError("it drops a good client") from None
        return False
    if dropped:
        raise AssertionError("it did not drop the client")
    chosen = machine.negotiated
    if chosen is not None and expected.by_name:
        flags = int.from_bytes(stream[:4])
        del answer[len(answer) - (10 if flags & 2 else 134) :]  # no option reply
    compare(machine.finished, chosen, expected)
    if parse_replies(bytes(answer)) != expected.replies:
        raise AssertionError(f"{parse_replies(bytes(answer))} is not {expected.replies}")
    if chosen is not None and chosen.early != stream[expected.at : sent]:
        raise AssertionError("bytes after the handshake were lost or changed")
    return expected.over


def compare(finished: bool, chosen: Negotiated | None, expected: Session) -> None:
    """The state that was agreed on must be the expected one."""
    if finished != (expected.over and expected.export is None):
        raise AssertionError("it ended, or did not")
    if (chosen is None) != (expected.export is None):
        raise AssertionError("it went on to the transmission phase, or did not")
    if chosen is None:
        return
    context = expected.structured and expected.context == expected.export
    if (chosen.export, chosen.structured) != (expected.export, expected.structured):
        raise AssertionError("another export, or another form of replies")
    if (chosen.context_id is not None) != context:
        raise AssertionError("base:allocation was chosen, or was not")


def fuzz_handshake(seconds: float, seed: int) -> int:
    """Rounds done; raises on a bug."""
    rng, rounds, done = random.Random(seed), 0, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stream = option_stream(rng)
        if rng.random() < 0.3:
            stream += rng.randbytes(rng.randrange(40))
        size = rng.choice([1, 7, 100, len(stream) + 1])
        try:
            done += one_stream(stream, size)
        except Exception:
            print(f"round {rounds} of seed {seed}: {stream.hex()}, {size} at a time")
            raise
        rounds += 1
    print(f"handshake: {rounds} streams, {done} of them to the end")
    return rounds
