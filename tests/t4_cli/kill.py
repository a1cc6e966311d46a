# SPDX-License-Identifier: MIT
"""SIGKILL of a server under writers: everything that a completed flush covered is there."""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import time

import vhdx
from tests.t3_nbd.client import Client

WRITE, FLUSH = 1, 3
SECTOR = 512


def kill_under_writers(image, start, rounds: int) -> None:
    """Writers note, sector by sector, what a flush covered and what came after it."""
    durable: dict[int, bytes] = {}
    since: dict[int, list[bytes]] = {}
    lock = threading.Lock()

    def work(path: str, number: int, seed: int) -> None:
        rng = random.Random(seed)
        mine: dict[int, bytes] = {}
        with contextlib.suppress(EOFError, OSError):
            client = Client(path)
            for n in range(100_000):
                at = (rng.randrange(32 * 1024) * 4 + number) * SECTOR
                data = struct.pack("<QQ", seed, n) * (SECTOR // 16)
                with lock:
                    since.setdefault(at, []).append(data)
                assert client.ask(WRITE, offset=at, payload=data)[0] == 0
                mine[at] = data
                if n % 16 == 15:
                    assert client.ask(FLUSH)[0] == 0
                    with lock:
                        for each, content in mine.items():
                            durable[each] = content
                            since[each] = since[each][since[each].index(content) + 1 :]
                    mine.clear()

    for round_number in range(rounds):
        server, uri = start(image)
        path = uri.partition("socket=")[2]
        threads = [
            threading.Thread(target=work, args=(path, n, round_number * 4 + n)) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(random.Random(round_number).uniform(0.05, 0.4))
        server.kill()
        server.communicate()
        for thread in threads:
            thread.join()
        with vhdx.open(image, "r+" if round_number % 2 else "r") as disk:
            for at in since.keys() | durable.keys():
                found = disk.pread(SECTOR, at)
                allowed = [durable.get(at, bytes(SECTOR)), *since.get(at, [])]
                assert found in allowed, (round_number, at)
                durable[at], since[at] = found, []
