# SPDX-License-Identifier: MIT
"""Differencing images, read through chains of parents."""

from __future__ import annotations

import random
from uuid import uuid4

import pytest

import vhdx
from tests.images import make_child
from vhdx.errors import Reason
from vhdx.format.bat import BlockState
from vhdx.units import MIB

SIZE = 9 * MIB + 4096


@pytest.fixture
def parent(fast_path):
    path = fast_path / "parent.vhdx"
    vhdx.create(path, SIZE, block_size=4 * MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"P" * (5 * MIB), 0)
        disk.pwrite(b"Q" * 4096, SIZE - 4096)
    return path


def content(path, **options):
    with vhdx.open(path, **options) as disk:
        return disk.pread(disk.size, 0)


def test_states_of_a_child(parent, fast_path):
    child = fast_path / "child.vhdx"
    make_child(
        child,
        parent,
        SIZE,
        sectors={3: b"a" * 512, 5: b"b" * 512, 4100: b"c" * 512},
        blocks={
            2: (BlockState.FULLY_PRESENT, b"F" * (2 * MIB)),
            3: (BlockState.ZERO, None),
        },
    )
    oracle = bytearray(content(parent))
    oracle[3 * 512 : 4 * 512] = b"a" * 512
    oracle[5 * 512 : 6 * 512] = b"b" * 512
    oracle[4100 * 512 : 4101 * 512] = b"c" * 512
    oracle[4 * MIB : 6 * MIB] = b"F" * (2 * MIB)
    oracle[6 * MIB : 8 * MIB] = bytes(2 * MIB)
    assert content(child) == oracle
    with vhdx.open(child) as disk:
        extents = {e.offset: e for e in disk.extents()}
        assert disk.describe()["parent"]["found"] == str(parent)
    assert extents[0].depth == 1
    assert (extents[1536].length, extents[1536].depth) == (512, 0)
    assert extents[6 * MIB].state == "zero"
    assert [e.offset for e in extents.values()] == sorted(extents)


@pytest.mark.parametrize("state", [BlockState.UNDEFINED, BlockState.ZERO, BlockState.UNMAPPED])
def test_the_parent_never_shows_through(parent, fast_path, state):
    child = fast_path / "child.vhdx"
    make_child(child, parent, SIZE, blocks={0: (state, None)})
    assert content(child)[: 2 * MIB] == bytes(2 * MIB)


@pytest.mark.parametrize("sector", [512, 4096])
def test_random_bitmaps_through_a_chain(fast_path, sector):
    rng = random.Random(sector)
    paths = [fast_path / "0.vhdx"]
    vhdx.create(paths[0], SIZE, block_size=MIB, logical_sector_size=sector)
    oracle = bytearray(SIZE)
    with vhdx.open(paths[0], "r+") as disk:
        disk.pwrite(b"0" * (3 * MIB), MIB)
    oracle[MIB : 4 * MIB] = b"0" * (3 * MIB)
    for level in range(1, 6):
        paths.append(fast_path / f"{level}.vhdx")
        numbers = rng.sample(range(SIZE // sector), 150)
        numbers += range(numbers[0] // 8 * 8, min(numbers[0] // 8 * 8 + 64, SIZE // sector))
        data = {n: bytes([65 + level]) * sector for n in numbers}
        block = rng.choice([MIB, 2 * MIB, 8 * MIB])
        make_child(paths[-1], paths[-2], SIZE, sectors=data, sector=sector, block_size=block)
        for n, piece in data.items():
            oracle[n * sector : (n + 1) * sector] = piece
    assert content(paths[-1]) == oracle
    with vhdx.open(paths[-1]) as disk:
        for _ in range(300):
            offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 512, 5000, 70000]), SIZE - offset)
            assert disk.pread(length, offset) == oracle[offset : offset + length]
        assert max(e.depth for e in disk.extents() if e.depth is not None) == 5


def test_child_larger_than_its_parent_reads_zeros_past_it(parent, fast_path):
    child = fast_path / "child.vhdx"
    make_child(child, parent, SIZE + 3 * MIB)
    assert content(child) == content(parent) + bytes(3 * MIB)


def test_changed_parent_is_refused(parent, fast_path):
    child = fast_path / "child.vhdx"
    make_child(child, parent, SIZE)
    with vhdx.open(parent, "r+", force=True) as disk:
        disk.pwrite(b"changed", 0)
    with pytest.raises(vhdx.MissingParentError, match="was changed since") as caught:
        vhdx.open(child)
    assert caught.value.reason == Reason.PARENT_CHANGED
    with vhdx.open(child, chain=False) as disk, pytest.raises(vhdx.MissingParentError):
        disk.pread(1, 0)


def test_parent_is_looked_for(parent, fast_path):
    elsewhere = fast_path / "parents"
    elsewhere.mkdir()
    child = fast_path / "child.vhdx"
    make_child(child, parent, SIZE, relative=r"..\nowhere\PARENT.vhdx")
    expected = content(parent)
    assert content(child) == expected  # beside it, in letters of either case
    parent.rename(elsewhere / "parent.vhdx")
    with pytest.raises(vhdx.MissingParentError, match="nowhere") as caught:
        vhdx.open(child)
    assert caught.value.reason == Reason.PARENT_MISSING
    assert content(child, parent_search=[elsewhere]) == expected


def test_cycle_is_refused(fast_path):
    first, second = fast_path / "a.vhdx", fast_path / "b.vhdx"
    make_child(first, second, SIZE, linkage=uuid4())
    make_child(second, first, SIZE, linkage=uuid4())
    with pytest.raises(vhdx.MissingParentError) as caught:
        vhdx.open(first)
    assert caught.value.reason == Reason.PARENT_CYCLE


def test_parent_is_locked_while_its_child_is_open(parent, fast_path):
    child = fast_path / "child.vhdx"
    make_child(child, parent, SIZE)
    with vhdx.open(child), pytest.raises(vhdx.InUseError):
        vhdx.open(parent, "r+", force=True)
    vhdx.open(parent, "r+", force=True).close()


def test_a_parent_is_guarded_from_changes(parent, fast_path):
    vhdx.create(fast_path / "child.vhdx", parent=parent)
    with pytest.raises(vhdx.InUseError, match=r"child\.vhdx depends on it"):
        vhdx.open(parent, "r+")
    vhdx.open(parent, "r+", force=True).close()  # nothing written, so the child still fits
    assert content(fast_path / "child.vhdx") == content(parent)
    with vhdx.open(parent, "r+", force=True) as disk:
        disk.pwrite(b"x", 0)
    with pytest.raises(vhdx.MissingParentError) as caught:
        vhdx.open(fast_path / "child.vhdx")
    assert caught.value.reason == Reason.PARENT_CHANGED
    vhdx.open(parent, "r+").close()  # no child of it any more


def test_converting_a_chain(parent, fast_path):
    child = fast_path / "child.vhdx"
    make_child(child, parent, SIZE, sectors={1: b"x" * 512})
    vhdx.convert(child, fast_path / "flat.vhdx")
    assert content(fast_path / "flat.vhdx") == content(child)
