# SPDX-License-Identifier: MIT
"""How long short commands take, from start to end, beside an empty Python program and qemu-img.

Conditions: an image of 10 GiB that holds one partitioned block, warm page cache, compiled modules,
programs in turn, medians. What not to conclude: that absolute figures hold on another machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import vhdx
from bench.conditions import Places, require, work_directory

_VHDX = str(Path(sys.executable).with_name("vhdx"))


def _programs(image: Path) -> dict[str, list[str]]:
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import vhdx'": [sys.executable, "-c", "import vhdx"],
        "python -c 'import vhdx; vhdx.open'": [sys.executable, "-c", "import vhdx; vhdx.open"],
        "vhdx --version": [_VHDX, "--version"],
        "vhdx info": [_VHDX, "info", str(image)],
        "vhdx map": [_VHDX, "map", str(image)],
        "vhdx ps": [_VHDX, "ps"],
        "qemu-img info": ["qemu-img", "info", str(image)],
    }


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """Milliseconds of each program."""
    require("qemu-img")
    times: dict[str, list[float]] = {}
    with work_directory(places.fast) as work:
        image = work / "small.vhdx"
        vhdx.create(image, 10 << 30)
        with vhdx.open(image, "r+") as disk:
            # A partition of 1 GiB from 1 MiB on, in an MBR.
            entry = bytes.fromhex("000000008300000000080000") + (1 << 21).to_bytes(4, "little")
            disk.pwrite(bytes(446) + entry + bytes(48) + b"\x55\xaa", 0)
        for _ in range(5 if quick else 25):
            for name, command in _programs(image).items():
                began = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                times.setdefault(name, []).append((time.perf_counter() - began) * 1000)
    rows = [
        {"program": name, "ms": statistics.median(each), "least": min(each), "most": max(each)}
        for name, each in times.items()
    ]
    return {"start": rows}
