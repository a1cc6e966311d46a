# SPDX-License-Identifier: MIT
"""The README's commands, run line by line as a reader would type them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vhdx
from vhdx.units import GIB

README = Path(__file__).parents[2] / "README.md"
QOS = README.parent / "docs" / "qos.md"
REFUSED = 2

pytestmark = pytest.mark.usefixtures("runtime")


def blocks(text):
    """The commands of each block, without what is said about them."""
    for block in re.findall(r"```\n((?:vhdx|curl).*?)```", text, re.DOTALL):
        yield [line.split("  #")[0].strip() for line in block.splitlines()]


class Script:
    """A directory with images, and the shell that runs commands there."""

    def __init__(self, base, fast_path, seconds):
        self.base, self.seconds = base, seconds
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "COLUMNS": "100",
        }
        for name in ("disk", "a", "b", "c"):
            image = fast_path / f"{name}.vhdx"
            vhdx.create(image, GIB)
            (base / image.name).symlink_to(image)

    def here(self, line):
        """The line, with sockets of this directory and shorter runs."""
        run = f"{os.environ['XDG_RUNTIME_DIR']}/vhdx"
        line = re.sub("/run/vhdx/(PID-)?", f"{run}/", line)
        line = line.replace("--seconds 60", f"--seconds {self.seconds}")
        return line + f" --max-time {self.seconds}" * line.endswith("/events")

    def run(self, line, codes=(0,)):
        done = subprocess.run(
            self.here(line), shell=True, cwd=self.base, env=self.environment, text=True,
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode in codes, (line, done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    @contextlib.contextmanager
    def serving(self, line, clients):
        """A server, and fio at some of its disks."""
        command = f"exec {line}"
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(
                subprocess.Popen(
                    command,
                    shell=True,
                    cwd=self.base,
                    env=self.environment,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            )
            stack.callback(server.terminate)
            uri = server.stdout.readline().strip()
            for name in clients:
                at = re.sub(r"///\w+", f"///{name}", uri)
                fio = ["fio", "--name=job", "--ioengine=nbd", f"--uri={at}", "--rw=randwrite"]
                fio += ["--bs=4k", "--iodepth=8", "--size=64m", "--time_based", "--runtime=60"]
                process = subprocess.Popen(fio, stdout=subprocess.DEVNULL, cwd=self.base)
                stack.enter_context(process)
                stack.callback(process.terminate)
            yield


@pytest.fixture
def script(tmp_path, fast_path):
    return Script(tmp_path, fast_path, 2)


@pytest.fixture
def written():
    limits, control, minimums = blocks(QOS.read_text())
    return limits, minimums, control


def type_all(lines, place):
    """Types the lines into one shell; the first that fails ends it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = "set -e; trap 'kill $(jobs -p) 2>/dev/null || :' EXIT\n" + "\n".join(lines)
    done = subprocess.run(
        ["bash", "-xc", script], cwd=place, env=os.environ | {"PATH": path},
        capture_output=True, encoding="utf-8", errors="replace", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def commands(text):
    """The commands of each block that can be run here."""
    for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
        yield [line.split("  #")[0].strip() for line in block.splitlines()]


def test_the_tour(tmp_path, peer):
    """Top to bottom in one directory, but for servers that wait and images that a reader has."""
    peer("qemu-img", "nbdinfo", "nbdcopy", "mkfs.ext4")
    tour = README.read_text().split("## Five-minute tour\n")[1].split("### Storage QoS")[0]
    elsewhere = ("--listen", "windows.vhdx", "vhdx ps")
    lines = [
        line
        for block in commands(tour)
        if not any(each in line for each in elsewhere for line in block)
        for line in block
    ]
    assert len(lines) > 15
    type_all(lines, tmp_path)


def test_recipes(tmp_path, peer):
    peer("qemu-img")
    (lines,) = commands((README.parent / "docs" / "coming-from.md").read_text())
    said = type_all(lines, tmp_path)
    assert said.count("read 8388608/8388608 bytes") == 2
    assert "Pattern verification failed" not in said


def test_limits_and_alerts(script, written, peer):
    """Limits change live; the alert is seen in ``/events``, its state in ``top`` and ``/metrics``."""
    peer("fio", "curl")
    (serve, tighten, show, top, *others), _, (events, metrics) = written
    assert serve.startswith("vhdx serve")
    with script.serving(serve, ["disk"]):
        assert re.search(r"disk +Ok +(39\d|40\d) ", script.run(f"sleep 2; {top}"))
        heard = script.run(f"({events} --max-time 4 & sleep 0.5; {tighten}; wait)", codes=(0, 28))
        alert = json.loads(heard[heard.index("{") :].splitlines()[0])
        assert (alert["event"], alert["disk"]) == ("InsufficientThroughput", "disk")
        assert re.search(r"disk +InsufficientThroughput +300 +- +400 KiB/s", script.run(show))
        assert re.search(r"disk +InsufficientThroughput +(99|10\d) ", script.run(top))
        told = script.run(metrics)
        assert 'vhdx_disk_status{disk="disk",status="InsufficientThroughput"} 1.0' in told
        assert 'vhdx_disk_maximum_bandwidth{disk="disk"} 409600.0' in told
        for line in others:
            script.run(line)
        assert (script.base / "run.png").read_bytes().startswith(b"\x89PNG")
        assert re.search("disk +.* gold ", script.run(show))
        heard = script.run(
            f"({events} --max-time 4 & sleep 0.5; vhdx qos set disk.vhdx --max-bandwidth none; wait)"
        )
        assert '"Ok"' in heard


def test_minimums(script, written, peer):
    """What the device can carry is taken, what it cannot is refused with the figures."""
    peer("fio")
    _, (serve, carried, refused, show), _ = written
    with script.serving(serve, "abc"):
        script.run(carried)
        said = script.run(refused, codes=(REFUSED,))
        assert re.search(r"minimums of \d+ normalised IOPS in all cannot be kept", said)
        assert re.search("minimums are kept: 49 normalised IOPS are reserved", script.run(show))
