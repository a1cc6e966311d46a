# SPDX-License-Identifier: MIT
"""Conversions against qemu-img, compaction and merge against cp, all synced."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vhdx
from bench.conditions import (
    Places,
    back_free_memory,
    fill_with_random_data,
    median_ratio,
    require,
    work_directory,
)
from vhdx.units import GIB, MIB

BLOCK = 2 * MIB
_TOUCHED = 6 * GIB


def _timed(do: Callable[[], object], target: Path) -> float:
    """Seconds until ``target`` is made and durable."""
    os.sync()
    back_free_memory(_TOUCHED)
    began = time.monotonic()
    do()
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return time.monotonic() - began


def _qemu(source: Path, target: Path, to: str) -> None:
    kind = ["-o", "subformat=dynamic"] if to == "vhdx" else []
    formats = ["-f", "raw" if source.suffix == ".raw" else "vhdx", "-O", to]
    subprocess.run(["qemu-img", "convert", *formats, *kind, source, target], check=True)


def _conversions(sources: dict[str, tuple[Path, str]], rounds: int, work: Path) -> dict[str, Any]:
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        for name, (source, to) in sources.items():
            target = work / f"target.{to}"
            seconds = [0.0, 0.0]
            for which in (0, 1) if number % 2 else (1, 0):
                convert = (vhdx.convert, lambda a, b: _qemu(a, b, to))[which]  # noqa: B023
                seconds[which] = _timed(lambda: convert(source, target), target)  # noqa: B023
                target.unlink()
            found.setdefault(name, []).append((seconds[0], seconds[1]))
    report = {}
    for name, pairs in found.items():
        ratio, low, high = median_ratio([b for _, b in pairs], [a for a, _ in pairs])
        report[name] = [
            {
                "ours_s": statistics.median(a for a, _ in pairs),
                "qemu_img_s": statistics.median(b for _, b in pairs),
                "times_as_fast": ratio,
                "least": low,
                "greatest": high,
            }
        ]
    return report


def _moves(size: int, work: Path) -> dict[str, Any]:
    """MB/s of the bytes that a compaction moves and a merge copies, and of cp for as many."""
    data = random.randbytes(BLOCK)
    base, child = work / "base.vhdx", work / "child.vhdx"
    vhdx.create(base, size, block_size=BLOCK)
    with vhdx.open(base, "r+") as disk:
        for at in range(0, size, BLOCK):
            disk.pwrite(data, at)
        disk.flush()
        for at in range(0, size // 2, BLOCK):
            disk.trim(at, BLOCK)
    compacted = _timed(lambda: vhdx.compact(base), base)
    vhdx.create(child, parent=base, block_size=BLOCK)
    with vhdx.open(child, "r+") as disk:
        for at in range(0, size // 2, BLOCK):
            disk.pwrite(data, at)
    plain = work / "plain"
    with plain.open("wb") as file:
        for _ in range(0, size // 2, BLOCK):
            file.write(data)
    copy = work / "copy"
    copied = _timed(lambda: shutil.copyfile(plain, copy), copy)
    merged = _timed(lambda: vhdx.merge(child), child)
    moved = size // 2 / 1e6
    return {
        f"{moved:.0f} MB": [
            {"what": "compact", "mb_s": moved / compacted},
            {"what": "merge", "mb_s": moved / merged},
            {"what": "cp", "mb_s": moved / copied},
        ]
    }


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """The report."""
    require("qemu-img")
    size, rounds = (512 * MIB, 2) if quick else (4 * GIB, 3)
    with work_directory(places.disk) as work:
        raw, image = work / "full.raw", work / "full.vhdx"
        fill_with_random_data(raw, size)
        vhdx.convert(raw, image)
        sparse = work / "sparse.vhdx"
        vhdx.create(sparse, 64 * GIB)
        with vhdx.open(sparse, "r+") as opened:
            chosen = random.Random(1)
            for _ in range(200):
                opened.pwrite(os.urandom(64 << 10), chosen.randrange(64 * GIB >> 16) << 16)
        sources = {
            "full, VHDX to raw": (image, "raw"),
            "full, raw to VHDX": (raw, "vhdx"),
            "sparse, VHDX to raw": (sparse, "raw"),
            "sparse, VHDX to VHDX": (sparse, "vhdx"),
        }
        report = _conversions(sources, rounds, work)
        for each in (raw, image):
            each.unlink()
        return report | _moves(size, work)
