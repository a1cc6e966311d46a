# SPDX-License-Identifier: MIT
"""Minimums beside greedy neighbours on a modelled hard disk, and what an idle throttle costs.

Eight disks on one hard disk (``--model hdd``): one is to get 40 normalised IOPS and asks with four
requests under way, the others take what they can with 32. With ``--keep-minimums`` it is to get them
in silence; without, the alert is to come within two seconds and to go within five.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vhdx
from bench.conditions import CLIENT_CPU, SERVER_CPU, Target, fio, pinned, start
from vhdx.control import servers
from vhdx.units import GIB

GREEDY = 7
MINIMUM = 40
SIZES = ("8k", "64k", "256k")  # of the greedy ones
_PAIR_SECONDS = 2
_PAIRS_A_SERVER = 3


def _server(work: Path, *options: str) -> Target:
    socket = work / "many.sock"
    images = []
    for n in range(GREEDY + 1):
        path = work / f"disk{n}.vhdx"
        if not path.exists():
            vhdx.create(path, GIB)
        images.append(str(path))
    uri = f"nbd+unix:///?socket={socket}"
    command = [sys.executable, "-m", "vhdx.cli", "serve", *images, "--listen", uri, "--model", "hdd"]
    return start("vhdx", [*command, *options], socket, uri, SERVER_CPU)


def _uri(target: Target, n: int) -> str:
    return target.uri.replace("///", f"///disk{n}")


def _job(target: Target, n: int, seconds: float) -> subprocess.Popen[bytes]:
    quiet = n == 0
    command = [
        "fio", "--name=job", "--ioengine=nbd", f"--uri={_uri(target, n)}", "--rw=randread",
        f"--bs={'8k' if quiet else SIZES[n % 3]}", f"--iodepth={4 if quiet else 32}",
        "--size=1g", "--time_based", f"--runtime={seconds}", f"--randseed={n}",
    ]  # fmt: skip
    return subprocess.Popen(
        pinned(CLIENT_CPU, command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


class _Watcher:
    """What the quiet disk and the others get, ten times a second, and when its status changes."""

    def __init__(self, target: Target) -> None:
        self.iops: list[tuple[float, float]] = []
        self.others: list[float] = []
        self.changes: list[tuple[float, str]] = []
        self._server = next(s for s in servers() if s.pid == target.process.pid)
        self._server.subscribe()
        self._end = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def now(self) -> float:
        return time.monotonic() - self._began

    def _sample(self) -> None:
        status = "Ok"
        while not self._end.wait(0.1):
            disks = {disk.disk: disk for disk in self._server.qos().disks}
            got = {name: d.windows["1"].normalized_iops for name, d in disks.items()}
            self.iops.append((self.now(), got.pop("disk0")))
            self.others.append(sum(got.values()))
            if disks["disk0"].status.value != status:
                status = disks["disk0"].status.value
                self.changes.append((self.now(), status))

    def end(self) -> None:
        self._end.set()
        self._thread.join()

    def wait_for(self, status: str, seconds: float) -> float | None:
        limit = self.now() + seconds
        while self.now() < limit:
            for at, became in list(self.changes):
                if became == status:
                    return at
            time.sleep(0.02)
        return None


def kept(work: Path, seconds: int) -> tuple[list[dict[str, Any]], list[tuple[float, float]]]:
    """With scheduling: what the disk with the minimum gets in each second, and alerts."""
    target = _server(work, "--keep-minimums")
    _set_minimum(work)
    jobs = [_job(target, n, seconds + 6) for n in range(GREEDY + 1)]
    time.sleep(3)
    watcher = _Watcher(target)
    time.sleep(seconds)
    watcher.end()
    for job in jobs:
        job.wait()
    target.stop()
    got = [iops for at, iops in watcher.iops if at > 1]
    rows = [
        {
            "seconds": seconds,
            "minimum": MINIMUM,
            "mean_iops": statistics.mean(got),
            "least_in_1s": min(got),
            "others_iops": statistics.mean(watcher.others),
            "alerts": len(watcher.changes),
        }
    ]
    return rows, watcher.iops


def watched(work: Path) -> tuple[list[dict[str, Any]], list[tuple[float, float]]]:
    """Without: how soon the alert comes when neighbours begin, and goes when they end."""
    target = _server(work)
    _set_minimum(work)
    quiet = _job(target, 0, 60)
    time.sleep(3)
    watcher = _Watcher(target)
    time.sleep(3)
    noisy = [_job(target, n, 60) for n in range(1, GREEDY + 1)]
    while not watcher.others[-1]:  # their programs take a while to start
        time.sleep(0.02)
    began = watcher.now()
    raised = watcher.wait_for("InsufficientThroughput", 30)
    time.sleep(5)
    for job in noisy:
        job.terminate()
    for job in noisy:
        job.wait()
    ended = watcher.now()
    cleared = watcher.wait_for("Ok", 30)
    time.sleep(2)
    watcher.end()
    quiet.terminate()
    quiet.wait()
    target.stop()
    rows = [
        {
            "alert_after_s": None if raised is None else raised - began,
            "cleared_after_s": None if cleared is None else cleared - ended,
            "changes": len(watcher.changes),
        }
    ]
    return rows, watcher.iops


def _set_minimum(work: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "vhdx.cli", "qos", "set", work / "disk0.vhdx", "--min-iops",
         str(MINIMUM)],
        check=True,
    )  # fmt: skip


# ---- an idle throttle ----


@contextlib.contextmanager
def _running(image: Path, work: Path, *options: str) -> Iterator[Target]:
    socket = work / f"{image.stem}.sock"
    uri = f"nbd+unix:///?socket={socket}"
    command = [sys.executable, "-m", "bench.server", *options, str(image), "--listen", uri]
    target = start(image.stem, command, socket, uri, SERVER_CPU)
    try:
        fio(target.uri, CLIENT_CPU, "--rw=read", "--bs=1m", "--size=1g")
        yield target
    finally:
        target.stop()


def _microseconds_a_read(target: Target) -> float:
    before = target.cpu_seconds()
    job = fio(
        target.uri, CLIENT_CPU, "--rw=randread", "--bs=4k", "--iodepth=16", "--size=1g",
        "--time_based", f"--runtime={_PAIR_SECONDS}",
    )  # fmt: skip
    used: float = (target.cpu_seconds() - before) * 1e6 / job["read"]["total_ios"]
    return used


def idle_throttle(image: Path, work: Path, pairs: int) -> list[dict[str, Any]]:
    """Server CPU a read of 4 KiB, with a throttle that limits nothing and with none at all.

    Two servers of the same program on the same data may differ by two percent, by where their memory
    happens to lie. So they begin anew after a few pairs, with their images exchanged.
    """
    images = [image, work / "copy.vhdx"]
    images[1].write_bytes(image.read_bytes())
    costs: dict[str, list[float]] = {"throttle": [], "none": []}
    for first in range(0, pairs, _PAIRS_A_SERVER):
        with (
            _running(images[0], work) as throttle,
            _running(images[1], work, "--no-throttle") as none,
        ):
            targets = {"throttle": throttle, "none": none}
            for pair in range(first, min(first + _PAIRS_A_SERVER, pairs)):
                for name in list(targets)[:: 1 if pair % 2 else -1]:
                    costs[name].append(_microseconds_a_read(targets[name]))
        images.reverse()
    ratios = [a / b for a, b in zip(costs["throttle"], costs["none"], strict=True)]
    return [
        {
            "pairs": pairs,
            "throttle_us": statistics.median(costs["throttle"]),
            "none_us": statistics.median(costs["none"]),
            "more_percent": 100 * (statistics.median(ratios) - 1),
            "quartiles_percent": [
                round(100 * (q - 1), 2) for q in statistics.quantiles(ratios, n=4)[::2]
            ],
        }
    ]
