# SPDX-License-Identifier: MIT
"""Chains: reading through ten layers against a flat image; first writes after a snapshot.

Conditions: Python API, one thread, random 4 KiB, images on tmpfs, page cache warm. Each of the ten
layers holds a tenth of the blocks, half of them sector by sector. First writes go to blocks of the
parent, against overwrites of the same places just before; with a spinning Python thread, too.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vhdx
from bench.conditions import Places, work_directory
from vhdx import plane

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20
BLOCK = 2 * MIB
LAYERS = 10


def _flat(path: Path, size: int, data: bytes) -> None:
    vhdx.create(path, size, block_size=BLOCK)
    with vhdx.open(path, "r+") as disk:
        for offset in range(0, size, BLOCK):
            disk.pwrite(data, offset)


def _chain(path: Path, size: int, data: bytes) -> None:
    vhdx.create(path, size, block_size=BLOCK)
    blocks = list(range(size // BLOCK))
    random.Random(1).shuffle(blocks)
    share = len(blocks) // LAYERS
    with vhdx.open(path, "r+") as disk:
        for layer in range(LAYERS):
            for number, block in enumerate(blocks[layer * share : (layer + 1) * share]):
                if layer == 0 or number % 2 == 0:
                    disk.pwrite(data, block * BLOCK)
                    continue
                for within in range(0, BLOCK, 8192):
                    disk.pwrite(data[:4096], block * BLOCK + within)
            if layer < LAYERS - 1:
                disk.snapshot(path.with_name(f"layer{layer}.vhdx"))


def _reads(path: Path, size: int, count: int) -> float:
    rng = random.Random(5)
    offsets = [rng.randrange(size // 4096) * 4096 for _ in range(count)]
    buffer = bytearray(4096)
    with vhdx.open(path) as disk:
        for offset in offsets[: count // 10]:
            disk.preadinto(buffer, offset)
        began = time.perf_counter()
        for offset in offsets:
            disk.preadinto(buffer, offset)
        return count / (time.perf_counter() - began)


def _writes(disk: vhdx.Disk, offsets: Sequence[int]) -> float:
    data = b"z" * 4096
    began = time.perf_counter()
    for offset in offsets:
        disk.pwrite(data, offset)
    return len(offsets) / (time.perf_counter() - began)


def _first_writes(path: Path, size: int, rounds: int, name: str) -> list[tuple[float, float]]:
    found = []
    for number in range(rounds):
        with vhdx.open(path, "r+") as disk:
            offsets = random.Random(number).sample(range(0, size, 4096), size // 4096 // 8)
            over = _writes(disk, offsets)
            disk.snapshot(path.with_name(f"{name}{number}.vhdx"))
            found.append((over, _writes(disk, offsets)))
    return found


def _row(name: str, base: list[float], ours: list[float]) -> dict[str, Any]:
    ratios = [b / a for a, b in zip(base, ours, strict=True)]
    return {
        "what": name,
        "against": statistics.median(base),
        "per second": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "greatest": max(ratios),
    }


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """The report."""
    size, rounds, count = (128 * MIB, 2, 50_000) if quick else (512 * MIB, 5, 200_000)
    data = os.urandom(BLOCK)
    with work_directory(places.fast) as work:
        flat, chain = work / "flat.vhdx", work / "chain.vhdx"
        _flat(flat, size, data)
        _chain(chain, size, data)
        reads = [(_reads(flat, size, count), _reads(chain, size, count)) for _ in range(rounds)]
        quiet = _first_writes(flat, size, rounds, "quiet")
        stop = threading.Event()

        def spin() -> None:
            number = 0
            while not stop.is_set():
                number += 1

        spinner = threading.Thread(target=spin, daemon=True)
        spinner.start()
        try:
            with plane.serving():
                spinning = _first_writes(flat, size, rounds, "spinning")
        finally:
            stop.set()
            spinner.join()
    measured = {
        "reads through ten layers, against a flat image": reads,
        "first writes after a snapshot, against overwrites": quiet,
        "the same with a spinning thread": spinning,
    }
    rows = [
        _row(name, [base for base, _ in pairs], [ours for _, ours in pairs])
        for name, pairs in measured.items()
    ]
    return {"chains": rows}
