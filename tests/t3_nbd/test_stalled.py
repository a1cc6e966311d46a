# SPDX-License-Identifier: MIT
"""Clients that stall cost themselves only: others go on, and memory stays within its limit."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vhdx
from tests.t3_nbd.client import Client
from vhdx.units import MIB

LARGEST = 32 * MIB
DF = 4
VHDX = Path(sys.executable).with_name("vhdx")


def start_vhdx(directory, socket_path):
    image = directory / "a.vhdx"
    vhdx.create(image, 256 * MIB, block_size=MIB)
    with vhdx.open(image, "r+") as disk:
        disk.pwrite(b"d" * (64 * MIB), 0)
    listen = f"nbd+unix:///?socket={socket_path}"
    return subprocess.Popen(
        [VHDX, "serve", f"={image}", "--listen", listen], stdout=subprocess.DEVNULL
    )


def raw_disk(directory):
    raw = directory / "a.raw"
    with raw.open("wb") as file:
        file.truncate(256 * MIB)
        file.write(b"d" * (64 * MIB))
    return raw


def start_nbdkit(directory, socket_path):
    raw = raw_disk(directory)
    return subprocess.Popen(["nbdkit", "-f", "-U", socket_path, "file", raw])


def start_qemu_nbd(directory, socket_path):
    raw = raw_disk(directory)
    return subprocess.Popen(["qemu-nbd", "-t", "-e", "0", "-f", "raw", "-k", socket_path, raw])


SERVERS = {"vhdx": start_vhdx, "nbdkit": start_nbdkit, "qemu-nbd": start_qemu_nbd}


@pytest.fixture(params=SERVERS)
def server(request, fast_path, peer):
    """Path of the socket of a server, and its process."""
    if request.param != "vhdx":
        peer(request.param)
    path = fast_path / "s"
    process = SERVERS[request.param](fast_path, path)
    try:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.02)
        yield path, process
    finally:
        process.kill()
        process.wait()


def connect(path, *, structured=True) -> Client:
    return Client(str(path), structured=structured, status=False)


def half_header(path):
    client = connect(path)
    client.socket.sendall(struct.pack(">IHH", 0x25609513, 0, 1))
    return client


def header_without_payload(path):
    client = connect(path)
    client.send(1, length=LARGEST)
    return client


def half_payload(path):
    client = connect(path)
    client.send(1, offset=64 * MIB, length=LARGEST)
    client.socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        client.socket.send(bytes(3 * MIB))
    return client


def unread_replies(path):
    client = connect(path)
    for cookie in range(8):
        client.send(0, cookie=cookie, length=LARGEST)
    return client


def unread_whole_replies(path):
    client = connect(path)
    for cookie in range(4):
        client.send(0, cookie=cookie, length=LARGEST, flags=DF)
    return client


def unread_simple_replies(path):
    client = connect(path, structured=False)
    for cookie in range(4):
        client.send(0, cookie=cookie, length=LARGEST)
    return client


def unread_small_replies(path):
    client = connect(path)
    client.socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for cookie in range(5000):
            client.send(0, cookie=cookie, length=4096)
    return client


def silence(path):
    return connect(path)


def silent_handshake(path):
    return Client(str(path), go=False)


KINDS = [
    half_header,
    header_without_payload,
    half_payload,
    unread_replies,
    unread_whole_replies,
    unread_simple_replies,
    unread_small_replies,
    silence,
    silent_handshake,
]


def resident(process) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the process is gone")


def work(client, count=50):
    """Milliseconds of each of some reads and writes."""
    times = []
    for n in range(count):
        start = time.monotonic()
        at = 128 * MIB + n * 4096
        error, _ = client.ask(1, offset=at, payload=bytes([n % 255 + 1]) * 4096)
        assert error == 0
        assert client.read(at, 4096) == bytes([n % 255 + 1]) * 4096
        times.append((time.monotonic() - start) * 500)
    return times


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_client_goes_on_beside_stalled_ones(server, kind):
    path, process = server
    if process.args[0] == "nbdkit" and kind.__name__.startswith("unread"):
        pytest.skip("nbdkit 1.32 ends with a failed assertion when such clients leave")
    before = resident(process)
    stalled = [kind(path) for _ in range(16)]
    time.sleep(0.3)
    good = connect(path)
    # A READ that must be answered as a whole waits until enough of those in its way are cut off: four
    # at a time, each time after five seconds.
    good.socket.settimeout(60)
    work(good)
    assert good.read(0, 8 * MIB) == b"d" * (8 * MIB)
    assert good.ask(1, offset=160 * MIB, payload=b"w" * (4 * MIB))[0] == 0
    assert good.read(160 * MIB, 4 * MIB, flags=DF) == b"w" * (4 * MIB)
    if process.args[0] == VHDX:
        assert resident(process) - before < 512 * MIB
    for client in stalled:
        client.close()
    work(good)
    good.close()


@pytest.mark.parametrize("server", ["vhdx"], indirect=True)
@pytest.mark.soak
def test_latency_beside_64_stalled_clients_of_each_kind(server):
    path, process = server
    good = connect(path)
    work(good, 500)
    quiet = statistics.quantiles(work(good, 3000), n=100)[98]
    for kind in KINDS:
        stalled = [kind(path) for _ in range(64)]
        time.sleep(0.5)
        beside = statistics.quantiles(work(good, 3000), n=100)[98]
        print(
            f"{kind.__name__}: p99 {beside:.3f} ms, quiet {quiet:.3f} ms "
            f"({beside / quiet:.2f} times), peak {resident(process) >> 20} MiB"
        )
        for client in stalled:
            client.close()
        time.sleep(0.5)


@pytest.mark.parametrize("server", ["vhdx"], indirect=True)
def test_no_more_is_read_than_is_about_to_be_sent(server):
    """A READ is no reason to hold all of it in memory: its pieces are read as they leave."""
    path, process = server
    good = connect(path)
    assert good.read(0, 8 * MIB) == b"d" * (8 * MIB)
    before = resident(process)
    stalled = [connect(path) for _ in range(16)]
    for client in stalled:
        client.send(0, length=LARGEST)
    time.sleep(0.5)
    assert resident(process) - before < 16 * 6 * MIB  # of the 512 MiB that are asked for
    for client in stalled:
        _, error, chunks = client.reply()
        assert error == 0
        assert {body[8:] for _, body in chunks} == {b"d" * MIB}
        assert sum(len(body) - 8 for _, body in chunks) == LARGEST
        client.close()
    good.close()


def test_requests_before_any_reply_is_read(server):
    """8 READs and 8 WRITEs of 32 MiB are sent before the first reply is taken."""
    path, _ = server
    client = connect(path)
    client.socket.settimeout(60)
    payload = os.urandom(MIB) * 32
    for n in range(8):
        client.send(0, cookie=n, offset=0, length=LARGEST)
        client.send(1, cookie=8 + n, offset=128 * MIB, length=LARGEST, payload=payload)
    waiting = dict.fromkeys(range(16), 0)
    got: dict[int, int] = {}
    while waiting:
        (magic,) = struct.unpack(">I", client.take(4))
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", client.take(12))
            assert error == 0
            del waiting[cookie]
            continue
        flags, kind, cookie, length = struct.unpack(">HHQI", client.take(16))
        assert kind < 1 << 15
        body = client.take(length)
        got[cookie] = got.get(cookie, 0) + (length - 8 if kind == 1 else 0)
        if kind == 2:
            got[cookie] += struct.unpack_from(">I", body, 8)[0]
        if flags & 1:
            del waiting[cookie]
    assert all(got[n] == LARGEST for n in range(8))
    for at in range(0, LARGEST, 8 * MIB):
        assert client.read(128 * MIB + at, 8 * MIB) == payload[: 8 * MIB]


@pytest.mark.parametrize("server", ["vhdx"], indirect=True)
def test_who_stands_in_the_way_is_cut_off(server):
    """Whole replies that nobody reads hold all memory that is shared; one that needs it gets it."""
    path, _ = server
    stalled = [unread_whole_replies(path) for _ in range(8)]
    time.sleep(0.5)
    good = connect(path)
    good.socket.settimeout(60)
    for _ in range(3):
        assert good.read(0, LARGEST, flags=DF) == b"d" * LARGEST
    gone = 0
    for client in stalled:
        client.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while client.socket.recv(1 << 20):
                pass
            gone += 1
    assert 0 < gone < 8


@pytest.mark.parametrize("fua", [False, True])
def test_a_large_write_that_fails_half_way_is_one_error(tmp_path, fua, monkeypatch):
    """What arrived before is old or new; the rest is thrown away; the connection goes on."""
    image = tmp_path / "a.vhdx"
    vhdx.create(image, 64 * MIB, block_size=MIB)
    with vhdx.serve({"a": image}) as server:
        client = Client(server.socket_path, "a", status=False)
        disk = server.exports()["a"]
        space = disk._image.engine.allocator._space

        def full(*_):
            raise vhdx.NoSpaceError("injected", path=image)

        assert client.ask(1, offset=0, payload=b"1" * MIB)[0] == 0
        disk._image.engine.allocator.take_back_grants()
        monkeypatch.setattr(space, "prepare", full)
        error, _ = client.ask(1, offset=32 * MIB, payload=b"2" * (16 * MIB), flags=1 if fua else 0)
        assert error == 28
        monkeypatch.undo()
        assert (
            client.ask(1, offset=32 * MIB, payload=b"3" * (16 * MIB), flags=1 if fua else 0)[0] == 0
        )
        assert client.read(32 * MIB, 16 * MIB) == b"3" * (16 * MIB)
        client.close()


def test_a_client_that_leaves_in_the_middle_of_a_write(server):
    path, _ = server
    for _ in range(5):
        half_payload(path).close()
        header_without_payload(path).close()
    good = connect(path)
    work(good)
    good.close()


@pytest.mark.parametrize("server", ["vhdx"], indirect=True)
def test_it_ends_beside_stalled_clients(server):
    path, process = server
    stalled = [kind(path) for kind in KINDS]
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert vhdx.check(path.parent / "a.vhdx").errors == 0
    for client in stalled:
        client.close()


# ---- a socket that was handed over ----


def handed_over(directory, count: int, program: list) -> subprocess.Popen:
    """Runs a program with listening sockets from descriptor 3 on."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "handed"))
    listener.listen()
    code = (
        "import os, sys\n"
        "fd, count = int(sys.argv[1]), int(sys.argv[2])\n"
        "for n in range(count): os.dup2(fd, 3 + n)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count))\n"
        "os.execv(sys.argv[3], sys.argv[3:])\n"
    )
    with listener:
        listener.set_inheritable(True)
        command = [sys.executable, "-c", code, str(listener.fileno()), str(count), *program]
        return subprocess.Popen(
            command, close_fds=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def test_one_socket_that_is_handed_over_is_taken(tmp_path):
    image = tmp_path / "a.vhdx"
    vhdx.create(image, 8 * MIB)
    process = handed_over(tmp_path, 1, [VHDX, "serve", image])
    client = Client(str(tmp_path / "handed"), "a")
    assert client.read(0, 512) == bytes(512)
    client.close()
    process.terminate()
    assert process.wait(30) == 0
    assert (tmp_path / "handed").exists()  # whoever made it removes it
    assert process.communicate() == ("", "")


def test_several_sockets_are_refused(tmp_path):
    image = tmp_path / "a.vhdx"
    vhdx.create(image, 8 * MIB)
    process = handed_over(tmp_path, 2, [VHDX, "serve", image])
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "2 sockets were handed over" in error
    other = tmp_path / "other"
    other.mkdir()
    process = handed_over(other, 1, [VHDX, "serve", image, "--listen", "nbd://127.0.0.1:0"])
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "--listen" in error


def test_nbdinfo_starts_it(tmp_path, peer):
    peer("nbdinfo")
    image = tmp_path / "a.vhdx"
    vhdx.create(image, 8 * MIB)
    command = ["nbdinfo", "--size", "--", "[", VHDX, "serve", image, "]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(8 * MIB), done.stderr
