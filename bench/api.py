# SPDX-License-Identifier: MIT
"""The Python interface beside os.preadv, pyvhdi and dissect; and how large images open.

Each reader runs in a process of its own, in turns. Random 4k reads of a disk filled with random data,
page cache warm.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import vhdx
from bench.conditions import (
    CLIENT_CPU,
    Places,
    fill_with_random_data,
    median_ratio,
    pinned,
    work_directory,
)

GIB = 1 << 30

_PRELUDE = """
import random, sys, time
path, size, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
rng = random.Random(1)
offsets = [rng.randrange(size // 4096) * 4096 for _ in range(20000)]
buffer = bytearray(4096)
"""

_LOOP = """
done, began = 0, time.perf_counter()
while time.perf_counter() - began < seconds:
    for offset in offsets:
        read(offset)
    done += len(offsets)
print(done / (time.perf_counter() - began))
"""

READERS = {
    "vhdx preadinto": "import vhdx\ndisk = vhdx.open(path)\ninto = disk.preadinto\n"
    "def read(offset): into(buffer, offset)\n",
    "os.preadv, raw": "import os\nfd = os.open(path, os.O_RDONLY)\nbuffers = [buffer]\n"
    "def read(offset): os.preadv(fd, buffers, offset)\n",
    "pyvhdi": "import pyvhdi\ndisk = pyvhdi.file()\ndisk.open(path)\n"
    "def read(offset): disk.read_buffer_at_offset(4096, offset)\n",
    "dissect": "from dissect.hypervisor.disk.vhdx import VHDX\ndisk = VHDX(open(path, 'rb'))\n"
    "def read(offset):\n    disk.seek(offset)\n    disk.read(4096)\n",
}

_LARGE = """
import resource, sys, time, random, vhdx, vhdx.lazy, numpy
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
vhdx.lazy.load_everything("vhdx", but=("vhdx.cli",))  # "bench start" has what loading costs
before, began = resident(), time.perf_counter()
disk = vhdx.open(sys.argv[1])
disk.pread(512, disk.size - 512)
print((time.perf_counter() - began) * 1000, (resident() - before) / 1048576)
rng = random.Random(1)
for _ in range(100000):
    disk.pread(512, rng.randrange(disk.size // 512) * 512)
reads = (resident() - before) / 1048576
count = sum(1 for _ in disk.extents())
print(reads, (resident() - before) / 1048576, count)
"""


def _python(script: str, *arguments: str) -> list[float]:
    result = subprocess.run(
        pinned(CLIENT_CPU, [sys.executable, "-c", script, *arguments]),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(result.stderr.strip().rpartition("\n")[2])
    return [float(each) for each in result.stdout.split()]


def readers(size: int, rounds: int, seconds: float, base: Path) -> list[dict[str, Any]]:
    """Random 4k reads, reads per second."""
    found: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    with work_directory(base) as work:
        raw, image = work / "disk.raw", work / "disk.vhdx"
        fill_with_random_data(raw, size)
        vhdx.convert(raw, image)
        for _ in range(rounds):
            for name, body in READERS.items():
                if name in missing:
                    continue
                path = raw if "raw" in name else image
                try:
                    (rate,) = _python(_PRELUDE + body + _LOOP, str(path), str(size), str(seconds))
                except RuntimeError as error:
                    missing[name] = str(error)
                    continue
                found.setdefault(name, []).append(rate)
    rows: list[dict[str, Any]] = []
    for name, rates in found.items():
        ratio, low, high = median_ratio(found["vhdx preadinto"], rates)
        rows.append(
            {
                "reader": name,
                "reads_s": statistics.median(rates),
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
            }
        )
    rows += [
        {"reader": name, "reads_s": 0.0, "ratio": 0.0, "ratio_low": 0.0, "ratio_high": why}
        for name, why in missing.items()
    ]
    return rows


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """All benchmarks of the Python interface."""
    size, rounds, seconds = (GIB // 2, 3, 0.5) if quick else (2 * GIB, 5, 3.0)
    report: dict[str, Any] = {"random 4k reads": readers(size, rounds, seconds, places.fast)}
    with work_directory(places.fast) as work:
        path = work / "large.vhdx"
        vhdx.create(path, 64 << 40, block_size=1 << 20)
        runs = [_python(_LARGE, str(path)) for _ in range(3)]
    report["64 TiB of 1 MiB blocks, medians of 3"] = [
        {
            "open_and_read_last_ms": statistics.median(each[0] for each in runs),
            "resident_growth_mib": statistics.median(each[1] for each in runs),
            "after_100000_reads_mib": statistics.median(each[2] for each in runs),
            "after_walk_mib": statistics.median(each[3] for each in runs),
        }
    ]
    return report
