# SPDX-License-Identifier: MIT
"""Images that Windows, Hyper-V, Disk2vhd and QEMU made: their known content, and nothing changed."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from pathlib import PureWindowsPath
from uuid import UUID

import pytest

import vhdx
from tests.images import edit_headers
from vhdx.format import header
from vhdx.units import MIB

WHOLE = {
    "iotest-dynamic-1G.vhdx": "d3d112d8dab7fd360609f7d5a7b769904b7a2a7d7b6b8c535f65a23293c05478",
    "iotest-dirtylog-10G-4M.vhdx": "179cefe8b0587f123393eedf2aa7aa8d25798591178e6bc3950a09762f38f96f",
    "test-disk2vhd.vhdx": "96d964042be9b58dda1725567abfb0cf9fd8380e2118754afa979c2ad445938a",
    "vhdx-log-replay.vhdx": "3ba3b309425b7ff5e8e0199edceed95226250f880c53b24e8eae93865f3fad5e",
    "dynamic.vhdx": "8e2b5e9265d694b42b81819e3bff29770eff4ed0f4f9f311693ff3dbdc93efac",
}
DIRTY = {"iotest-dirtylog-10G-4M.vhdx", "vhdx-log-replay.vhdx"}


def whole_hash(disk) -> str:
    digest, zeros = hashlib.sha256(), bytes(4 * MIB)
    for extent in disk.extents():
        for at in range(extent.offset, extent.offset + extent.length, len(zeros)):
            n = min(len(zeros), extent.offset + extent.length - at)
            stored = extent.state is vhdx.ExtentState.DATA
            digest.update(disk.pread(n, at) if stored else zeros[:n])
    return digest.hexdigest()


def file_hash(path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("name", WHOLE)
def test_whole_content(name, sample):
    path = sample(name)
    before = file_hash(path)
    with vhdx.open(path) as disk:
        assert whole_hash(disk) == WHOLE[name]
        assert disk.describe()["log_dirty"] == (name in DIRTY)
    assert file_hash(path) == before  # not one byte, dirty or not


@pytest.mark.parametrize("name", sorted(DIRTY))
def test_replay_into_the_file(name, sample, peer):
    path = sample(name)
    with vhdx.open(path) as disk:
        guid = disk.describe()["data_write_id"]
    with vhdx.open(path, "r+") as disk:
        assert whole_hash(disk) == WHOLE[name]
    with vhdx.open(path) as disk:
        facts = disk.describe()
        assert whole_hash(disk) == WHOLE[name]
    assert not facts["log_dirty"]
    assert facts["data_write_id"] == guid  # replay alone changes nothing that a child could see
    peer("qemu-img")
    subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_sparse_content_of_lvm2(sample):
    path, digest = sample("lvm2.vhdx"), hashlib.sha256()
    with vhdx.open(path) as disk:
        counts = disk.describe()["blocks"]
        for extent in disk.extents():
            if extent.state is vhdx.ExtentState.DATA:
                end = extent.offset + extent.length
                for at in range(extent.offset, end, disk.block_size):
                    digest.update(struct.pack("<Q", at // disk.block_size))
                    digest.update(disk.pread(disk.block_size, at))
    assert digest.hexdigest() == "ee46cfd82c7139dced15194530569c1ed0ff8ffa6a193b0a863383c2440dc86c"
    assert counts == {
        "not_present": 238,
        "undefined": 0,
        "zero": 39,
        "unmapped": 25,
        "fully_present": 18,
        "partially_present": 0,
    }


def test_hyper_v_checkpoint_alone(sample):
    """Only its own sectors; every other one raises."""
    path, digest, sectors = sample("differencing.avhdx"), hashlib.sha256(), 0
    with vhdx.open(path, chain=False) as disk:
        for extent in disk.extents():
            if extent.depth != 0:
                with pytest.raises(vhdx.MissingParentError):
                    disk.pread(1, extent.offset)
                continue
            for at in range(extent.offset, extent.offset + extent.length, 512):
                digest.update(struct.pack("<Q", at // 512) + disk.pread(512, at))
                sectors += 1
        info = disk.describe()
    assert sectors == 6200
    assert digest.hexdigest() == "2185d7f6039a06064e39d5ab5469c6ba34a5ce7c55a4a304fcd2fae8e13a9a06"
    assert info["type"] == "differencing"
    assert info["parent"]["found"] is None


def test_hyper_v_checkpoint_is_written_on_a_parent(sample, tmp_path):
    """The parent is synthesised: a disk of the same size under the linkage that the child names."""
    path = sample("differencing.avhdx")
    with vhdx.open(path, chain=False) as disk:
        size, info = disk.size, disk.describe()["parent"]
        own = [e for e in disk.extents() if e.depth == 0]
    parent = tmp_path / PureWindowsPath(info["path"]).name
    vhdx.create(parent, size)
    with vhdx.open(parent, "r+") as disk:
        for extent in own:
            disk.pwrite(b"P" * 4096, extent.offset // 4096 * 4096)
            disk.pwrite(b"P" * 4096, (extent.offset + extent.length) // 4096 * 4096)
    linkage = UUID(info["linkage"][0])
    edit_headers(parent, lambda h: header.Header(**{**vars(h), "data_write_guid": linkage}))

    def sectors(skip=()):
        digest = hashlib.sha256()
        with vhdx.open(path) as disk:
            for extent in own:
                for at in range(extent.offset, extent.offset + extent.length, 512):
                    data = bytes(512) if at in skip else disk.pread(512, at)
                    digest.update(struct.pack("<Q", at // 512) + data)
        return digest.hexdigest()

    assert sectors() == "2185d7f6039a06064e39d5ab5469c6ba34a5ce7c55a4a304fcd2fae8e13a9a06"
    before = sectors({own[0].offset})
    behind = own[-1].offset + own[-1].length
    with vhdx.open(path, "r+") as disk:
        expected = bytearray(disk.pread(1 << 20, behind))
        assert b"P" in expected
        disk.pwrite(b"new!" * 128, own[0].offset)
        disk.pwrite(b"more" * 256, behind + 1000)  # starts and ends inside a sector
        disk.pwrite(b"far!" * 1024, size - 4096)
    expected[1000:2024] = b"more" * 256
    assert sectors({own[0].offset}) == before
    with vhdx.open(path) as disk:
        assert disk.pread(512, own[0].offset) == b"new!" * 128
        assert disk.pread(1 << 20, behind) == expected
        assert disk.pread(4096, size - 4096) == b"far!" * 1024
    assert vhdx.check(path).errors == 0
    reference = subprocess.run(
        [sys.executable, "-c", READ_CHAIN, parent, path, str(own[0].offset), str(behind + 1024)],
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    assert reference == b"new!" * 128 + bytes(expected[1024:1536])


READ_CHAIN = """
import pyvhdi, sys
parent, child = pyvhdi.file(), pyvhdi.file()
parent.open(sys.argv[1]); child.open(sys.argv[2]); child.set_parent(parent)
for at in sys.argv[3:]:
    sys.stdout.buffer.write(child.read_buffer_at_offset(512, int(at)))
