# SPDX-License-Identifier: MIT
"""A GPT's second copy when its disk gets another size, as sfdisk sees it."""

from __future__ import annotations

import random
import subprocess
import zlib

import pytest

import vhdx
from tests.recording import Recorder, crash_states, open_recorded
from vhdx.units import MIB

LABEL = "label: gpt\nstart=2048,size=40960,name=first\nstart=43008,size=2048,name=second\n"
LAST = 45056 * 512  # the first byte behind the last partition


@pytest.fixture
def disk(tmp_path, peer):
    peer("sfdisk")
    raw, path = tmp_path / "g.raw", tmp_path / "g.vhdx"
    with raw.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["sfdisk", "-q", raw], input=LABEL, text=True, check=True)
    vhdx.convert(raw, path, block_size=MIB)
    return path


def partitions(path, tmp_path) -> str:
    """What sfdisk lists, and nothing that it complains about."""
    raw = tmp_path / "look.raw"
    vhdx.convert(path, raw, force=True)
    done = subprocess.run(["sfdisk", "-d", raw], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return "\n".join(
        line.partition(" : ")[2] for line in done.stdout.splitlines() if line.startswith(str(raw))
    )


@pytest.mark.parametrize("size", [32 * MIB, LAST + 33 * 512, 128 * MIB])
def test_a_moved_gpt_is_whole(disk, tmp_path, size):
    before = partitions(disk, tmp_path)
    assert before.count("start=") == 2
    assert vhdx.resize(disk, size, shrink=True, move_gpt=True) is None
    assert partitions(disk, tmp_path) == before
    verify = subprocess.run(
        ["sfdisk", "--verify", tmp_path / "look.raw"], capture_output=True, text=True
    )
    assert "No errors detected" in verify.stdout, verify.stdout + verify.stderr


def test_a_shrink_that_would_cut_the_copy_off_is_refused(disk, tmp_path):
    before = disk.read_bytes()
    with pytest.raises(vhdx.InvalidArgumentError, match="second copy at the end") as refused:
        vhdx.resize(disk, 32 * MIB, shrink=True)
    assert "--move-gpt" in str(refused.value)
    with pytest.raises(vhdx.InvalidArgumentError, match="least size"):
        vhdx.resize(disk, LAST, shrink=True, move_gpt=True)
    with vhdx.open(disk) as image:
        assert image.size == 64 * MIB
    assert len(disk.read_bytes()) == len(before)


def test_a_live_grow_says_that_the_guest_has_to_move_it(disk):
    with vhdx.serve({"d": disk}):
        assert "the guest has to move it" in vhdx.resize(disk, 80 * MIB)
        with pytest.raises(vhdx.InUseError, match="a guest may use its GPT"):
            vhdx.resize(disk, 96 * MIB, move_gpt=True)


def test_a_disk_without_gpt_has_nothing_to_move(tmp_path):
    path = tmp_path / "d.vhdx"
    vhdx.create(path, 8 * MIB)
    assert vhdx.resize(path, 16 * MIB, move_gpt=True) is None
    assert vhdx.resize(path, 8 * MIB, shrink=True, unsafe=True, move_gpt=True) is None


@pytest.mark.parametrize("where", ["header", "entries"])
def test_a_damaged_gpt_is_not_moved(disk, where):
    with vhdx.open(disk, "r+") as image:
        image.pwrite(b"\xff" * 16, 512 + 40 if where == "header" else 1024 + 32)
    with pytest.raises(vhdx.InvalidArgumentError):
        vhdx.resize(disk, 32 * MIB, shrink=True, move_gpt=True)
    with vhdx.open(disk) as image:
        assert image.size == 64 * MIB


@pytest.mark.parametrize("size", [24 * MIB, 72 * MIB])
def test_a_crash_while_it_is_moved_leaves_a_whole_one(disk, tmp_path, size):
    recorder = Recorder(disk.read_bytes())
    with open_recorded(recorder) as image:
        image.resize(size, shrink=True, move_gpt=True)
    seen = 0
    for _, data in crash_states(recorder, random.Random(1), 1):
        with open_recorded(Recorder(data, recording=False), write=False) as image:
            primary = image.pread(512, 512)
            raw = tmp_path / "look.raw"
            with raw.open("wb") as file:
                file.truncate(image.size)
                for at in (
                    *range(0, 20 * 1024, 512),
                    *range(image.size - 20 * 1024, image.size, 512),
                ):
                    file.seek(at)
                    file.write(image.pread(512, at))
        assert primary[:8] == b"EFI PART"
        if seen % 5 == 0:
            done = subprocess.run(["sfdisk", "-d", raw], capture_output=True, text=True)
            assert done.stdout.count("start=") == 2, done.stderr
        seen += 1
    assert seen > 20


def test_a_move_is_made_up_for_at_the_same_size(disk, tmp_path):
    before = partitions(disk, tmp_path)
    assert "--move-gpt" in vhdx.resize(disk, 96 * MIB)
    assert vhdx.resize(disk, 96 * MIB, move_gpt=True) is None
    assert partitions(disk, tmp_path) == before
    assert vhdx.resize(disk, 96 * MIB, move_gpt=True) is None


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(84, bytes(4), id="entries of no size"),
        pytest.param(84, (132).to_bytes(4, "little"), id="entries of an odd size"),
        pytest.param(72, (1).to_bytes(8, "little"), id="entries over the header"),
        pytest.param(72, (40).to_bytes(8, "little"), id="entries in the first partition"),
    ],
)
def test_entries_that_cannot_be_are_refused(disk, at, value):
    with vhdx.open(disk, "r+") as image:
        header = bytearray(image.pread(512, 512))
        header[at : at + len(value)] = value
        start, count = (
            int.from_bytes(header[72:80], "little"),
            int.from_bytes(header[80:84], "little"),
        )
        total = count * int.from_bytes(header[84:88], "little")
        header[88:92] = zlib.crc32(image.pread(total, start * 512)).to_bytes(4, "little")
        header[16:20] = bytes(4)
        header[16:20] = zlib.crc32(header[:92]).to_bytes(4, "little")
        image.pwrite(header, 512)
    with pytest.raises(vhdx.InvalidArgumentError, match="GPT"):
        vhdx.resize(disk, 32 * MIB, shrink=True, move_gpt=True)
