# SPDX-License-Identifier: MIT
"""Stacked maps: what two more levels cost, how flushes are shared, and writes during a compaction.

* reads: random 4k reads of an image alone, and of one on two maps over four files; page cache warm.
* flushes: 8 connections, each flushing after each write of 4k, on a disk: fdatasync a write, and
  the rate beside nbdkit's. nbdkit serves the raw file.
* compaction: random 4k writes at a depth of 1, quiet and while ``vhdx compact`` moves half of
  the disk.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vhdx
from bench.conditions import (
    CLIENT_CPU,
    SERVER_CPU,
    Places,
    Target,
    fill_with_random_data,
    fio,
    pinned,
    require,
    start,
    start_nbdkit,
    start_ours,
    work_directory,
)
from tests.stacks import RECORDS, Store, files, image_on
from vhdx import plane

MIB, GIB = 1 << 20, 1 << 30
SIZE = GIB
COMPACTED = 2 * GIB
CONNECTIONS = 8


def serve(leaves: int, maps: int, directory: Path, uri: str, counts: Path) -> None:
    """Serves an image on maps over files; writes their barriers and its writes to ``counts``."""
    below = files(directory, leaves, 4 * GIB // leaves + RECORDS)
    device: plane.Device = below[0]
    keep: list[Store] = []
    for level in (plane.Level.SPACE, plane.Level.VOLUME)[:maps]:
        lowers = [device] if keep else list(below)
        store = Store(lowers, sum(each.size - RECORDS for each in lowers), level)
        keep.append(store)
        device = store.device
    disk = image_on(device, SIZE)
    for at in range(0, SIZE, 4 * MIB):
        disk.pwrite(os.urandom(4 * MIB), at)
    disk.flush()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with vhdx.serve({"": disk}, listen=uri):
        began = sum(leaf.barriers for leaf in below)
        while not stop.wait(0.05):
            new = counts.with_suffix(".new")
            new.write_text(str(sum(leaf.barriers for leaf in below) - began))
            new.rename(counts)  # whoever reads it finds a whole number
    os._exit(0)


def _stacked(leaves: int, maps: int, work: Path) -> tuple[Target, Path]:
    directory = work / f"stack-{leaves}-{maps}"
    directory.mkdir()
    socket, counts = directory / "sock", directory / "counts"
    uri = f"nbd+unix:///?socket={socket}"
    me = [sys.executable, "-m", "bench.stack", "serve", str(leaves), str(maps), str(directory)]
    name = f"image on {maps} maps over {leaves} files" if maps else "image alone"
    return start(name, [*me, uri, str(counts)], socket, uri, SERVER_CPU), counts


def _in_turn(targets: list[Target], rounds: int) -> Iterator[Target]:
    """Each target once a round, awake while the others are stopped."""
    for target in targets:
        target.process.send_signal(signal.SIGSTOP)
    for number in range(rounds):
        for target in targets if number % 2 else targets[::-1]:
            with target.awake():
                yield target


def _reads(places: Places, rounds: int, seconds: int) -> list[dict[str, Any]]:
    figures: dict[str, list[float]] = {}
    with work_directory(places.fast) as work:
        targets = [_stacked(1, 0, work)[0], _stacked(4, 2, work)[0]]
        try:
            for target in _in_turn(targets, rounds):
                job = fio(
                    target.uri, CLIENT_CPU, "--rw=randread", "--bs=4k", "--iodepth=16",
                    f"--size={SIZE}", "--time_based", f"--runtime={seconds}",
                )  # fmt: skip
                figures.setdefault(target.name, []).append(job["read"]["iops"])
        finally:
            for target in targets:
                target.stop()
    alone = figures[targets[0].name]
    return [
        {
            "disk": name,
            "reads/s": statistics.median(rates),
            "of the image alone": statistics.median(
                rate / own for rate, own in zip(rates, alone, strict=True)
            ),
        }
        for name, rates in figures.items()
    ]


def _write_and_flush(target: Target, seconds: int) -> tuple[float, int]:
    """(rate, writes) of all connections together."""
    command = [
        "fio", "--name=job", f"--numjobs={CONNECTIONS}", "--group_reporting", "--ioengine=nbd",
        f"--uri={target.uri}", "--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1",
        f"--size={SIZE // 4}", "--time_based", f"--runtime={seconds}", "--output-format=json",
    ]  # fmt: skip
    run = subprocess.run(pinned(CLIENT_CPU, command), capture_output=True, text=True, check=True)
    job = json.loads(run.stdout[run.stdout.index("{") :])["jobs"][0]["write"]
    return job["iops"], job["total_ios"]


def _flushes(places: Places, rounds: int, seconds: int) -> list[dict[str, Any]]:
    figures: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    with work_directory(places.disk) as work:
        raw, image = work / "raw.img", work / "disk.vhdx"
        raw.touch()
        os.truncate(raw, SIZE)
        fill_with_random_data(raw, SIZE)
        vhdx.convert(raw, image)
        targets = [start_nbdkit(raw, work, SERVER_CPU), start_ours(image, work, SERVER_CPU)]
        counted = [_stacked(1, 0, work), _stacked(4, 1, work)]
        counts = {target.name: path for target, path in counted}
        targets += [target for target, _ in counted]
        try:
            for target in _in_turn(targets, rounds):
                time.sleep(0.2)
                before = _count(counts.get(target.name))
                rate, writes = _write_and_flush(target, seconds)
                time.sleep(0.2)
                after = _count(counts.get(target.name))
                figures.setdefault(target.name, []).append(rate)
                if target.name in counts:
                    shares.setdefault(target.name, []).append((after - before) / writes)
        finally:
            for target in targets:
                target.stop()
    peer = figures[targets[0].name]
    return [
        {
            "disk": name,
            "writes/s": statistics.median(rates),
            "of nbdkit": statistics.median(a / b for a, b in zip(rates, peer, strict=True)),
            "fdatasync a write": statistics.median(shares[name]) if name in shares else "",
        }
        for name, rates in figures.items()
    ]


def _count(path: Path | None) -> int:
    return 0 if path is None else int(path.read_text())


def _random_writes(target: Target, seconds: int) -> dict[str, float]:
    job = fio(
        target.uri, CLIENT_CPU, "--rw=randwrite", "--bs=4k", "--iodepth=1",
        f"--offset={COMPACTED // 2}", f"--size={COMPACTED // 2}",
        "--time_based", f"--runtime={seconds}",
    )["write"]  # fmt: skip
    nanoseconds = job["clat_ns"]["percentile"]
    return {
        "writes/s": job["iops"],
        "p50 us": nanoseconds["50.000000"] / 1000,
        "p99 us": nanoseconds["99.000000"] / 1000,
        "max us": job["clat_ns"]["max"] / 1000,
    }


def _compaction(places: Places, rounds: int, block_size: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with work_directory(places.fast) as work:
        for _ in range(rounds):
            image = work / "disk.vhdx"
            vhdx.create(image, COMPACTED, block_size=block_size)
            with vhdx.open(image, "r+") as disk:
                for at in range(0, COMPACTED, 4 * MIB):
                    disk.pwrite(os.urandom(4 * MIB), at)
                disk.flush()
                disk.trim(0, COMPACTED // 2)  # what is left lies behind the space of this
            target = start_ours(image, work, SERVER_CPU)
            try:
                quiet = _random_writes(target, 4)
                done: list[float] = []
                work_done = threading.Thread(target=lambda: done.append(_compact(image)))  # noqa: B023
                work_done.start()
                busy = _random_writes(target, 4)
                work_done.join()
            finally:
                target.stop()
            size = image.stat().st_size
            rows.append({
                "quiet p99 us": quiet["p99 us"], "p99 us": busy["p99 us"],
                "ratio": busy["p99 us"] / quiet["p99 us"], "max us": busy["max us"],
                "writes/s of quiet": busy["writes/s"] / quiet["writes/s"],
                "compaction s": done[0],
                "file after": f"{size / (COMPACTED // 2):.2f} of what is used",
            })  # fmt: skip
            image.unlink()
    return rows


def _compact(image: Path) -> float:
    began = time.monotonic()
    command = [sys.executable, "-m", "vhdx.cli", "compact", str(image)]
    subprocess.run(pinned(SERVER_CPU, command), check=True, capture_output=True)
    return time.monotonic() - began


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """All three, in one run."""
    require("fio", "nbdkit", "taskset")
    rounds, seconds = (2, 2) if quick else (5, 5)
    return {
        "random 4k reads": _reads(places, rounds, seconds),
        "8 connections that flush after each write": _flushes(places, rounds, seconds),
        "4k writes during a compaction, blocks of 1 MiB": _compaction(places, rounds, MIB),
        "4k writes during a compaction, blocks of 32 MiB": _compaction(places, rounds, 32 * MIB),
    }


if __name__ == "__main__":
    serve(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], Path(sys.argv[6]))