"""


def test_converting_a_layer_alone_fails_rather_than_leaving_zeros(sample, tmp_path):
    with pytest.raises(vhdx.MissingParentError):
        vhdx.convert(sample("differencing.avhdx"), tmp_path / "out.raw", chain=False)
    assert not (tmp_path / "out.raw").exists()


def test_hyper_v_checkpoint_without_its_parent_is_refused(sample):
    with pytest.raises(vhdx.MissingParentError, match=r"Generation 1_.*--parent-dir"):
        vhdx.open(sample("differencing.avhdx"))


@pytest.mark.parametrize("name", ["iotest-dynamic-1G.vhdx", "test-disk2vhd.vhdx", "dynamic.vhdx"])
def test_qemu_img_compares_equal(name, sample, peer, tmp_path):
    peer("qemu-img")
    path, raw = sample(name), tmp_path / "ours.raw"
    vhdx.convert(path, raw)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "vhdx", "-F", "raw", path, raw], check=True)


@pytest.mark.parametrize("name", ["test-disk2vhd.vhdx", "dynamic.vhdx", "lvm2.vhdx"])
def test_writing_to_images_of_others(name, sample, peer, tmp_path):
    """Our writes into their images: their readers see them, and nothing else changed."""
    peer("qemu-img")
    path = sample(name)
    with vhdx.open(path, "r+") as disk:
        before = {at: disk.pread(4096, at) for at in range(0, disk.size, disk.size // 64)}
        middle = disk.size // 2 // 4096 * 4096 + 512
        disk.pwrite(b"ours" * 1024, middle)
    with vhdx.open(path) as disk:
        assert disk.pread(4096, middle) == b"ours" * 1024
        for at, data in before.items():
            if abs(at - middle) > 4096:
                assert disk.pread(4096, at) == data
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    raw = tmp_path / "ours.raw"
    vhdx.convert(path, raw)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "vhdx", "-F", "raw", path, raw], check=True)


def test_vhdiinfo_reads_what_we_create(tmp_path, peer):
    peer("vhdiinfo")
    path = tmp_path / "disk.vhdx"
    vhdx.create(path, 100 * MIB, logical_sector_size=4096)
    text = subprocess.run(["vhdiinfo", path], capture_output=True, text=True, check=True).stdout
    assert "Dynamic" in text
    assert "104857600" in text
