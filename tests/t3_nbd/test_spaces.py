# SPDX-License-Identifier: MIT
"""An image on a mirror, served to fio, while disks are lost, written over, returned and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import vhdx
from vhdx.spaces import DiskSpec, Pool

MIB = 1 << 20
VHDX = [sys.executable, "-m", "vhdx.cli"]


@pytest.fixture(autouse=True)
def _hints(tmp_path, monkeypatch):
    monkeypatch.setenv("VHDX_POOLS", str(tmp_path / "pools"))


def fio(uri: str, *options: str) -> subprocess.Popen[str]:
    command = [
        "fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bs=4k",
        "--iodepth=8", "--size=48M", "--verify=crc32c", "--verify_backlog=64",
        "--verify_fatal=1", "--do_verify=1", "--fsync=32", "--time_based", *options,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(what, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_two_disks_of_a_three_way_mirror_are_lost_under_load(tmp_path, peer):
    peer("fio")
    paths = [tmp_path / f"d{i}.img" for i in range(6)]
    specs = [DiskSpec(f"d{i}", path, 512 * MIB) for i, path in enumerate(paths)]
    Pool.create("p", specs, slab=4 * MIB, retire_seconds=3600).close()
    with Pool.open("p") as pool:
        pool.create_space("s", 256 * MIB, copies=3, columns=1)
    image = "space://p/s/disk.vhdx"
    vhdx.create(image, 64 * MIB, block_size=MIB)
    time.sleep(0.7)  # the pool is closed a moment after its last use
    socket = tmp_path / "socket"
    uri = f"nbd+unix:///?socket={socket}"
    server = subprocess.Popen([*VHDX, "serve", image, "--listen", uri])
    wait_until(socket.exists)
    try:
        client = fio(uri, "--runtime=7")
        time.sleep(1.5)
        paths[0].rename(tmp_path / "away")  # comes back as it was
        time.sleep(1.5)
        garbage = tmp_path / "garbage"
        paths[1].rename(garbage)  # comes back written over
        time.sleep(1)
        with garbage.open("r+b") as file:
            file.seek(100 * MIB)
            file.write(os.urandom(8 * MIB))
            file.seek(36 * MIB)
            file.write(os.urandom(8 * MIB))
        garbage.rename(paths[1])
        time.sleep(1)
        (tmp_path / "away").rename(paths[0])
        out = client.communicate(timeout=60)[0]
        assert client.returncode == 0, out
        time.sleep(1.5)  # both were noticed
        client = fio(uri, "--runtime=2")
        out = client.communicate(timeout=60)[0]
        assert client.returncode == 0, out
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    with Pool.open("p") as pool:
        assert pool.settle(60)
        report = pool.report()
        assert [disk.status for disk in report.disks] == ["OK"] * 6
        kinds = [event.kind for event in report.events]
        assert kinds.count("disk-out") >= 2
        assert kinds.count("disk-back") >= 2
        assert pool.scrub().different == 0
    paths[2].unlink()  # never comes back
    with Pool.open("p") as pool:
        report = pool.repair()
        assert not report.jobs, report.refused
        pool.remove_disk("d2")
        assert pool.scrub().different == 0
        assert pool.report().spaces[0].status == "OK"
    assert not vhdx.check(image).errors


def test_a_served_pool_is_asked_through_its_server(tmp_path):
    paths = [tmp_path / f"d{i}.img" for i in range(4)]
    specs = [DiskSpec(f"d{i}", path, 256 * MIB) for i, path in enumerate(paths)]
    with Pool.create("p", specs, slab=4 * MIB, retire_seconds=3600) as pool:
        pool.create_space("s", 100 * MIB, copies=2, columns=1)
    image = "space://p/s/disk.vhdx"
    vhdx.create(image, 64 * MIB, block_size=MIB)
    time.sleep(0.7)

    def run(*command: str) -> str:
        done = subprocess.run([*VHDX, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with vhdx.serve({"disk": image}):
        assert "d3" in run("pool", "status", "p")
        assert "virtual_size" in run("info", image, "--json")
        run("resize", image, "80M")
        run("pool", "add", "p", "--disk", f"d4={tmp_path / 'd4.img'}:256M")
        paths[0].unlink()
        run("pool", "repair", "p")
        run("pool", "remove", "p", "d0")
        run("pool", "usage", "p", "d1", "spare")
        run("pool", "usage", "p", "d1", "auto")
        run("space", "create", "p", "t", "--size", "20M", "--raw")
        run("space", "resize", "p", "t", "40M")
        run("space", "delete", "p", "t", "--force")
        assert "all copies are equal" in run("pool", "scrub", "p")
    time.sleep(0.7)
    with Pool.open("p") as pool:
        assert [disk.name for disk in pool.report().disks] == ["d1", "d2", "d3", "d4"]
        assert pool.space_names() == ["s"]
