# SPDX-License-Identifier: MIT
"""make demo: the main job on real input, with a word on every step and the time it took."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import vhdx

BIN = Path(sys.executable).parent
CHUNK = 1 << 20


def say(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)


def run(*command: str | Path, timeout: float = 120) -> str:
    result = subprocess.run(
        [str(each) for each in command],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    if result.returncode != 0:
        sys.exit(f"demo: {command[0]} failed: {result.stderr or result.stdout}")
    return result.stdout


def main() -> None:
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="vhdx-demo-"))
    try:
        image, tree, raw = work / "disk.vhdx", work / "tree", work / "file-system.raw"
        run(BIN / "vhdx", "create", image, "--size", "1G")
        say(began, f"created {image.name}: 1 GiB, dynamic, {image.stat().st_size >> 20} MiB long")

        shutil.copytree("/usr/share/doc", tree, symlinks=True)
        (tree / "hello.txt").write_text("hello from a VHDX on Linux\n")
        (tree / "random.bin").write_bytes(os.urandom(8 << 20))
        raw.touch()
        os.truncate(raw, 1 << 30)
        run("/sbin/mkfs.ext4", "-q", "-d", tree, raw)
        say(began, f"made an ext4 file system of {sum(1 for _ in tree.rglob('*'))} real files")

        with vhdx.serve({"disk": image}) as server:
            say(began, f"serving at {server.uri}")
            print(run("nbdinfo", server.uri).split("contexts:")[0].rstrip())
            run("nbdcopy", "--flush", raw, server.uri)
            say(began, "nbdcopy wrote the file system to the image over NBD")
            back = work / "back.raw"
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, back)
            say(began, "qemu-img read it back over NBD")
            same = run("cmp", raw, back) == ""
            say(began, f"the same, byte for byte: {same}")
            back.unlink()

        back = work / "python.raw"
        with vhdx.open(image) as disk, back.open("wb") as out:
            for offset in range(0, disk.size, CHUNK):
                out.write(disk.pread(min(CHUNK, disk.size - offset), offset))
            stored = sum(e.length for e in disk.extents() if e.state is vhdx.ExtentState.DATA)
        say(began, f"Python read the disk; {stored >> 20} MiB of it are stored")
        text = run("/sbin/debugfs", "-R", "cat /hello.txt", back)
        say(began, f"a file from inside: {text.strip()}")
        run("/sbin/e2fsck", "-fn", back)
        say(began, "e2fsck finds nothing to complain about")
        print(run("qemu-img", "check", image).strip())

        samples = Path(os.environ.get("VHDX_TEST_DATA", "../shared")) / "images"
        packed = samples / "lvm2.vhdx.gz"
        if packed.exists():
            windows = work / "lvm2.vhdx"
            with windows.open("wb") as out:
                subprocess.run(["gzip", "-dc", packed], stdout=out, check=True)
            print(run(BIN / "vhdx", "info", windows).rstrip())
            say(began, "that image was made by Windows")
        print(f"done in {time.monotonic() - began:.1f} s")
    finally:
        shutil.rmtree(work, ignore_errors=True)


main()
