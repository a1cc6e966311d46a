# SPDX-License-Identifier: MIT
"""Released space goes back without a flush; a file never gets much longer than its disk."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

import vhdx
from vhdx.units import MIB


def allocated(path) -> int:
    return os.stat(path).st_blocks * 512


def wait_until_below(path, limit: int) -> None:
    deadline = time.monotonic() + 30
    while allocated(path) >= limit:
        assert time.monotonic() < deadline, f"{allocated(path)} bytes are still allocated"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["a.vhdx", "a.vhd"])
def test_idle_disk_gives_trimmed_space_back(tmp_path, name):
    path = tmp_path / name
    vhdx.create(path, 64 * MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(os.urandom(32 * MIB), 0)
        disk.flush()
        full = allocated(path)
        disk.trim(0, 64 * MIB)
        wait_until_below(path, full - 30 * MIB)


def test_space_goes_back_when_the_client_leaves(tmp_path, peer):
    peer("qemu-io")
    path = tmp_path / "a.vhdx"
    vhdx.create(path, 64 * MIB, block_size=MIB)
    with vhdx.serve({"a": path}) as server:
        for command in ("write -P 1 0 32M", "discard 0 32M"):
            done = subprocess.run(
                ["qemu-io", "-f", "raw", "-t", "unsafe", "-c", command, server.uri],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
        wait_until_below(path, 16 * MIB)


WORK = """
import os, random, sys, vhdx
MIB = 1 << 20
path, compacts = sys.argv[1], sys.argv[2] == "True"
disk, rng, longest = vhdx.open(path, "r+"), random.Random(1), 0
for _ in range(8):
    for step in range(200):
        at = rng.randrange(24) * MIB
        if rng.random() < 0.5:
            disk.trim(at, MIB)
        else:
            disk.pwrite(b"x" * 4096, at)
        if step % 5 == 0:
            disk.flush()
        longest = max(longest, os.path.getsize(path))
    if compacts:
        disk.compact()
print(longest, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("name", "compacts"), [("a.vhdx", True), ("a.vhdx", False), ("a.vhd", False)]
)
def test_file_stays_near_the_size_of_its_disk(tmp_path, name, compacts):
    path = tmp_path / name
    vhdx.create(path, 24 * MIB, block_size=MIB)
    command = [sys.executable, "-c", WORK, path, str(compacts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 3 * 24 * MIB, done.stderr
    assert path.stat().st_size < 3 * 24 * MIB


def test_file_is_bounded_when_nobody_flushes(tmp_path):
    path, rng = tmp_path / "a.vhdx", random.Random(2)
    vhdx.create(path, 64 * MIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        for _ in range(1000):
            at = rng.randrange(64) * MIB
            disk.trim(at, MIB)
            disk.pwrite(b"y" * 512, at)
            time.sleep(0.0005)
        assert path.stat().st_size < 1024 * MIB
