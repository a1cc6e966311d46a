# SPDX-License-Identifier: MIT
"""What was flushed survives a kill followed by QEMU, which searches the log in its own way."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

import vhdx
from vhdx.units import MIB

_WRITER = """
import os, signal, sys, vhdx
MIB = 1 << 20
disk = vhdx.open(sys.argv[1], "r+")
for block in range(int(sys.argv[2])):
    disk.pwrite(bytes([block % 255 + 1]) * 4096, block * MIB)
    disk.flush()
exec(sys.argv[3])
os.kill(os.getpid(), signal.SIGKILL)
"""

# Entries of one page take 8 KiB, so the log of 1 MiB begins anew after 126 of them.
CASES = {
    "one wrap": (128, "", range(128)),
    "two wraps": (254, "", range(254)),
    "three wraps": (381, "", range(381)),
    "cut by a compaction": (20, "disk.trim(10 * MIB, 10 * MIB); disk.compact()", range(10)),
    "blocks moved": (20, "disk.trim(0, 10 * MIB); disk.compact()", range(10, 20)),
    "moved and written": (
        20,
        "disk.trim(0, 10 * MIB); disk.compact(); disk.pwrite(b'x' * 4096, 30 * MIB); disk.flush()",
        range(10, 20),
    ),
    "grown": (20, "disk.resize(2 << 30)", range(20)),
    "shrunk and grown": (
        20,
        "disk.resize(10 * MIB, shrink=True, unsafe=True); disk.resize(1 << 30)",
        range(10),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_flushed_blocks_survive_a_kill_and_qemu(case, fast_path, peer):
    peer("qemu-io")
    count, then, kept = CASES[case]
    path = fast_path / "a.vhdx"
    vhdx.create(path, 1 << 30, block_size=MIB)
    done = subprocess.run([sys.executable, "-c", _WRITER, path, str(count), then], timeout=120)
    assert done.returncode == -signal.SIGKILL
    reads = [f"read -P {block % 255 + 1} {block * MIB} 4096" for block in kept]
    gone = [block for block in range(count) if block not in kept]
    reads += [f"read -P 0 {block * MIB} 4096" for block in gone]
    commands = [word for read in reads for word in ("-c", read)]
    done = subprocess.run(
        ["qemu-io", "-f", "vhdx", *commands, path], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "verification failed" not in done.stdout
    with vhdx.open(path) as disk:
        for block in range(count):
            wanted = bytes([block % 255 + 1] if block in kept else [0]) * 4096
            assert disk.pread(4096, block * MIB) == wanted, block
