# SPDX-License-Identifier: MIT
"""How exactly limits are kept, side by side with QEMU's throttle groups and nbdkit's rate filter.

fio counts what is answered in each 100 ms; the first two seconds are warm-up. The error of a window
is that of its count, and one request may always be on either side of its edge. No block of the disk
is a hole: QEMU answers holes past its throttle, and looks for the next one at every read. nbdkit's
filter lets two seconds' worth pass at once unless told otherwise, so it is also told a burst of one
request; QEMU never lets less than 100 ms' worth pass at once, so ours has a row with that burst, too.
In a row of its own fio limits itself.

Without a burst what a client does not ask for in time is gone, so the server is measured only while
the client always waits: it has 16 requests under way, and from 5,000 a second on 64, so that it may
be off the CPU for some milliseconds. Rows with 16 at the highest rate stand beside.
Minimums beside neighbours and what an idle throttle costs: :mod:`bench.neighbours`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import vhdx
from bench import neighbours
from bench.conditions import (
    CLIENT_CPU,
    SERVER_CPU,
    Places,
    Target,
    fio,
    require,
    start,
    work_directory,
)
from vhdx import plane
from vhdx.units import GIB, KIB, MIB

WARM_SECONDS = 2
UNIT = 8 * KIB
DEPTH, FAST_DEPTH, FAST = 16, 64, 5000  # requests under way; from so many a second on
BURST = "vhdx, burst of 100 ms"
Curve = list[tuple[float, float]]
Counted = list[tuple[float, float]]
RATES = {
    "4k": (100, 1000, 25000),
    "8k": (100, 1000, 25000),
    "64k": (100, 1000, 25000),
    "1m": (100, 1280, 25000),
}
MEGABYTES = (1, 50, 500, 1000)
SIZES = {"4k": 4 * KIB, "8k": 8 * KIB, "64k": 64 * KIB, "1m": MIB}
FLOWS = (2, 8, 32)


def _ours(image: Path, work: Path, *limits: str, name: str = "vhdx") -> Target:
    socket = work / "ours.sock"
    uri = f"nbd+unix:///?socket={socket}"
    command = [sys.executable, "-m", "vhdx.cli", "serve", str(image), "--listen", uri, *limits]
    return start(name, command, socket, uri, SERVER_CPU)


def _qemu(raw: Path, work: Path, limit: str) -> Target:
    socket = work / "qemu.sock"
    command = ["qemu-storage-daemon", "--object", f"throttle-group,id=group,{limit}"]
    command += ["--blockdev", f"driver=file,node-name=file,filename={raw}"]
    command += ["--blockdev", "driver=throttle,node-name=disk,throttle-group=group,file=file"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
    command += ["--export", "type=nbd,id=export,node-name=disk,name=,writable=on"]
    return start("QEMU", command, socket, f"nbd+unix:///?socket={socket}", SERVER_CPU)


def _nbdkit(raw: Path, work: Path, bytes_a_second: int, *options: str) -> Target:
    socket = work / "nbdkit.sock"
    command = ["nbdkit", "-f", "-U", str(socket), "--filter=rate", "file", str(raw)]
    command += [f"rate={bytes_a_second * 8}", *options]
    name = " ".join(["nbdkit rate", *options])
    return start(name, command, socket, f"nbd+unix:///?socket={socket}", SERVER_CPU)


def _counted(
    target: Target, work: Path, size: int, depth: int, seconds: int, *options: str
) -> Counted:
    """After the warm-up, when each window of about 100 ms ended, s, and requests answered in it."""
    log = work / "fio"
    for old in work.glob("fio_*"):
        old.unlink()
    fio(
        target.uri, CLIENT_CPU, "--rw=randread", f"--bs={size}", f"--iodepth={depth}",
        "--size=1g", "--time_based", f"--runtime={seconds + WARM_SECONDS + 1}",
        f"--write_iops_log={log}", "--log_avg_msec=100", *options,
    )  # fmt: skip
    lines = [line.split(",") for line in (work / "fio_iops.1.log").read_text().splitlines()]
    # fio gives tenths of a second's worth, whatever the window took; nothing where it was empty.
    found = [(int(moment) / 1000, int(rate) / 10) for moment, rate, *_ in lines]
    first = next(i for i, (moment, _) in enumerate(found) if moment > WARM_SECONDS)
    return [each for each in found[first:] if each[0] <= found[first][0] + seconds + 0.05]


def _windows(counted: Counted, seconds: float) -> list[tuple[float, float]]:
    """Windows of about ``seconds``: what each took, and requests in it."""
    found, began, count = [], counted[0][0], 0.0
    for moment, n in counted[1:]:
        count += n
        if moment - began >= seconds - 0.01:
            found.append((moment - began, count))
            began, count = moment, 0.0
    return found


def _worst(windows: list[tuple[float, float]], wanted: float) -> tuple[float, float]:
    """The greatest error of a window, in percent and in requests."""
    found = [(abs(n - wanted * took), wanted * took) for took, n in windows]
    return max((100 * off / due, off) for off, due in found)


def _depth(wanted: float) -> int:
    """Requests under way, of a client that is to ask ``wanted`` times a second."""
    return DEPTH if wanted < FAST else FAST_DEPTH


def _row(target: Target, wanted: float, counted: Counted) -> dict[str, Any]:
    """Errors in percent and in requests, of which one is allowed."""
    everything = counted[-1][0] - counted[0][0], sum(n for _, n in counted[1:])
    whole = _worst([everything], wanted)
    second, tenth = (_worst(_windows(counted, of), wanted) for of in (1.0, 0.1))
    return {
        "server": target.name,
        "wanted_s": wanted,
        "mean_s": everything[1] / everything[0],
        "all_percent": whole[0],
        "all_requests": whole[1],
        "worst_1s_percent": second[0],
        "worst_1s_requests": second[1],
        "worst_100ms_percent": tenth[0],
    }


def _measured(
    makers: list[Callable[[], Target]],
    wanted: float,
    work: Path,
    size: int,
    seconds: int,
    depth: int | None = None,
) -> list[dict[str, Any]]:
    rows = []
    for make in makers:
        target = make()
        try:
            under_way = depth or _depth(wanted)
            row = _row(target, wanted, _counted(target, work, size, under_way, seconds))
            rows.append(row | {"depth": under_way})
        finally:
            target.stop()
    return rows


def _with_and_without_burst(
    image: Path, work: Path, most: str, burst: str, rate: int
) -> list[Callable[[], Target]]:
    limit = (most, str(rate))
    return [
        partial(_ours, image, work, *limit),
        partial(_ours, image, work, *limit, burst, str(rate // 10), name=BURST),
    ]


def _accuracy(image: Path, raw: Path, work: Path, seconds: int) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, rates in RATES.items():
        size = SIZES[name]
        units = max(1, size // UNIT)
        for rate in rates:
            makers: list[Callable[[], Target]] = [
                *_with_and_without_burst(image, work, "--max-iops", "--burst-iops", rate),
                partial(_qemu, raw, work, f"x-iops-total={rate},x-iops-size={UNIT}"),
            ]
            rows = _measured(makers, rate / units, work, size, seconds)
            if rate / units >= 1:
                rows.append(_fio_itself(image, work, rate / units, size, seconds))
            report[f"{rate} normalised IOPS at {name}"] = rows
            if _depth(rate / units) != DEPTH:
                rows = _measured(makers, rate / units, work, size, seconds, DEPTH)
                report[f"{rate} normalised IOPS at {name}, {DEPTH} under way"] = rows
    for megabytes in MEGABYTES:
        rate = megabytes * 1_000_000
        makers = [
            *_with_and_without_burst(image, work, "--max-bandwidth", "--burst-bytes", rate),
            partial(_qemu, raw, work, f"x-bps-total={rate}"),
            partial(_nbdkit, raw, work, rate),
            partial(_nbdkit, raw, work, rate, f"burstiness={64 * KIB / rate:.6f}"),
        ]
        wanted = rate / (64 * KIB)
        report[f"{megabytes} MB/s at 64k"] = _measured(makers, wanted, work, 64 * KIB, seconds)
    return report


def _fio_itself(image: Path, work: Path, wanted: float, size: int, seconds: int) -> dict[str, Any]:
    target = _ours(image, work)
    try:
        limit = f"--rate_iops={round(wanted)}"
        depth = _depth(wanted)
        counted = _counted(target, work, size, depth, seconds, limit)
        return _row(target, round(wanted), counted) | {"server": "fio's rate", "depth": depth}
    finally:
        target.stop()


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


def _in_process(seconds: int) -> list[dict[str, Any]]:
    """Limits above memory, asked by a client in C that always waits."""
    rows = []
    for rate in (100, 1_000, 10_000, 50_000, 100_000, 200_000):
        pool = plane.Pool(2)
        pacing = plane.Pacing(pool)
        limits = plane.Limits(pacing, UNIT)
        limits.set({plane.LimitKind.UNITS: plane.Limit(rate)})
        throttle = plane.Throttle(plane.Memory(MIB), pacing, limits)
        load = plane.Load(throttle, pool, length=4096, depth=FAST_DEPTH)
        load.start()
        time.sleep(0.5)
        marks = [(time.perf_counter(), load.read().answered)]
        for n in range(1, 10 * seconds + 1):
            time.sleep(max(0.0, marks[0][0] + n / 10 - time.perf_counter()))
            marks.append((time.perf_counter(), load.read().answered))
        load.stop()
        row: dict[str, Any] = {"iops": rate}
        for name, step in (("10s", 10 * seconds), ("1s", 10), ("100ms", 1)):
            pairs = zip(marks[::step], marks[step::step], strict=False)
            worst = max(abs((n - m) / (u - t) / rate - 1) for (t, m), (u, n) in pairs)
            row[f"worst_{name}_percent"] = 100 * worst
        rows.append(row)
        pool.close()
    return rows


def _plot(report: dict[str, Any], kept: Curve, watched: Curve, path: Path) -> None:
    """Errors of a second by rate and size, and the disk with the minimum beside its neighbours."""
    import matplotlib as plotting

    plotting.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    servers: dict[str, list[tuple[str, float]]] = {}
    for title, rows in report.items():
        for row in rows:
            if "worst_1s_percent" in row and "server" in row:
                short = title.replace(" normalised IOPS at ", " @ ")
                servers.setdefault(row["server"], []).append((short, row["worst_1s_percent"]))
    for server, points in servers.items():
        left.plot([p[0] for p in points], [max(p[1], 1e-3) for p in points], "o", label=server)
    left.axhline(1, color="grey", linestyle="--", linewidth=1)
    left.set(yscale="log", ylabel="worst error of a second, %")
    left.tick_params(axis="x", rotation=90)
    left.legend()
    right.plot(*zip(*kept, strict=True), label="minimums kept")
    right.plot(*zip(*watched, strict=True), label="minimums watched")
    right.axhline(neighbours.MINIMUM, color="grey", linestyle="--", linewidth=1, label="minimum")
    right.set(xlabel="seconds", ylabel="normalised IOPS of the disk with a minimum")
    right.legend()
    figure.tight_layout()
    figure.savefig(path)


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """The report."""
    require("fio", "qemu-storage-daemon", "nbdkit")
    seconds, pairs = (4, 4) if quick else (10, 30)
    with work_directory(places.fast) as work:
        image, raw = work / "disk.vhdx", work / "disk.raw"
        vhdx.create(image, GIB, block_size=MIB)
        with vhdx.open(image, "r+") as opened:
            for at in range(0, GIB, MIB):
                opened.pwrite(bytes([(at >> 20) % 255 + 1]) * MIB, at)
        vhdx.convert(image, raw)
        report = _accuracy(image, raw, work, seconds)
        report["clients of one limit of 5000 IOPS"] = _fairness(image, work, seconds)
        report["in process, one request is more than 1 % below 100 a second"] = _in_process(seconds)
        report["idle throttle over NBD"] = neighbours.idle_throttle(image, work, pairs)
        rows, kept = neighbours.kept(work, 10 if quick else 60)
        report["minimum kept, seven greedy neighbours on a hard disk"] = rows
        rows, watched = neighbours.watched(work)
        report["minimum watched, neighbours come and go"] = rows
    _plot(report, kept, watched, places.results / "qos.png")
    return report
