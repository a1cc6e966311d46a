# SPDX-License-Identifier: MIT
"""What benchmarks share: the machine, pinned processes, peers' servers, CPU time, statistics."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER_CPU, CLIENT_CPU = 1, 0
_TICKS = os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def require(*programs: str) -> None:
    """Ends with a clear message when a peer is missing."""
    missing = [each for each in programs if shutil.which(each) is None]
    if missing:
        sys.exit(f"bench: not installed: {', '.join(missing)} (make peers installs them)")


def pinned(cpu: int | None, command: Sequence[str]) -> list[str]:
    """``command`` on one CPU."""
    return list(command) if cpu is None else ["taskset", "-c", str(cpu), *command]


@dataclass(frozen=True)
class Places:
    """Directories of a benchmark.

    Attributes:
        fast: on tmpfs.
        disk: on the disk's file system.
        results: for reports and plots.
    """

    fast: Path
    disk: Path
    results: Path


@dataclass
class Target:
    """A running server to measure.

    Attributes:
        name: in reports.
        uri: of its export.
        process: for CPU time and the end.
    """

    name: str
    uri: str
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Lets it run; outside of this it is stopped, so that it takes nothing from the others."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def stop(self) -> float:
        """Ends it; returns the seconds that took (a clean close is part of writing)."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        return time.monotonic() - began


def wait_for_socket(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the server's socket is there."""
    for _ in range(1000):
        if path.exists():
            return
        if process.poll() is not None:
            raise RuntimeError(f"a server ended with {process.returncode}")
        time.sleep(0.01)
    raise RuntimeError(f"no socket {path}")


def start(name: str, command: Sequence[str], socket: Path, uri: str, cpu: int | None) -> Target:
    """Starts a server and waits until it listens."""
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        pinned(cpu, command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_socket(socket, process)
    return Target(name, uri, process)


def start_ours(image: Path, work: Path, cpu: int | None, *, spin: bool = False) -> Target:
    """Our server, with a Python thread that never waits beside it when ``spin``."""
    socket = work / f"ours{'-spin' if spin else ''}.sock"
    uri = f"nbd+unix:///?socket={socket}"
    program = ["bench.server", "--spin"] if spin else ["vhdx.cli", "serve"]
    command = [sys.executable, "-m", *program, f"{image}", "--listen", uri]
    return start("vhdx, spinning thread" if spin else "vhdx", command, socket, uri, cpu)


def start_qemu(image: Path, format: str, work: Path, cpu: int | None) -> Target:
    """qemu-nbd as in the benchmark conditions."""
    socket = work / f"qemu-{format}.sock"
    command = ["qemu-nbd", "-t", "-e", "0", "--cache=writeback", "--aio=threads"]
    command += ["-f", format, "-k", str(socket), str(image)]
    return start(f"qemu-nbd {format}", command, socket, f"nbd+unix:///?socket={socket}", cpu)


def start_nbdkit(image: Path, work: Path, cpu: int | None) -> Target:
    """The file plugin of nbdkit."""
    socket = work / "nbdkit.sock"
    command = ["nbdkit", "-f", "-U", str(socket), "file", str(image)]
    return start("nbdkit file", command, socket, f"nbd+unix:///?socket={socket}", cpu)


def fio(uri: str, cpu: int | None, *options: str) -> dict[str, Any]:
    """Runs fio's NBD client; returns its first job."""
    command = ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"]
    run = subprocess.run(
        pinned(cpu, [*command, *options]), capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(f"fio failed: {run.stderr or run.stdout}")
    text = run.stdout
    found: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    return found


def fill_with_random_data(path: Path, size: int) -> None:
    """A file of ``size`` bytes, a multiple of 4 MiB."""
    subprocess.run(
        ["dd", "if=/dev/urandom", f"of={path}", "bs=4M", f"count={size >> 22}", "status=none"],
        check=True,
    )


def back_free_memory(size: int) -> None:
    """Touches ``size`` bytes of free memory, so that the next one to fill the page cache finds it.

    A virtual machine may have given free memory back to its host, and getting it again takes seconds
    that would count against whoever comes first.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of the ratios of paired rounds."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b]
    return statistics.median(ratios), min(ratios), max(ratios)


@contextlib.contextmanager
def work_directory(base: Path) -> Iterator[Path]:
    """A directory of its own below ``base``, removed at the end."""
    path = base / f"vhdx-bench-{os.getpid()}"
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
