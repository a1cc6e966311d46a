# SPDX-License-Identifier: MIT
"""Valid images that no tool makes: read, replayed, written and checked."""

from __future__ import annotations

import subprocess

import pytest

import vhdx
from tests.reference import read_reference
from tests.unusual import generate

ROUNDS = 12
EACH = 8


def written(path, image):
    path.write_bytes(image.data)
    return path


@pytest.mark.parametrize("start", range(0, ROUNDS * EACH, EACH))
def test_unusual_images(tmp_path, start):
    dirty = 0
    for seed in range(start, start + EACH):
        image = generate(seed)
        dirty += image.dirty
        path = written(tmp_path / f"{seed}.vhdx", image)
        with vhdx.open(path) as disk:
            assert disk.size == len(image.content), seed
            assert disk.pread(disk.size, 0) == image.content, seed
            assert disk.describe()["log_dirty"] == image.dirty
        assert path.read_bytes() == image.data
        assert read_reference(bytearray(image.data)).read(0, len(image.content)) == image.content
        report = vhdx.check(path)
        assert report.errors == 0, (seed, report.findings)
        change(path, image, seed)
    assert dirty


def change(path, image, seed):
    """Written, closed, and everything that nobody knows is still there."""
    length = min(5000, len(image.content))
    for at in (0, len(image.content) - length):
        image.content[at : at + length] = bytes([seed % 255 + 1]) * length
    with vhdx.open(path, "r+") as disk:
        for at in (0, len(image.content) - length):
            disk.pwrite(image.content[at : at + length], at)
    data = path.read_bytes()
    assert read_reference(bytearray(data)).read(0, len(image.content)) == image.content, seed
    for at, kept in image.unknown.items():
        assert data[at : at + len(kept)] == kept, (seed, hex(at))
    assert vhdx.check(path).errors == 0, seed


def test_qemu_img_reads_the_same(tmp_path, peer):
    """Of those it opens: it knows 512 bytes a sector, and wants its regions and items alone."""
    peer("qemu-img")
    opened = 0
    for seed in range(300, 340):
        image = generate(seed)
        path = written(tmp_path / "image.vhdx", image)
        vhdx.open(path, "r+").close()
        raw = tmp_path / "raw"
        raw.write_bytes(image.content)
        command = ["qemu-img", "compare", "-f", "vhdx", "-F", "raw", path, raw]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        opened += done.returncode == 0
        assert done.returncode in {0, 2}, (seed, done.stdout, done.stderr)
    assert opened > 3
