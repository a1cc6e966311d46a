# SPDX-License-Identifier: MIT
"""Legacy VHD: against a model, against qemu-img and libvhdi, after crashes, and damaged."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from dataclasses import replace
from uuid import UUID, uuid4

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import vhdx
from tests.recording import Handle, History, Recorder, crash_states, digest
from vhdx import plane
from vhdx.format import vhd
from vhdx.image.disk import Disk
from vhdx.image.host import HostFile
from vhdx.image.vhd import image as vhd_image
from vhdx.image.vhd import opening as vhd_opening
from vhdx.image.vhd.footer import find_footer
from vhdx.units import KIB, MIB

BLOCK = 512 * KIB
SIZE = 4 * MIB + 100 * KIB


def qemu(*arguments):
    return subprocess.run(
        ["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout


# ---- a model ----


class VhdMachine(RuleBasedStateMachine):
    """An image and a bytearray do the same."""

    path = f"/dev/shm/vhdx-model-{os.getpid()}.vhd"

    @initialize(kind=st.sampled_from(["dynamic", "fixed"]), size=st.integers(1, 5000))
    def create(self, kind, size):
        self.size = size * 512
        self.kind = kind
        vhdx.create(self.path, self.size, type=kind, block_size=BLOCK, force=True)
        self.model = bytearray(self.size)
        self.disk = vhdx.open(self.path, "r+")

    def span(self, data, longest):
        offset = data.draw(st.integers(0, self.size - 1))
        return offset, data.draw(st.integers(0, min(longest, self.size - offset)))

    @rule(data=st.data(), value=st.integers(1, 255))
    def write(self, data, value):
        offset, length = self.span(data, 700 * KIB)
        self.disk.pwrite(bytes([value]) * length, offset)
        self.model[offset : offset + length] = bytes([value]) * length

    @rule(data=st.data())
    def zero(self, data):
        offset, length = self.span(data, self.size)
        self.disk.zero(offset, length)
        self.model[offset : offset + length] = bytes(length)

    @rule(data=st.data())
    def trim_and_write(self, data):
        offset, length = self.span(data, self.size)
        self.disk.trim(offset, length)
        self.disk.pwrite(b"t" * length, offset)
        self.model[offset : offset + length] = b"t" * length

    @rule()
    def flush(self):
        self.disk.flush()

    @rule()
    def reopen(self):
        self.disk.close()
        self.disk = vhdx.open(self.path, "r+")

    @invariant()
    @precondition(lambda self: hasattr(self, "disk"))
    def same(self):
        assert self.disk.pread(self.size, 0) == self.model

    def teardown(self):
        if not hasattr(self, "disk"):
            return
        self.disk.close()
        raw = self.path + ".raw"
        with open(raw, "wb") as file:
            file.write(self.model)
        qemu("compare", "-f", "vpc", "-F", "raw", self.path, raw)
        os.unlink(raw)
        os.unlink(self.path)


TestVhdModel = VhdMachine.TestCase
TestVhdModel.settings = settings(
    settings.get_profile("test"), max_examples=40, stateful_step_count=20
)


@pytest.fixture(autouse=True)
def needs_qemu(peer):
    peer("qemu-img")


# ---- peers ----


@pytest.fixture
def content(tmp_path):
    path = tmp_path / "content.raw"
    data = bytearray(random.Random(7).randbytes(9 * MIB))
    data[2 * MIB : 5 * MIB] = bytes(3 * MIB)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_qemu_img_reads_what_we_wrote(tmp_path, content, kind):
    ours = tmp_path / "ours.vhd"
    vhdx.convert(content, ours, type=kind)
    assert '"virtual-size": 9437184' in qemu("info", "--output=json", "-f", "vpc", ours)
    qemu("compare", "-f", "vpc", "-F", "raw", ours, content)
    if kind == "dynamic":
        assert ours.stat().st_size < 9 * MIB  # the zeros are not stored


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
@pytest.mark.parametrize("target", ["vhdx", "vhd", "raw"])
def test_qemu_imgs_images_are_read_and_converted(tmp_path, content, kind, target):
    theirs, ours = tmp_path / "theirs.vhd", tmp_path / f"ours.{target}"
    qemu(
        *["convert", "-f", "raw", "-O", "vpc", "-o", f"subformat={kind},force_size=on"],
        content,
        theirs,
    )
    with vhdx.open(theirs) as disk:
        assert disk.format == "vhd"
        assert disk.pread(disk.size, 0) == content.read_bytes()
    vhdx.convert(theirs, ours)
    with vhdx.open(ours) as disk:
        assert disk.pread(disk.size, 0) == content.read_bytes()


def test_qemu_imgs_images_are_written(tmp_path, content):
    theirs = tmp_path / "theirs.vhd"
    qemu("convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", content, theirs)
    with vhdx.open(theirs, "r+") as disk:
        disk.pwrite(b"new" * 1000, 3 * MIB + 17)
        disk.zero(6 * MIB, 2 * MIB)
    with content.open("r+b") as file:
        file.seek(3 * MIB + 17)
        file.write(b"new" * 1000)
        file.seek(6 * MIB)
        file.write(bytes(2 * MIB))
    qemu("compare", "-f", "vpc", "-F", "raw", theirs, content)


def test_sizes_that_geometry_cannot_say(tmp_path):
    for number, size in enumerate((512, 68 * MIB + 512, 3 * 2**30 + 512, 200 * 2**30, 2040 * 2**30)):
        path = tmp_path / f"{number}.vhd"
        vhdx.create(path, size)
        assert f'"virtual-size": {size},' in qemu("info", "--output=json", "-f", "vpc", path)
        with vhdx.open(path) as disk:
            assert disk.size == size
    with pytest.raises(vhdx.InvalidArgumentError, match="sector to"):
        vhdx.create(tmp_path / "x.vhd", 2041 * 2**30)


def test_azure_gets_a_fixed_image_of_whole_mebibytes(tmp_path):
    source, ours = tmp_path / "source.raw", tmp_path / "azure.vhd"
    source.write_bytes(b"a" * (3 * MIB + 700))
    padded = vhdx.convert(source, ours, azure=True)
    assert padded == MIB - 700
    assert ours.stat().st_size == 4 * MIB + 512
    footer = vhd.parse_footer(ours.read_bytes()[-512:])
    assert footer.disk_type == vhd.DiskType.FIXED
    assert footer.geometry == vhd.geometry_of(4 * MIB)
    assert '"virtual-size": 4194304,' in qemu("info", "--output=json", "-f", "vpc", ours)
    with vhdx.open(ours) as disk:
        assert disk.pread(disk.size, 0) == source.read_bytes() + bytes(padded)


def make_child(path, parent, written):
    """A differencing image: sectors of the whole disk, by number, and their content."""
    with vhdx.open(parent) as disk:
        size, parent_id = disk.size, disk.describe()["disk_id"]
    footer = vhd.new_footer(size, vhd.DiskType.DIFFERENCING, vhd.UUID(int=77)).pack()
    names = [(b"W2ru", f".\\{parent.name}".encode("utf-16-le"))]
    entries = -(-size // BLOCK)
    header = bytearray(
        vhd.DynamicHeader(2048, entries, BLOCK, vhd.UUID(parent_id), parent_name=parent.name).pack()
    )
    at = 1536
    struct.pack_into(">4sIII Q", header, 576, names[0][0], 512, len(names[0][1]), 0, at)
    header[36:40] = bytes(4)
    struct.pack_into(">I", header, 36, ~sum(header) & 0xFFFFFFFF)
    image = bytearray(footer + header + names[0][1].ljust(512, b"\0"))
    table = [vhd.UNUSED] * (-(-entries // 128) * 128)
    image += bytes(4 * len(table))
    for sector, data in sorted(written.items()):
        block, within = divmod(sector, BLOCK // 512)
        if table[block] == vhd.UNUSED:
            table[block] = len(image) // 512
            image += bytes(vhd.bitmap_length(BLOCK) + BLOCK)
        base = table[block] * 512
        image[base + within // 8] |= 0x80 >> within % 8
        start = base + vhd.bitmap_length(BLOCK) + within * 512
        image[start : start + 512] = data
    image[2048 : 2048 + 4 * len(table)] = struct.pack(f">{len(table)}I", *table)
    path.write_bytes(bytes(image) + footer)


def make_chain(tmp_path, run):
    """A parent and a child that stores runs of ``run`` sectors, and what it reads as."""
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    vhdx.create(parent, SIZE, block_size=BLOCK)
    expected = bytearray(random.Random(1).randbytes(SIZE))
    with vhdx.open(parent, "r+") as disk:
        disk.pwrite(expected, 0)
    rng = random.Random(2)
    starts = [rng.randrange(SIZE // 512 // run) * run for _ in range(900 // run)]
    written = {start + i: rng.randbytes(512) for start in starts for i in range(run)}
    make_child(child, parent, written)
    for sector, data in written.items():
        expected[sector * 512 : sector * 512 + 512] = data
    return parent, child, expected


def test_differencing_images_are_read(tmp_path):
    parent, child, expected = make_chain(tmp_path, 1)
    with vhdx.open(child) as disk:
        assert disk.pread(disk.size, 0) == expected
        assert [layer["path"] for layer in disk.chain] == [str(child), str(parent)]
        assert disk.describe()["parent"]["found"] == str(parent)
    vhdx.convert(child, tmp_path / "flat.vhdx")
    with vhdx.open(tmp_path / "flat.vhdx") as disk:
        assert disk.pread(disk.size, 0) == expected
    with pytest.raises(vhdx.UnsupportedError, match="only read"):
        vhdx.open(child, "r+")
    with vhdx.open(child, chain=False) as disk, pytest.raises(vhdx.MissingParentError):
        disk.pread(disk.size, 0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    parent.rename(elsewhere / parent.name)
    with pytest.raises(vhdx.MissingParentError, match="not found"):
        vhdx.open(child)
    with vhdx.open(child, parent_search=[elsewhere]) as disk:
        assert disk.pread(disk.size, 0) == expected
    vhdx.create(parent, SIZE)
    with pytest.raises(vhdx.MissingParentError, match="another disk"):
        vhdx.open(child)


def test_libvhdi_reads_the_same_chain(tmp_path):
    """By single sectors, in runs that fill a byte of the bitmap; of others it gets more wrong."""
    pytest.importorskip("pyvhdi")
    parent, child, expected = make_chain(tmp_path, 8)
    program = (
        "import pyvhdi, sys\n"
        "p, c = pyvhdi.file(), pyvhdi.file()\n"
        "p.open(sys.argv[1]); c.open(sys.argv[2]); c.set_parent(p)\n"
        "for at in range(0, c.get_media_size(), 512):\n"
        "    sys.stdout.buffer.write(c.read_buffer_at_offset(512, at))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, parent, child], capture_output=True, check=True, timeout=60
    )
    assert done.stdout == expected


# ---- sector bitmaps ----


def test_sectors_that_were_never_written_are_zero_and_can_be_written(tmp_path):
    """Bit 0 says so, whatever the block holds ("Block Bitmap")."""
    path = tmp_path / "disk.vhd"
    vhdx.create(path, SIZE, block_size=BLOCK)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x" * BLOCK, 0)
    data = bytearray(path.read_bytes())
    entry = struct.unpack_from(">I", data, 1536)[0] * 512
    data[entry : entry + 128] = b"\x80" + bytes(127)
    path.write_bytes(data)
    with vhdx.open(path, "r+") as disk:
        assert disk.pread(BLOCK, 0) == b"x" * 512 + bytes(BLOCK - 512)
        disk.pwrite(b"y" * 512, 1536)
        disk.flush()
        assert path.read_bytes()[entry : entry + 2] == b"\x90\0"
        disk.pwrite(b"z" * (BLOCK - 512), 512)
    with vhdx.open(path) as disk:
        assert disk.pread(BLOCK, 0) == b"x" * 512 + b"z" * (BLOCK - 512)
    assert path.read_bytes()[entry : entry + 128] == b"\xff" * 128


# ---- crashes ----


def open_recorded(recorder, *, write=True):
    handle = Handle(recorder)
    leaf = plane.Callback(handle, len(recorder.data), read_only=not write)
    host = HostFile("recorded.vhd", leaf, read_only=not write, sparse=True, key=(0, 0), keep=True)
    host.allocated = lambda: len(recorder.data)
    footer = find_footer(leaf)
    assert footer is not None
    pool = plane.shared_pool(plane.Level.IMAGE)
    return Disk(
        vhd_opening.open_vhd(host, footer, write=write, chain=True, parent_search=(), pool=pool)
    )


def wrong_states(path, seed, *, without=None):
    recorder = Recorder(path.read_bytes(), jitter=seed)
    rng = random.Random(seed)
    history = History(recorder, bytes(SIZE))
    for _ in range(2):
        disk = open_recorded(recorder)
        for step in range(14):
            what = rng.choice(["write", "write", "write", "flush", "trim"])
            if what == "flush":
                history.flush(disk.flush)
            elif what == "trim":
                at = rng.randrange(SIZE // BLOCK) * BLOCK
                history.change(at, bytes(BLOCK), lambda at=at: disk.trim(at, BLOCK))  # noqa: B023
            else:
                at = rng.randrange(SIZE // 512 - 32) * 512
                data = bytes([step + 1]) * rng.choice([512, 4096, 16384])
                history.change(at, data, lambda at=at, data=data: disk.pwrite(data, at))  # noqa: B023
        history.flush(disk.close)
    seen, wrong = set(), []
    for now, data in crash_states(recorder, rng, 2, without=without):
        if digest(data) in seen:
            continue
        seen.add(digest(data))
        try:
            with open_recorded(Recorder(bytes(data), recording=False), write=now % 2 == 0) as disk:
                found = history.wrong(disk.pread(disk.size, 0), now)
        except (vhdx.VhdxError, AssertionError) as error:
            found = f"it does not open: {error!r}"
        if found:
            wrong.append((now, found))
            if without is not None:
                break
    return len(seen), wrong, {e.site for e in recorder.events if e.kind == "flush"}


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setattr(vhd_image, "_GRANT_BYTES", 2 * BLOCK)
    path = tmp_path / "empty.vhd"
    vhdx.create(path, SIZE, block_size=BLOCK)
    return path


def test_every_crash_state(empty):
    for seed in range(2):
        count, wrong, _ = wrong_states(empty, seed)
        assert wrong == []
        assert count > 100


def test_each_barrier_is_needed(empty):
    for damage in (False, True):
        if damage:  # of the copy at the start
            damaged(empty, 100, b"gone")
        sites = wrong_states(empty, 0)[2]
        assert len(sites) == (3 if damage else 2)
        needed = {s for s in sites if any(wrong_states(empty, n, without=s)[1] for n in range(6))}
        assert needed == sites


# ---- bad input ----


def damaged(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (512, b"bad", "no dynamic disk header"),
        (512 + 100, b"bad", "bad checksum"),
        (1536, struct.pack(">I", 0), "outside the file"),
        (1536, struct.pack(">I", 0x7FFFFFFF), "outside the file"),
    ],
)
def test_damage_is_refused(tmp_path, mode, at, data, message):
    path = tmp_path / "disk.vhd"
    vhdx.create(path, SIZE, block_size=BLOCK)
    damaged(path, at, data)
    before = path.read_bytes()
    with pytest.raises(vhdx.DamagedError, match=message) as caught, vhdx.open(path, mode) as disk:
        disk.pread(512, 0)
    assert caught.value.path == str(path)
    assert path.read_bytes() == before


def test_overlapping_blocks_are_not_written(tmp_path):
    path = tmp_path / "disk.vhd"
    vhdx.create(path, SIZE, block_size=BLOCK)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"1" * 512, 0)
        disk.pwrite(b"2" * 512, BLOCK)
    data = path.read_bytes()
    damaged(path, 1540, data[1536:1540])
    with pytest.raises(vhdx.DamagedError, match="overlaps another"):
        vhdx.open(path, "r+")
    damaged(path, 1540, struct.pack(">I", 1))
    with pytest.raises(vhdx.DamagedError, match="overlaps metadata"):
        vhdx.open(path, "r+")


def test_a_damaged_footer_is_found_at_the_start_and_written_again(tmp_path):
    path = tmp_path / "disk.vhd"
    vhdx.create(path, SIZE, block_size=BLOCK)
    damaged(path, path.stat().st_size - 512, b"gone" * 10)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x", 0)
    assert vhd.parse_footer(path.read_bytes()[-512:]) is not None
    damaged(path, 0, b"gone" * 10)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"y", 0)
    assert vhd.parse_footer(path.read_bytes()[:512]) is not None


def test_fixed_images_that_claim_more_than_the_file(tmp_path):
    path = tmp_path / "disk.vhd"
    vhdx.create(path, SIZE, type="fixed")
    footer = vhd.parse_footer(path.read_bytes()[-512:])
    lying = replace(footer, current_size=SIZE + 512, original=b"")
    damaged(path, SIZE, lying.pack())
    with pytest.raises(vhdx.DamagedError, match="more than the file"):
        vhdx.open(path)
    damaged(path, SIZE, replace(footer, current_size=0, original=b"").pack())
    with pytest.raises(vhdx.DamagedError, match="0 bytes"):
        vhdx.open(path)


def test_what_a_vhd_cannot_do_says_so(tmp_path):
    path = tmp_path / "disk.vhd"
    vhdx.create(path, SIZE)
    with vhdx.open(path, "r+") as disk:
        for attempt in (lambda: disk.resize(SIZE * 2), disk.snapshot, disk.compact):
            with pytest.raises(vhdx.UnsupportedError, match="convert it"):
                attempt()
    with pytest.raises(vhdx.InvalidArgumentError, match="512K, 1M or 2M"):
        vhdx.create(tmp_path / "b.vhd", SIZE, block_size=32 * MIB)
    with pytest.raises(vhdx.InvalidArgumentError, match="not made here"):
        vhdx.convert(path, tmp_path / "c.vhd", type="differencing")


def test_geometry_of_the_specification():
    assert vhd.geometry_of(100 * MIB) == (1003, 12, 17)
    assert vhd.geometry_of(2**30) == (2080, 16, 63)
    assert vhd.geometry_of(127 * 2**30) == (65278, 16, 255)
    assert np.prod(vhd.geometry_of(2**40)) == 65535 * 16 * 255


# ---- found by fresh eyes ----


class Failing:
    """A recorder whose batch of writes to the table fails once, in the middle."""

    def __init__(self, recorder, at):
        self._recorder, self.at = recorder, at

    def __getattr__(self, name):
        return getattr(self._recorder, name)

    def pwrite(self, data, offset):
        if offset == self.at:
            self.at = None
            raise vhdx.NoSpaceError("full", path="recorded.vhd")
        self._recorder.pwrite(data, offset)


def test_a_commit_that_failed_in_the_middle_leaves_nothing_behind(tmp_path):
    """The sectors of the table that it wrote are written again, whatever became of their blocks."""
    path = tmp_path / "disk.vhd"
    size = 400 * BLOCK
    vhdx.create(path, size, block_size=BLOCK)
    recorder = Recorder(path.read_bytes(), recording=False)
    table = 1536
    backend = Failing(recorder, table + 3 * 512)
    disk = open_recorded(backend)
    disk.pwrite(b"0" * 512, 0)
    disk.pwrite(b"3" * 512, 3 * 128 * BLOCK)
    with pytest.raises(vhdx.NoSpaceError):
        disk.flush()
    disk.trim(0, BLOCK)
    disk.flush()
    for block in range(130, 380):
        disk.pwrite(bytes([block % 251]) * 512, block * BLOCK)
    disk.close()
    with open_recorded(Recorder(bytes(recorder.data), recording=False)) as again:
        assert again.pread(512, 0) == bytes(512)
        assert again.pread(512, 3 * 128 * BLOCK) == b"3" * 512
        for block in range(130, 380):
            assert again.pread(512, block * BLOCK) == bytes([block % 251]) * 512


def test_misplaced_metadata_are_not_written_over(tmp_path):
    path = tmp_path / "disk.vhd"
    vhdx.create(path, SIZE, block_size=BLOCK)
    data = path.read_bytes()
    footer = vhd.parse_footer(data[:512])
    for header_at, table_at in ((0, 1536), (512, 1000), (512, 1792), (512, 0)):
        image = bytearray(data)
        packed = replace(footer, data_offset=header_at, original=b"").pack()
        header = vhd.DynamicHeader(table_at, -(-SIZE // BLOCK), BLOCK).pack()
        image[header_at : header_at + 1024] = header
        image[-512:] = packed
        path.write_bytes(image)
        with pytest.raises(vhdx.DamagedError):
            vhdx.open(path, "r+")
        assert path.read_bytes() == image


def test_a_parent_is_guarded(tmp_path):
    parent, child, expected = make_chain(tmp_path, 8)
    with pytest.raises(vhdx.InUseError, match=r"child\.vhd is based on it"):
        vhdx.open(parent, "r+")
    vhdx.open(parent, "r+", force=True).close()
    with vhdx.open(child) as disk:
        assert disk.pread(disk.size, 0) == expected


def test_gaps_are_used_again(tmp_path):
    path = tmp_path / "disk.vhd"
    vhdx.create(path, SIZE, block_size=BLOCK)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"a" * BLOCK, 0)
        disk.pwrite(b"b" * BLOCK, BLOCK)
    most = path.stat().st_size
    for turn in range(6):
        with vhdx.open(path, "r+") as disk:
            disk.trim((turn % 2) * BLOCK, BLOCK)
        with vhdx.open(path, "r+") as disk:
            disk.pwrite(b"c" * 512, (turn % 2) * BLOCK)
            assert disk.pread(BLOCK - 512, (turn % 2) * BLOCK + 512) == bytes(BLOCK - 512)
    assert path.stat().st_size == most
    raw = tmp_path / "raw"
    with vhdx.open(path) as disk:
        raw.write_bytes(disk.pread(disk.size, 0))
    qemu("compare", "-f", "vpc", "-F", "raw", path, raw)


def test_a_guest_cannot_change_the_format(tmp_path):
    """A fixed VHD begins with what the guest writes, a VHDX may end with it."""
    fixed, other, evil = (tmp_path / n for n in ("fixed.vhd", "fixed.image", "evil.vhdx"))
    vhdx.create(evil, 8 * MIB)
    vhdx.create(fixed, 16 * MIB, type="fixed")
    with vhdx.open(fixed, "r+") as disk:
        disk.pwrite(evil.read_bytes(), 0)
    with vhdx.open(fixed) as disk:
        assert (disk.format, disk.size) == ("vhd", 16 * MIB)
    other.write_bytes(fixed.read_bytes())
    with pytest.raises(vhdx.UnsupportedError, match="either"):
        vhdx.open(other)
    with vhdx.open(other, format="vhd") as disk:
        assert disk.size == 16 * MIB
    with vhdx.open(other, format="vhdx") as disk:
        assert disk.size == 8 * MIB


def test_azure_images_are_named_for_what_they_are(tmp_path):
    source = tmp_path / "a.raw"
    source.write_bytes(bytes(MIB))
    with pytest.raises(vhdx.InvalidArgumentError, match="VHD only"):
        vhdx.convert(source, tmp_path / "a.vhdx", azure=True)
    vhdx.create(tmp_path / "4k.vhdx", MIB, logical_sector_size=4096)
    with pytest.raises(vhdx.InvalidArgumentError, match="512 bytes"):
        vhdx.convert(tmp_path / "4k.vhdx", tmp_path / "4k.vhd")
    vhdx.convert(tmp_path / "4k.vhdx", tmp_path / "4k.vhd", logical_sector_size=512)


# ---- what others keep in a VHD ----


def dynamic_with(path, between: bytes, blocks=()):
    """A dynamic VHD of 4 blocks with foreign bytes between its table and its blocks."""
    block, sectors = 2 * MIB, []
    table_at, at = 1536, 2048 + -(-len(between) // 512) * 512
    entries = [vhd.UNUSED] * 128
    for number in blocks:
        entries[number] = at // 512
        sectors.append((at, b"\xff" * 512 + bytes([number + 1]) * block))
        at += 512 + block
    footer = vhd.new_footer(4 * block, vhd.DiskType.DYNAMIC, uuid4()).pack()
    with path.open("wb") as file:
        file.write(footer + vhd.DynamicHeader(table_at, 4, block).pack())
        file.write(struct.pack(">128I", *entries) + between)
        for where, data in sectors:
            file.seek(where)
            file.write(data)
        file.seek(at)
        file.write(footer)
    return footer


@pytest.mark.parametrize("blocks", [(), (2,)])
def test_bytes_of_others_behind_the_table_stay(tmp_path, blocks):
    path, batmap = tmp_path / "xen.vhd", b"tdbatmap".ljust(512, b"\1") + bytes(512)
    dynamic_with(path, batmap, blocks)
    with vhdx.open(path, "r+") as disk:
        for turn in range(3):
            disk.pwrite(bytes([turn + 9]) * disk.size, 0)
            disk.trim(0, disk.size)
            disk.flush()
        disk.pwrite(b"end", 0)
    assert path.read_bytes()[2048 : 2048 + len(batmap)] == batmap
    with vhdx.open(path, "r+") as disk:
        disk.trim(0, disk.size)
    assert path.read_bytes()[2048 : 2048 + len(batmap)] == batmap


def test_bytes_of_others_between_blocks_stay(tmp_path):
    path, note = tmp_path / "d.vhd", b"somebody's note"
    dynamic_with(path, bytes(3 * MIB), (1,))
    with path.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(note)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x" * disk.size, 0)
    assert path.read_bytes()[2 * MIB : 2 * MIB + len(note)] == note
    with vhdx.open(path) as disk:
        assert disk.pread(disk.size, 0) == b"x" * disk.size


def test_bytes_of_others_at_the_end_stay(tmp_path):
    path, note = tmp_path / "d.vhd", b"somebody's note".ljust(512, b".")
    dynamic_with(path, b"", (1,))
    with path.open("r+b") as file:
        file.seek(-512, 2)
        where = file.tell()
        file.write(note)  # and the copy of the footer at the start is left
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x" * disk.size, 0)
    assert path.read_bytes()[where : where + 512] == note
    with vhdx.open(path) as disk:
        assert disk.pread(disk.size, 0) == b"x" * disk.size


def different(footer: bytes, **changes) -> bytes:
    parsed = vhd.parse_footer(footer)
    return replace(parsed, original=b"", **changes).pack()


@pytest.mark.parametrize(
    "changes", [{"current_size": 4 * MIB}, {"unique_id": UUID(int=7)}, {"data_offset": 1024}]
)
def test_footers_that_disagree_are_not_settled_by_a_write(tmp_path, changes):
    path = tmp_path / "d.vhd"
    footer = dynamic_with(path, b"", (0, 3))
    data = bytearray(path.read_bytes())
    data[:512] = different(footer, **changes)  # the one at the end counts, and is right
    path.write_bytes(data)
    with vhdx.open(path) as disk:
        assert disk.pread(1, 6 * MIB) == b"\4"
    with pytest.raises(vhdx.DamagedError, match="its two footers disagree"):
        vhdx.open(path, "r+")
    assert path.read_bytes() == data


def test_a_copy_of_the_footer_that_differs_in_passing_stays(tmp_path):
    path = tmp_path / "d.vhd"
    footer = dynamic_with(path, b"", (0,))
    data = bytearray(path.read_bytes())
    data[:512] = different(footer, timestamp=1)
    path.write_bytes(data)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"new", 2 * MIB)
    assert path.read_bytes()[:512] == data[:512]


def test_granted_places_are_free_again_after_a_close(tmp_path):
    path = tmp_path / "d.vhd"
    vhdx.create(path, 64 * MIB, block_size=2 * MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x" * (64 * MIB), 0)
    size = path.stat().st_size
    with vhdx.open(path, "r+") as disk:
        disk.trim(0, 62 * MIB)
    for turn in range(4):
        with vhdx.open(path, "r+") as disk:
            disk.pwrite(b"y", turn * 2 * MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"z" * (64 * MIB), 0)
    assert path.stat().st_size == size
