# SPDX-License-Identifier: MIT
"""Spaces beside a raw file: random I/O, images on volumes, degraded mirrors, and rebuilds.

* layouts: random 4k reads and writes at a depth of 16 of a raw file, a simple space of 4 columns, and
  mirrors of 2 and 3 copies, whole and with a disk away; all through our server, page cache warm.
* images: the same for a VHDX on the host's file system, and on a volume on a simple space.
* fresh: random 4k writes to an empty VHDX of 64 GiB in both places, timed up to the clean close.
* rebuild: what a disk held is filled on another one, beside ``cp`` of as many bytes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    start,
    work_directory,
)
from vhdx.spaces import DiskSpec, Pool, Resiliency
from vhdx.volume.copying import copy_file

GIB, MIB = 1 << 30, 1 << 20
JOBS = {
    "random 4k reads QD16": ["--rw=randread", "--bs=4k", "--iodepth=16"],
    "random 4k writes QD16": ["--rw=randwrite", "--bs=4k", "--iodepth=16"],
    "1M reads QD4": ["--rw=read", "--bs=1M", "--iodepth=4"],
    "1M writes QD4": ["--rw=write", "--bs=1M", "--iodepth=4"],
}


@contextmanager
def pools_in(work: Path) -> Iterator[None]:
    """Pools are known in this directory only."""
    before = os.environ.get("VHDX_POOLS")
    os.environ["VHDX_POOLS"] = str(work / "pools")
    try:
        yield
    finally:
        if before is None:
            del os.environ["VHDX_POOLS"]
        else:
            os.environ["VHDX_POOLS"] = before


def make_pool(work: Path, name: str, disks: int, each: int) -> Pool:
    """A pool of sparse files."""
    specs = [DiskSpec(f"d{i}", work / f"{name}-{i}.img", each) for i in range(disks)]
    return Pool.create(name, specs)


def serve(name: str, path: str, work: Path, *options: str) -> Target:
    socket = work / f"{name.replace(' ', '-').replace(',', '')}.sock"
    uri = f"nbd+unix:///?socket={socket}"
    command = [sys.executable, "-m", "vhdx.cli", "serve", path, "--listen", uri, *options]
    return start(name, command, socket, uri, SERVER_CPU)


def _layout_targets(work: Path, size: int) -> list[Target]:
    raw = work / "disk.raw"
    fill_with_random_data(raw, size)
    targets = [serve("raw file", str(raw), work)]
    shapes = [
        ("simple of 4", Resiliency.SIMPLE, 1, 4, 4),
        ("mirror x2", Resiliency.MIRROR, 2, 2, 5),
        ("mirror x3", Resiliency.MIRROR, 3, 1, 5),
        ("mirror x2, a disk away", Resiliency.MIRROR, 2, 2, 5),
    ]
    for number, (name, resiliency, copies, columns, disks) in enumerate(shapes):
        pool_name = f"b{number}"
        with make_pool(work, pool_name, disks, 3 * size) as pool:
            pool.create_space(
                "s",
                size,
                resiliency=resiliency,
                copies=copies if copies > 1 else None,
                columns=columns,
                has_volume=False,
            )
            with pool.lease("s") as device, raw.open("rb") as source:
                for at in range(0, size, 8 * MIB):
                    device.write(source.read(8 * MIB), at)
                device.flush()
        if "away" in name:
            (work / f"{pool_name}-0.img").unlink()
        targets.append(serve(name, f"space://{pool_name}/s", work, "--format", "raw"))
    return targets


def _image_targets(work: Path, size: int) -> list[Target]:
    raw, image = work / "content.raw", work / "disk.vhdx"
    fill_with_random_data(raw, size)
    vhdx.convert(raw, image)
    raw.unlink()
    with make_pool(work, "images", 4, 3 * size) as pool:
        pool.create_space("v", 3 * size, resiliency=Resiliency.SIMPLE, columns=4)
    copy_file(image, "space://images/v/disk.vhdx")
    time.sleep(1)  # the pool is closed a moment after its last use
    return [
        serve("VHDX on a file", str(image), work),
        serve("VHDX on a volume, simple of 4", "space://images/v/disk.vhdx", work),
    ]


def _compare(targets: Sequence[Target], rounds: int, seconds: float) -> dict[str, Any]:
    """Ratios to the first target, by job."""
    report: dict[str, Any] = {}
    try:
        for target in targets:
            with target.awake():
                subprocess.run(["nbdcopy", target.uri, "null:"], check=True)
        for job, options in JOBS.items():
            rates: dict[str, list[float]] = {}
            cpu: dict[str, list[float]] = {}
            for _ in range(rounds):
                for target in targets:
                    with target.awake():
                        before = target.cpu_seconds()
                        found = fio(
                            target.uri, CLIENT_CPU, *options, "--time_based",
                            f"--runtime={seconds}",
                        )  # fmt: skip
                        spent = target.cpu_seconds() - before
                    side = found["read" if "read" in job else "write"]
                    rates.setdefault(target.name, []).append(side["iops"])
                    cpu.setdefault(target.name, []).append(spent / side["total_ios"] * 1e6)
            first = targets[0].name
            report[job] = [
                {
                    "disk": name,
                    "of the first": median_ratio(rates[name], rates[first])[0],
                    "low": median_ratio(rates[name], rates[first])[1],
                    "high": median_ratio(rates[name], rates[first])[2],
                    "IOPS": statistics.median(rates[name]),
                    "CPU us": statistics.median(cpu[name]),
                }
                for name in rates
            ]
    finally:
        for target in targets:
            target.stop()
    return report


def _fresh(work: Path, rounds: int, requests: int) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {}
    for number in range(rounds):
        pool_name = f"f{number}"
        with make_pool(work, pool_name, 4, 32 * GIB) as pool:
            pool.create_space("v", 80 * GIB, resiliency=Resiliency.SIMPLE, columns=4)
        paths = {
            "VHDX on a file": str(work / "fresh.vhdx"),
            "VHDX on a volume, simple of 4": f"space://{pool_name}/v/fresh.vhdx",
        }
        for name, path in paths.items():
            command = [sys.executable, "-m", "vhdx.cli", "create", path, "--size", "64G"]
            subprocess.run([*command, "--block-size", "1M"], check=True)
            target = serve(f"{name} {number}", path, work)
            job = fio(
                target.uri, CLIENT_CPU, "--rw=randwrite", "--bs=4k", "--iodepth=16",
                f"--size={64 * GIB}", "--norandommap", "--randrepeat=0",
                f"--io_size={requests * 4096}",
            )["write"]  # fmt: skip
            closing = target.stop()
            rates.setdefault(name, []).append(job["total_ios"] / (job["runtime"] / 1000 + closing))
        (work / "fresh.vhdx").unlink()
        for disk in work.glob(f"{pool_name}-*"):
            disk.unlink()
    first = rates["VHDX on a file"]
    return [
        {
            "disk": name,
            "of the first": median_ratio(found, first)[0],
            "low": median_ratio(found, first)[1],
            "high": median_ratio(found, first)[2],
            "IOPS": statistics.median(found),
        }
        for name, found in rates.items()
    ]


def _rebuild(work: Path, rounds: int, size: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(rounds):
        pool_name = f"r{number}"
        with make_pool(work, pool_name, 4, 2 * size) as pool:
            pool.create_space("s", size, copies=2, columns=1, has_volume=False)
            data = os.urandom(8 * MIB)
            with pool.lease("s") as device:
                for at in range(0, size, 8 * MIB):
                    device.write(data, at)
                device.flush()
            used = max(pool.report().disks, key=lambda disk: disk.used_slabs)
            slabs = used.used_slabs
            Path(used.path).unlink()
            pool.settle(0)
            began = time.monotonic()
            pool.repair()
            rebuilding = time.monotonic() - began
            assert not pool.report().jobs
        moved = slabs * pool.report().slab
        source, copy = work / "cp.src", work / "cp.dst"
        fill_with_random_data(source, moved)
        began = time.monotonic()
        subprocess.run(["cp", "--reflink=never", source, copy], check=True)
        subprocess.run(["sync", copy], check=True)
        copying = time.monotonic() - began
        rows.append(
            {
                "MiB": moved / MIB,
                "rebuild MB/s": moved / rebuilding / 1e6,
                "cp and sync MB/s": moved / copying / 1e6,
                "of cp": copying / rebuilding,
            }
        )
        for path in [*work.glob(f"{pool_name}-*"), source, copy]:
            path.unlink()
    return rows


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """All of them, in one run."""
    require("fio", "nbdcopy", "taskset")
    rounds, seconds, size = (3, 2.0, GIB // 2) if quick else (5, 10.0, GIB)
    report: dict[str, Any] = {}
    with work_directory(places.fast) as work, pools_in(work):
        for job, rows in _compare(_layout_targets(work, size), rounds, seconds).items():
            report[f"layouts: {job}"] = rows
    with work_directory(places.fast) as work, pools_in(work):
        for job, rows in _compare(_image_targets(work, size), rounds, seconds).items():
            report[f"images: {job}"] = rows
    with work_directory(places.fast) as work, pools_in(work):
        report["fresh 4k writes QD16"] = _fresh(work, rounds, 50_000 if quick else 200_000)
    with work_directory(places.fast) as work, pools_in(work):
        report["rebuild"] = _rebuild(work, rounds, 2 * size)
    return report
