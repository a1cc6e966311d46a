# SPDX-License-Identifier: MIT
"""NBD servers side by side: vhdx, qemu-nbd, nbdkit; interleaved rounds, ratios, server CPU.

Conditions: a disk filled with random data, page cache warm, unix socket, fio's NBD client; pinned,
with the server on one CPU and the client on the other. Fresh writes go to an empty 64 GiB disk of
1 MiB blocks, a clean close timed in. What not to conclude: absolute figures (the client is often the
limit, and shared machines drift); read the ratios.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
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
    median_ratio,
    require,
    start_nbdkit,
    start_ours,
    start_qemu,
    work_directory,
)

GIB = 1 << 30

STEADY = {
    "randread 4k QD16": ("--rw=randread", "--bs=4k", "--iodepth=16"),
    "randread 4k QD1": ("--rw=randread", "--bs=4k", "--iodepth=1"),
    "randwrite 4k QD16": ("--rw=randwrite", "--bs=4k", "--iodepth=16"),
    "read 1M QD4": ("--rw=read", "--bs=1m", "--iodepth=4"),
    "read 8M QD2": ("--rw=read", "--bs=8m", "--iodepth=2"),
    "write 1M QD4": ("--rw=write", "--bs=1m", "--iodepth=4"),
}


def _measure(
    target: Target, seconds: float, cpu: int | None, options: tuple[str, ...]
) -> dict[str, float]:
    before = target.cpu_seconds()
    job = fio(target.uri, cpu, *options, "--time_based", f"--runtime={seconds}")
    used = target.cpu_seconds() - before
    requests = job["read"]["total_ios"] + job["write"]["total_ios"]
    side = job["read"] if job["read"]["total_ios"] else job["write"]
    return {
        "iops": job["read"]["iops"] + job["write"]["iops"],
        "mib_s": (job["read"]["bw"] + job["write"]["bw"]) / 1024,
        "cpu_us": used * 1e6 / max(requests, 1),
        "p50_us": side["clat_ns"]["percentile"]["50.000000"] / 1000,
        "p99_us": side["clat_ns"]["percentile"]["99.000000"] / 1000,
    }


def steady(size: int, rounds: int, seconds: float, base: Path, *, pinned: bool) -> dict[str, Any]:
    """Reads and overwrites of a full disk."""
    server, client = (SERVER_CPU, CLIENT_CPU) if pinned else (None, None)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with work_directory(base) as work:
        raw, image = work / "disk.raw", work / "disk.vhdx"
        fill_with_random_data(raw, size)
        vhdx.convert(raw, image)
        their_image = work / "theirs.vhdx"
        subprocess.run(
            ["qemu-img", "convert", "-O", "vhdx", "-o", "subformat=dynamic", raw, their_image],
            check=True,
        )
        targets = [
            start_ours(image, work, server),
            start_nbdkit(raw, work, server),
            start_qemu(their_image, "vhdx", work, server),
            start_ours(image_copy(image), work, server, spin=True),
        ]
        try:
            for target in targets:  # the page cache is warm for all alike
                with target.awake():
                    subprocess.run(["nbdcopy", target.uri, "null:"], check=True)
            for name, options in STEADY.items():
                found = results.setdefault(name, {})
                for _ in range(rounds):
                    for target in targets:
                        with target.awake():
                            measured = _measure(target, seconds, client, options)
                        found.setdefault(target.name, []).append(measured)
        finally:
            for target in targets:
                target.stop()
    return results


def image_copy(image: Path) -> Path:
    """A second image of the same content, so that two servers of ours can run at once."""
    copy = image.with_name("copy.vhdx")
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", image, copy], check=True)
    return copy


def fresh(rounds: int, requests: int, base: Path, *, fsync: int, pinned: bool) -> dict[str, Any]:
    """Random 4k writes to an empty disk of 64 GiB, timed up to the clean close."""
    server, client = (SERVER_CPU, CLIENT_CPU) if pinned else (None, None)
    results: dict[str, list[dict[str, float]]] = {}
    options = ["--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={64 * GIB}"]
    options += ["--norandommap", "--randrepeat=0"]
    if fsync:
        options.append(f"--fsync={fsync}")
    with work_directory(base) as work:
        for _ in range(rounds):
            for kind in ("vhdx", "nbdkit", "qemu", "spin"):
                target = _fresh_target(kind, work, server)
                count = requests if kind != "qemu" else requests // 20
                began = time.monotonic()
                job = fio(target.uri, client, *options, f"--io_size={count * 4096}")
                moving = time.monotonic() - began
                closing = target.stop()
                written = job["write"]["total_ios"]
                runtime = job["write"]["runtime"] / 1000
                results.setdefault(target.name, []).append(
                    {
                        "iops": written / (runtime + closing),
                        "close_s": closing,
                        "wall_s": moving,
                        "p99_us": job["write"]["clat_ns"]["percentile"]["99.000000"] / 1000,
                    }
                )
                for path in work.glob("fresh*"):
                    path.unlink()
    return results


def _fresh_target(kind: str, work: Path, cpu: int | None) -> Target:
    if kind == "nbdkit":
        raw = work / "fresh.raw"
        with raw.open("wb") as file:
            file.truncate(64 * GIB)
        return start_nbdkit(raw, work, cpu)
    image = work / "fresh.vhdx"
    if kind == "qemu":
        options = "subformat=dynamic,block_size=1M"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "vhdx", "-o", options, image, "64G"], check=True
        )
        return start_qemu(image, "vhdx", work, cpu)
    vhdx.create(image, 64 * GIB, block_size=1 << 20)
    return start_ours(image, work, cpu, spin=kind == "spin")


def summarise(results: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each peer: medians, and our ratio to it."""
    rows = []
    ours = [each["iops"] for each in results["vhdx"]]
    for name, rounds in results.items():
        theirs = [each["iops"] for each in rounds]
        ratio, low, high = median_ratio(ours, theirs)
        row: dict[str, Any] = {"server": name, "ratio": ratio, "ratio_low": low, "ratio_high": high}
        for key in rounds[0]:
            row[key] = statistics.median(each[key] for each in rounds)
        rows.append(row)
    return rows


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """All NBD benchmarks."""
    require("fio", "qemu-nbd", "qemu-img", "nbdkit", "nbdcopy", "taskset")
    size, rounds, seconds = (1 * GIB, 3, 2.0) if quick else (4 * GIB, 5, 10.0)
    report: dict[str, Any] = {}
    free = shutil.disk_usage(places.disk).free
    place = places.disk if free > 6 * size else places.fast
    for pinned in (True, False):
        found = steady(size, rounds, seconds, place, pinned=pinned)
        for name, results in found.items():
            report[f"{name}, {'pinned' if pinned else 'unpinned'}"] = summarise(results)
    requests = 50_000 if quick else 200_000
    report["fresh 4k writes QD16, tmpfs, pinned"] = summarise(
        fresh(rounds, requests, places.fast, fsync=0, pinned=True)
    )
    report["fresh 4k writes QD16, fsync=64, disk, pinned"] = summarise(
        fresh(rounds, requests // 4, places.disk, fsync=64, pinned=True)
    )
    return report
