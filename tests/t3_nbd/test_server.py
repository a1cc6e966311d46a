# SPDX-License-Identifier: MIT
"""The server against raw requests, hostile clients, and an end under load."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

import vhdx
from tests.t3_nbd.client import Client
from vhdx import plane
from vhdx.front.nbd import handshake as h
from vhdx.host import Limits
from vhdx.units import MIB

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST = 1, 2, 4, 8, 16
EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28
SIZE = 64 * MIB


@pytest.fixture
def image(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, SIZE, block_size=MIB)
    return path


@pytest.fixture
def server(image):
    with vhdx.serve({"disk": image}) as server:
        yield server


@pytest.fixture
def client(server):
    client = Client(server.socket_path, "disk")
    yield client
    client.close()


@pytest.mark.parametrize("structured", [True, False])
def test_requests_against_a_bytearray(server, structured):
    client = Client(server.socket_path, "disk", structured=structured)
    oracle, rng = bytearray(SIZE), random.Random(1)
    for _ in range(300):
        offset = rng.randrange(SIZE)
        length = min(rng.choice([1, 512, 4096, 65536, 65537, 300_000, 3 * MIB]), SIZE - offset)
        fua = FUA if rng.random() < 0.1 else 0
        choice = rng.randrange(8)
        if choice < 3:
            data = rng.randbytes(length)
            assert client.ask(WRITE, offset=offset, payload=data, flags=fua)[0] == 0
            oracle[offset : offset + length] = data
        elif choice == 3:
            flags = fua | (NO_HOLE if rng.random() < 0.5 else 0)
            assert client.ask(ZEROES, offset=offset, length=length, flags=flags)[0] == 0
            oracle[offset : offset + length] = bytes(length)
        elif choice == 4:
            assert client.ask(TRIM, offset=offset, length=length, flags=fua)[0] == 0
            oracle[offset : offset + length] = client.read(offset, length)
        elif choice == 5:
            assert client.ask(FLUSH)[0] == 0
        else:
            flags = fua | (DF if structured and rng.random() < 0.5 else 0)
            assert client.read(offset, length, flags) == oracle[offset : offset + length]
    client.close()


def test_holes_are_sent_as_holes(client):
    client.ask(WRITE, offset=MIB, payload=b"x" * 4096)
    _, chunks = client.ask(READ, offset=4 * MIB, length=4096)
    assert [(kind, len(body)) for kind, body in chunks] == [(2, 12)]
    _, chunks = client.ask(READ, offset=0, length=3 * MIB)
    assert [kind for kind, _ in chunks] == [2, 1, 2]
    assert sum(struct.unpack_from(">QI", body)[1] for kind, body in chunks if kind == 2) == 2 * MIB
    _, chunks = client.ask(READ, offset=0, length=3 * MIB, flags=DF)
    assert [kind for kind, _ in chunks] == [1]


def test_block_status(client):
    client.ask(WRITE, offset=2 * MIB, payload=b"x" * 4096)
    client.ask(ZEROES, offset=8 * MIB, length=MIB)

    def status(flags=0, **fields):
        error, chunks = client.ask(STATUS, flags=flags, **fields)
        if error:
            return error
        ((kind, body),) = chunks
        assert kind == 5
        assert struct.unpack_from(">I", body) == (1,)
        return list(struct.iter_unpack(">II", body[4:]))

    assert status(offset=0, length=4 * MIB) == [(2 * MIB, 3), (MIB, 0), (MIB, 3)]
    assert status(REQ_ONE, offset=0, length=4 * MIB) == [(2 * MIB, 3)]
    assert status(offset=2 * MIB + 5, length=10) == [(10, 0)]
    assert status(offset=3 * MIB, length=SIZE - 3 * MIB) == [(SIZE - 3 * MIB, 3)]
    assert status(offset=SIZE, length=1) == EINVAL
    assert status(offset=0, length=0) == EINVAL


@pytest.mark.parametrize(
    ("command", "fields", "error"),
    [
        (READ, {"offset": SIZE, "length": 1}, EINVAL),
        (READ, {"offset": (1 << 64) - 1, "length": 2}, EINVAL),
        (READ, {"offset": 0, "length": (32 << 20) + 1}, EINVAL),
        (READ, {"offset": 0, "length": 1, "flags": NO_HOLE}, EINVAL),
        (WRITE, {"offset": SIZE - 1, "payload": b"xy"}, ENOSPC),
        (WRITE, {"offset": 0, "payload": b"xy", "flags": DF}, EINVAL),
        (ZEROES, {"offset": SIZE, "length": 1}, ENOSPC),
        (TRIM, {"offset": SIZE, "length": 1}, EINVAL),
        (CACHE, {"offset": SIZE, "length": 1}, EINVAL),
        (8, {}, EINVAL),
        (99, {"length": 1 << 31}, EINVAL),
    ],
)
def test_refused_requests_leave_the_connection_alive(client, command, fields, error):
    assert client.ask(command, **fields)[0] == error
    assert client.ask(WRITE, offset=7, payload=b"still here")[0] == 0
    assert client.read(7, 10) == b"still here"


def test_zero_length(client):
    assert client.ask(READ, offset=5, length=0) == (0, [(0, b"")])
    assert client.ask(WRITE, offset=SIZE)[0] == 0
    assert client.ask(WRITE, offset=SIZE, flags=FUA)[0] == 0
    assert client.ask(TRIM)[0] == 0


def test_oversized_write_is_consumed_and_refused(client):
    size = (32 << 20) + 5
    client.send(WRITE, length=size)
    piece = bytes(1 << 20)
    sent = 0
    while sent < size:
        client.socket.sendall(piece[: size - sent])
        sent += min(len(piece), size - sent)
    assert client.reply()[1] == EINVAL
    assert client.read(0, 4) == bytes(4)


def test_read_only_server(image):
    with vhdx.serve({"disk": image}, read_only=True) as server:
        client = Client(server.socket_path, "disk")
        assert client.ask(WRITE, payload=b"x")[0] == EPERM
        assert client.ask(ZEROES, length=1)[0] == EPERM
        assert client.ask(TRIM, length=1)[0] == EPERM
        assert client.ask(FLUSH)[0] == 0
        client.close()


def test_disk_object_is_coherent_and_cannot_be_closed_while_served(image):
    with vhdx.open(image, "r+") as disk:
        with vhdx.serve({"disk": disk}) as server:
            client = Client(server.socket_path, "")
            disk.pwrite(b"from Python", 100)
            assert client.read(100, 11) == b"from Python"
            client.ask(WRITE, offset=100, payload=b"from client")
            assert disk.pread(11, 100) == b"from client"
            with pytest.raises(vhdx.InUseError, match="still serves"):
                disk.close()
            client.close()
        assert disk.pread(11, 100) == b"from client"


def timer_of(addresses):
    """The timer of a connection: 01 while something is not acknowledged."""
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return next(line.split()[5][:2] for line in lines if addresses in line)


def test_many_exports_and_tcp(image, fast_path):
    other = fast_path / "other.raw"
    other.write_bytes(b"raw bytes" + bytes(4096 - 9))
    with vhdx.serve({"a": image, "b": other}, listen="nbd://127.0.0.1:0") as server:
        assert list(server.uris) == ["a", "b"]
        assert server.uri.startswith("nbd://127.0.0.1:")
        assert server.socket_path is None
        port = int(server.uri.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as s:
            assert s.recv(8) == b"NBDMAGIC"
            ours = f"0100007F:{port:04X} 0100007F:{s.getsockname()[1]:04X}"
            deadline = time.monotonic() + 10
            while (timer := timer_of(ours)) == "01" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert timer == "02"  # keep-alive's
    with vhdx.serve({"a": image, "b": other}) as server:
        client = Client(server.socket_path, "b")
        assert client.read(0, 9) == b"raw bytes"
        client.close()


# ---- hostile clients ----


def test_bad_magic_drops_that_connection_alone(server, client):
    bad = Client(server.socket_path, "disk")
    bad.socket.sendall(b"\0" * 28)
    with pytest.raises(EOFError):
        bad.take(1)
    assert client.read(0, 4) == bytes(4)


def test_half_a_request_and_silence_hold_nobody(server, client):
    silent = [Client(server.socket_path, "disk") for _ in range(5)]
    for each in silent:
        each.socket.sendall(b"\x25\x60\x95\x13\0\0")
    writing = Client(server.socket_path, "disk")
    writing.send(WRITE, length=1 << 20, payload=b"half")
    for _ in range(50):
        assert client.read(0, 4096) == bytes(4096)
    for each in [*silent, writing]:
        each.close()
    assert client.read(0, 4) == bytes(4)


def test_disconnect_in_the_middle_of_everything(server, client):
    rng = random.Random(2)
    for _ in range(60):
        with contextlib.suppress(OSError, EOFError):
            other = Client(server.socket_path, "disk", go=rng.random() < 0.9)
            for _ in range(rng.randrange(8)):
                other.send(rng.randrange(8), length=rng.choice([0, 512, 70000]), payload=b"x" * 300)
            if rng.random() < 0.5:
                other.socket.shutdown(socket.SHUT_WR)
            other.close()
    assert client.ask(FLUSH)[0] == 0
    for _ in range(200):
        if server.connections == 1:
            break
        time.sleep(0.02)
    assert server.connections == 1


def test_client_that_never_reads_is_not_fed_without_end(server, client):
    greedy = Client(server.socket_path, "disk")
    client.ask(WRITE, payload=b"d" * MIB)
    greedy.socket.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError, BlockingIOError):
        for _ in range(200_000):
            greedy.send(READ, length=MIB)
            sent += 1
    assert server.session.pool.bytes_waiting <= 65 * MIB
    assert client.read(0, 4) == b"dddd"
    greedy.close()


def test_everything_sent_before_the_end_is_answered(server):
    """Requests, a WRITE, DISC and half-close in one go, replies read late."""
    client = Client(server.socket_path, "disk")
    client.ask(WRITE, payload=b"d" * MIB)
    requests = b"".join(struct.pack(">IHHQQI", 0x25609513, 0, READ, n, 0, 65536) for n in range(1500))
    write = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 9999, MIB, 5) + b"last!"
    disconnect = struct.pack(">IHHQQI", 0x25609513, 0, DISC, 0, 0, 0)
    sender = threading.Thread(target=lambda: client.socket.sendall(requests + write + disconnect))
    sender.start()
    time.sleep(0.5)
    cookies = [client.reply()[0] for _ in range(1501)]
    sender.join()
    assert sorted(cookies) == [*range(1500), 9999]
    with pytest.raises(EOFError):
        client.take(1)
    with contextlib.closing(Client(server.socket_path, "disk")) as other:
        assert other.read(MIB, 5) == b"last!"


def test_limits_of_connections_and_handshakes(image):
    limits = Limits(connections=3, handshake_seconds=0.3)
    with vhdx.serve({"disk": image}, limits=limits) as server:
        clients = [Client(server.socket_path, "disk") for _ in range(3)]
        with pytest.raises((EOFError, ConnectionError)):
            Client(server.socket_path, "disk")
        clients.pop().close()
        for _ in range(100):
            if server.connections == 2:
                break
            time.sleep(0.02)
        slow = Client(server.socket_path, go=False)
        slow.socket.sendall(b"IHAVE")
        with pytest.raises((EOFError, ConnectionError)):
            slow.take(1)
        assert clients[0].read(0, 1) == b"\0"
        for each in clients:
            each.close()


def test_huge_option_drops(server):
    client = Client(server.socket_path, go=False)
    client.socket.sendall(b"IHAVEOPT" + struct.pack(">II", h.GO, 0xFFFFFFFF))
    with pytest.raises((EOFError, ConnectionError)):
        client.take(1)


# ---- what is slow holds up nothing else ----


def held(image):
    """The image served through a device that can be told to be slow."""
    pool = plane.Pool(threads=8)
    disk = vhdx.open(image, "r+")
    slow = plane.Injector(disk._device, pool)
    disk._device = slow
    return disk, slow


def test_parked_requests_do_not_hold_up_the_others(image):
    disk, slow = held(image)
    with disk, vhdx.serve({"disk": disk}) as server:
        client = Client(server.socket_path, "disk")
        client.read(0, 4096)  # loaded: the following reads need no fault
        slow.set(park=[plane.Operation.FLUSH], park_ns=300_000_000)
        client.send(FLUSH, cookie=1)
        for cookie in range(2, 50):
            client.send(READ, cookie=cookie, length=4096)
        order = [client.reply()[0] for _ in range(49)]
        assert order == [*range(2, 50), 1]
        client.close()


def test_delayed_replies_leave_in_their_time(image):
    disk, slow = held(image)
    with disk, vhdx.serve({"disk": disk}) as server:
        client = Client(server.socket_path, "disk")
        slow.set(delay=[plane.Operation.READ], delay_ns=50_000_000)
        began = time.monotonic()
        client.send(READ, cookie=1, length=512)
        client.send(FLUSH, cookie=2)
        assert [client.reply()[0], client.reply()[0]] == [2, 1]
        assert time.monotonic() - began >= 0.05
        client.close()


def test_failed_flush_is_an_error_from_then_on(image):
    disk, slow = held(image)
    with disk, vhdx.serve({"disk": disk}) as server:
        client = Client(server.socket_path, "disk")
        slow.set(fail=[plane.Operation.FLUSH])
        assert client.ask(FLUSH)[0] == EIO
        slow.set()
        assert client.ask(FLUSH)[0] == EIO
        assert client.ask(READ, length=1)[0] == EIO
        client.close()
        disk._device = slow = None
        with pytest.raises(vhdx.PoisonedError):
            server.close()


# ---- the end ----


def test_end_under_load_loses_nothing_that_was_flushed(image):
    server = vhdx.serve({"disk": image})
    done, stop = [], threading.Event()

    def work(number):
        client = Client(server.socket_path, "disk")
        with contextlib.suppress(EOFError, OSError):
            for n in range(10_000):
                offset = (number * 16 + n % 16) * MIB + n // 16 * 512
                data = struct.pack(">QQ", number, n) * 32
                if client.ask(WRITE, offset=offset, payload=data)[0]:
                    break
                if n % 8 == 7:
                    if client.ask(FLUSH)[0]:
                        break
                    done.append((offset, data))
        client.close()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    server.close()
    stop.set()
    for thread in threads:
        thread.join()
    assert len(done) > 4
    with vhdx.open(image) as disk:
        assert not disk.describe()["log_dirty"]
        for offset, data in done:
            assert disk.pread(len(data), offset) == data


def test_socket_of_a_dead_server_is_taken_over_and_of_a_living_one_refused(image, fast_path):
    path = fast_path / "s.sock"
    uri = f"nbd+unix:///?socket={path}"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with vhdx.serve({"disk": image}, listen=uri) as server:
        other = fast_path / "other.vhdx"
        vhdx.create(other, MIB)
        with pytest.raises(vhdx.InUseError, match="another server listens"):
            vhdx.serve({"disk": other}, listen=uri)
        client = Client(server.socket_path, "disk")
        assert client.read(0, 1) == b"\0"
        client.close()
    assert not path.exists()
    vhdx.open(image, "r+").close()


@pytest.mark.parametrize(
    "uri",
    [
        "http://x",
        "nbd+unix:///",
        "nbd+unix:///name?socket=/tmp/x",
        "nbd+unix:///?socket=/tmp/x&other=1",
        "nbd://",
        "nbd://host:99999",
        "nbd://host/name",
        "nbd+unix:///?socket=" + "x" * 200,
    ],
)
def test_bad_addresses(image, uri):
    with pytest.raises(vhdx.InvalidArgumentError):
        vhdx.serve({"disk": image}, listen=uri)
    vhdx.open(image, "r+").close()
