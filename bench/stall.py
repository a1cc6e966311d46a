# SPDX-License-Identifier: MIT
"""Reads that hit, while faults and flushes on the same connection are slow.

The server's flushes take 50 ms and its faults 1 s (injected). One client keeps 16 reads of a warm
range under way; in every other round it also flushes ten times a second and reads once a second
where a fault is needed. What not to conclude: absolute figures, the client is written in Python.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from typing import Any

import vhdx
from bench.conditions import (
    CLIENT_CPU,
    SERVER_CPU,
    Places,
    pinned,
    wait_for_socket,
    work_directory,
)
from vhdx import plane

DEPTH = 16
WARM = 64 << 20
GO, STRUCTURED_REPLY = 7, 8
READ, FLUSH = 0, 3
FLUSH_COOKIE, COLD_COOKIE = 1 << 32, 1 << 33


def serve(path: str, uri: str) -> None:
    """The server with what is slow injected."""
    disk = vhdx.open(path, "r+")
    engine = disk._image.engine  # type: ignore[attr-defined]
    load = engine.load

    def slow_load(first: int, count: int) -> None:
        if first * disk.block_size >= 1 << 30:
            time.sleep(1)
        load(first, count)

    engine.load = slow_load
    hold = plane.Injector(disk._device, plane.Pool())
    hold.set(park=[plane.Operation.FLUSH], park_ns=50_000_000)
    disk._device = hold
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with vhdx.serve({"": disk}, listen=uri):
        while not stop.wait(0.1):  # the signal may have gone to another thread
            pass
    os._exit(0)


class _Connection:
    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.buffer = bytearray()
        self.take(18)
        self.socket.sendall(struct.pack(">I", 3))
        for option, data in ((STRUCTURED_REPLY, b""), (GO, b"\0\0\0\0\0\0")):
            self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
            kind = 0
            while kind != 1:
                _, _, kind, length = struct.unpack(">QIII", self.take(20))
                self.take(length)

    def take(self, length: int) -> bytes:
        while len(self.buffer) < length:
            self.buffer += self.socket.recv(1 << 18)
        data = bytes(self.buffer[:length])
        del self.buffer[:length]
        return data

    def reply(self) -> int:
        head = self.take(16)
        if head[:4] == b"\x67\x44\x66\x98":
            return int(struct.unpack_from(">Q", head, 8)[0])
        (length,) = struct.unpack(">I", self.take(4))
        self.take(length)
        return int(struct.unpack_from(">Q", head, 8)[0])


def _request(command: int, cookie: int, offset: int, length: int) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, length)


def client(path: str, seconds: float, stalls: bool, first_cold: int) -> None:
    """Prints reads a second, and p50 and p99 in microseconds."""
    c = _Connection(path)
    sent: dict[int, float] = {}
    latencies: list[float] = []
    number = 0

    def read() -> None:
        nonlocal number
        number += 1
        sent[number] = time.perf_counter()
        c.socket.sendall(_request(READ, number, number * 4096 * 7919 % WARM, 4096))

    began = time.perf_counter()
    end, next_flush, next_cold, cold = began + seconds, began, began, first_cold
    for _ in range(DEPTH):
        read()
    while (now := time.perf_counter()) < end:
        if stalls and now >= next_flush:
            c.socket.sendall(_request(FLUSH, FLUSH_COOKIE, 0, 0))
            next_flush = now + 0.1
        if stalls and now >= next_cold:
            cold += 1
            c.socket.sendall(_request(READ, COLD_COOKIE, (1 << 30) + cold * (1 << 30), 4096))
            next_cold = now + 1
        cookie = c.reply()
        if cookie in sent:
            latencies.append(time.perf_counter() - sent.pop(cookie))
            read()
    latencies.sort()
    done = len(latencies)
    print(done / seconds, latencies[done // 2] * 1e6, latencies[done * 99 // 100] * 1e6)


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """Pairs of rounds, quiet and with stalls."""
    rounds, seconds = (2, 2.0) if quick else (5, 5.0)
    figures: dict[bool, list[list[float]]] = {False: [], True: []}
    with work_directory(places.fast) as work:
        image, path = work / "disk.vhdx", work / "s.sock"
        vhdx.create(image, 16 << 40, block_size=1 << 20)
        with vhdx.open(image, "r+") as opened:
            opened.pwrite(os.urandom(WARM), 0)
        me = [sys.executable, "-m", "bench.stall"]
        server = subprocess.Popen(
            pinned(SERVER_CPU, [*me, "serve", str(image), f"nbd+unix:///?socket={path}"])
        )
        try:
            wait_for_socket(path, server)
            for number in range(rounds):
                for stalls in (False, True):
                    command = [*me, "client", str(path), str(seconds), str(int(stalls))]
                    text = subprocess.run(
                        pinned(CLIENT_CPU, [*command, str(number * 100)]),
                        capture_output=True,
                        text=True,
                        check=True,
                    ).stdout
                    figures[stalls].append([float(each) for each in text.split()])
        finally:
            server.terminate()
            server.wait()
    rows = [
        {
            "round": "with 1 s faults and 50 ms flushes" if stalls else "quiet",
            "reads_s": statistics.median(each[0] for each in rounds_),
            "p50_us": statistics.median(each[1] for each in rounds_),
            "p99_us": statistics.median(each[2] for each in rounds_),
        }
        for stalls, rounds_ in figures.items()
    ]
    ratios = [b[0] / a[0] for a, b in zip(figures[False], figures[True], strict=True)]
    return {
        "reads that hit, QD16, one connection": rows,
        "throughput kept": f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
    }


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3])
    elif sys.argv[1] == "client":
        client(sys.argv[2], float(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5]))
