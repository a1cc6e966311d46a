# SPDX-License-Identifier: MIT
"""How exactly limits are kept, side by side with QEMU's throttle groups and nbdkit's rate filter.

fio counts what is answered in each second; the first two are warm-up. The error of a window is that
of its count, and one request may always be on either side of its edge.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import vhdx
from bench.conditions import CLIENT_CPU, SERVER_CPU, Target, fio, require, start, work_directory
from vhdx import plane
from vhdx.units import GIB, KIB, MIB

WARM_SECONDS = 2
UNIT = 8 * KIB
RATES = {
    "4k": (100, 1000, 25000),
    "8k": (1000, 25000),
    "64k": (1000, 25000),
    "1m": (1280, 25000),
}
SIZES = {"4k": 4 * KIB, "8k": 8 * KIB, "64k": 64 * KIB, "1m": MIB}
FLOWS = (2, 8, 32)


def _ours(image: Path, work: Path, *limits: str) -> Target:
    socket = work / "ours.sock"
    uri = f"nbd+unix:///?socket={socket}"
    command = [sys.executable, "-m", "vhdx.cli", "serve", str(image), "--listen", uri, *limits]
    return start("vhdx", command, socket, uri, SERVER_CPU)


def _qemu(raw: Path, work: Path, limit: str) -> Target:
    socket = work / "qemu.sock"
    command = ["qemu-nbd", "-t", "-e", "0", "-k", str(socket)]
    command += ["--object", f"throttle-group,id=g,{limit}", "--image-opts"]
    command += [f"driver=throttle,throttle-group=g,file.driver=file,file.filename={raw}"]
    return start("qemu-nbd", command, socket, f"nbd+unix:///?socket={socket}", SERVER_CPU)


def _nbdkit(raw: Path, work: Path, bytes_a_second: int) -> Target:
    socket = work / "nbdkit.sock"
    command = ["nbdkit", "-f", "-U", str(socket), "--filter=rate", "file", str(raw)]
    command += [f"rate={bytes_a_second * 8}"]
    return start("nbdkit rate", command, socket, f"nbd+unix:///?socket={socket}", SERVER_CPU)


def _counted(target: Target, work: Path, size: int, seconds: int, *options: str) -> list[float]:
    """Requests answered in each second after the warm-up."""
    log = work / "fio"
    for old in work.glob("fio_*"):
        old.unlink()
    fio(
        target.uri, CLIENT_CPU, "--rw=randread", f"--bs={size}", "--iodepth=16", "--size=1g",
        "--time_based", f"--runtime={seconds + WARM_SECONDS + 1}", f"--write_iops_log={log}",
        "--log_avg_msec=1000", *options,
    )  # fmt: skip
    lines = (work / "fio_iops.1.log").read_text().splitlines()
    return [float(line.split(",")[1]) for line in lines][WARM_SECONDS : WARM_SECONDS + seconds]


def _row(target: Target, wanted: float, counts: list[float]) -> dict[str, Any]:
    errors = [count / wanted - 1 for count in counts]
    return {
        "server": target.name,
        "wanted_requests_s": wanted,
        "mean": statistics.mean(counts),
        "error_10s_percent": 100 * abs(statistics.mean(counts) / wanted - 1),
        "worst_1s_percent": 100 * max(map(abs, errors)),
        "one_request_percent": 100 / wanted,
    }


def _measured(
    makers: list[Callable[[], Target]], wanted: float, work: Path, size: int, seconds: int
) -> list[dict[str, Any]]:
    rows = []
    for make in makers:
        target = make()
        try:
            rows.append(_row(target, wanted, _counted(target, work, size, seconds)))
        finally:
            target.stop()
    return rows


def _accuracy(image: Path, raw: Path, work: Path, seconds: int) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, rates in RATES.items():
        size = SIZES[name]
        units = max(1, size // UNIT)
        for rate in rates:
            makers: list[Callable[[], Target]] = [
                partial(_ours, image, work, "--max-iops", str(rate)),
                partial(_qemu, raw, work, f"x-iops-total={rate},x-iops-size={UNIT}"),
            ]
            title = f"{rate} normalised IOPS at {name}"
            report[title] = _measured(makers, rate / units, work, size, seconds)
    for megabytes in (1, 50, 500):
        rate = megabytes * 1_000_000
        makers = [
            partial(_ours, image, work, "--max-bandwidth", str(rate)),
            partial(_qemu, raw, work, f"x-bps-total={rate}"),
            partial(_nbdkit, raw, work, rate),
        ]
        wanted = rate / (64 * KIB)
        report[f"{megabytes} MB/s at 64k"] = _measured(makers, wanted, work, 64 * KIB, seconds)
    return report


def _fairness(image: Path, work: Path, seconds: int) -> list[dict[str, Any]]:
    """Jain's index of clients of one disk that share 5,000 IOPS, each with another depth."""
    rows = []
    for flows in FLOWS:
        target = _ours(image, work, "--max-iops", "5000")
        got = [0.0] * flows

        def client(me: int, uri: str = target.uri, got: list[float] = got) -> None:
            job = fio(
                uri, CLIENT_CPU, "--rw=randread", "--bs=4k", f"--iodepth={1 + me % 16}",
                "--size=1g", "--time_based", f"--runtime={seconds}", "--ramp_time=2",
            )  # fmt: skip
            got[me] = job["read"]["iops"]

        threads = [threading.Thread(target=client, args=(n,)) for n in range(flows)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        target.stop()
        index = sum(got) ** 2 / (flows * sum(x * x for x in got))
        rows.append({"flows": flows, "jain": index, "total_iops": sum(got)})
    return rows


def _in_process(rounds: int) -> list[dict[str, Any]]:
    """What a throttle without a limit costs a read of 4 KiB from memory, and exact rates."""
    pool = plane.Pool(2)
    pacing = plane.Pacing(pool)
    lower = plane.Memory(MIB)
    limits = plane.Limits(pacing, UNIT)
    throttle = plane.Throttle(lower, pacing, limits)
    buffer = bytearray(4096)

    def seconds(device: plane.Device, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            device.read_into(buffer, 0)
        return time.perf_counter() - began

    costs = []
    for _ in range(rounds):
        plain, idle = seconds(lower, 20000), seconds(throttle, 20000)
        costs.append((idle - plain) / 20000 * 1e9)
    rows = [{"what": "idle throttle, ns a request", "median": statistics.median(costs)}]
    for rate in (100, 10_000, 200_000):
        limits.set({plane.LimitKind.UNITS: plane.Limit(rate)})
        count = max(200, rate * 2)
        took = seconds(throttle, count)
        rows.append({"what": f"{rate} IOPS, one thread: achieved", "median": count / took})
    pool.close()
    return rows


def run(*, quick: bool, fast: Path, disk: Path) -> dict[str, Any]:
    """The report; ``disk`` is not used."""
    del disk
    require("fio", "qemu-nbd", "nbdkit")
    seconds, rounds = (4, 5) if quick else (10, 30)
    with work_directory(fast) as work:
        image, raw = work / "disk.vhdx", work / "disk.raw"
        vhdx.create(image, GIB, block_size=MIB)
        with vhdx.open(image, "r+") as opened:
            for at in range(0, GIB, MIB):
                opened.pwrite(bytes([at >> 20 & 255]) * MIB, at)
        vhdx.convert(image, raw)
        report = _accuracy(image, raw, work, seconds)
        report["clients of one limit of 5000 IOPS"] = _fairness(image, work, seconds)
        report["in process"] = _in_process(rounds)
    return report
