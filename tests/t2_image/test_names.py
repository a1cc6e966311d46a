# SPDX-License-Identifier: MIT
"""Two names for one file, names that cannot be written down, and what a name keeps."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vhdx
from tests.images import edit
from vhdx.format import header
from vhdx.image import children
from vhdx.image.partial import create_partial, is_partial
from vhdx.units import MIB

SIZE = 4 * MIB
CONTENT = b"content of the disk.".ljust(512) * 128


def make(path: Path, parent: Path | None = None) -> None:
    vhdx.create(path, None if parent else SIZE, parent=parent, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(CONTENT, MIB)


def content(path: Path) -> bytes:
    with vhdx.open(path) as disk:
        return disk.pread(len(CONTENT), MIB)


def same(path: Path, directory: Path) -> Path:
    return path


def dotted(path: Path, directory: Path) -> Path:
    return Path(f"{path.parent}/./x/../{path.name}")


def symbolic(path: Path, directory: Path) -> Path:
    link = directory / "link.vhdx"
    link.symlink_to(path)
    return link


def symbolic_directory(path: Path, directory: Path) -> Path:
    link = directory / "linked"
    link.symlink_to(path.parent, target_is_directory=True)
    return link / path.name


def hard(path: Path, directory: Path) -> Path:
    link = directory / "hard.vhdx"
    os.link(path, link)
    return link


def bound(path: Path, directory: Path) -> Path:
    place = directory / "bound"
    place.mkdir()
    done = subprocess.run(["mount", "--bind", path.parent, place], capture_output=True)
    if done.returncode != 0:
        pytest.skip("nothing can be mounted here")
    return place / path.name


def by_descriptor(path: Path, directory: Path) -> Path:
    fd = os.open(path, os.O_RDONLY)
    OPENED.append(fd)
    return Path(f"/proc/self/fd/{fd}")


OPENED: list[int] = []
WAYS = [same, dotted, symbolic, symbolic_directory, hard, bound, by_descriptor]


@pytest.fixture
def place(tmp_path):
    """A directory for images, and one for other names of them; mounts go at the end."""
    (tmp_path / "images" / "x").mkdir(parents=True)
    (tmp_path / "names").mkdir()
    yield tmp_path
    while OPENED:
        os.close(OPENED.pop())
    subprocess.run(["umount", tmp_path / "names" / "bound"], capture_output=True)


def snapshot(path, other):
    vhdx.snapshot(path, other)


def snapshot_of_other(path, other):
    vhdx.snapshot(other, path)


def snapshot_open(path, other):
    with vhdx.open(path, "r+") as disk:
        disk.snapshot(other)


def snapshot_served(path, other):
    with vhdx.serve({"d": path}):
        vhdx.snapshot(path, other)


def convert(path, other):
    vhdx.convert(path, other, to="vhdx", force=True)


def convert_from_other(path, other):
    vhdx.convert(other, path, to="vhdx", force=True)


def convert_to_raw(path, other):
    vhdx.convert(path, other, to="raw", force=True)


def create_child(path, other):
    vhdx.create(other, parent=path, force=True)


def create_child_of_other(path, other):
    vhdx.create(path, parent=other, force=True)


def rebase(path, other):
    vhdx.rebase(path, other)


def rebase_of_other(path, other):
    vhdx.rebase(other, path, unsafe=True)


def repair(path, other):
    edit(path, header.HEADER_OFFSETS[0], bytes(8))
    vhdx.repair(other)
    vhdx.repair(path)
    vhdx.undo(other)


def serve_twice(path, other):
    with vhdx.serve({"a": path, "b": other}):
        pass


def qos_file(path, other):
    with vhdx.serve({"a": path}, qos_file=other):
        pass


def listen(path, other):
    with vhdx.serve({"a": path}, listen=f"nbd+unix:///?socket={other}"):
        pass


COMMANDS = [
    snapshot,
    snapshot_of_other,
    snapshot_open,
    snapshot_served,
    convert,
    convert_from_other,
    convert_to_raw,
    create_child,
    create_child_of_other,
    rebase,
    rebase_of_other,
    repair,
    serve_twice,
    qos_file,
    listen,
]


@pytest.mark.parametrize("differencing", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", COMMANDS)
def test_content_survives_two_names_for_one_file(place, command, way, differencing):
    path = place / "images" / "disk.vhdx"
    parent = None
    if differencing:
        parent = place / "images" / "base.vhdx"
        vhdx.create(parent, SIZE, block_size=MIB)
    make(path, parent)
    other = way(path, place / "names")
    with contextlib.suppress(vhdx.VhdxError):
        command(path, other)
    assert content(path) == CONTENT


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", [convert, create_child, rebase])
def test_content_survives_a_command_on_its_parent(place, command, way):
    """The second path is another name of the parent of the first."""
    base, path = place / "images" / "base.vhdx", place / "images" / "disk.vhdx"
    make(base)
    vhdx.create(path, parent=base)
    other = way(base, place / "names")
    with contextlib.suppress(vhdx.VhdxError):
        command(path, other)
    assert content(path) == CONTENT


@pytest.mark.parametrize("way", WAYS)
def test_merge_by_any_name(place, way):
    base, path = place / "images" / "base.vhdx", place / "images" / "disk.vhdx"
    vhdx.create(base, SIZE, block_size=MIB)
    make(path, base)
    other = way(path, place / "names")
    with contextlib.suppress(vhdx.VhdxError):
        vhdx.merge(other)
    assert content(path) == CONTENT
    if way is not by_descriptor:  # that is the file which had the name before
        with vhdx.open(other, parent_search=[place / "images"]) as disk:
            assert disk.pread(len(CONTENT), MIB) == CONTENT


def test_merge_under_the_parents_name(tmp_path):
    """As qemu-img commit does: the parent's file, with its inode, takes the content."""
    base, path, child = (tmp_path / n for n in ("base.vhdx", "disk.vhdx", "child.vhdx"))
    vhdx.create(base, SIZE, block_size=MIB)
    make(path, base)
    vhdx.create(child, parent=path)
    inode = base.stat().st_ino
    with pytest.raises(vhdx.InUseError, match=r"child\.vhdx"):
        vhdx.merge(path, keep_parent_name=True)
    child.unlink()
    vhdx.merge(path, keep_parent_name=True)
    assert not path.exists()
    assert base.stat().st_ino == inode
    assert content(base) == CONTENT


@pytest.mark.parametrize("linked", ["parent", "child"])
def test_a_merge_leaves_no_hard_link_behind(tmp_path, linked):
    """Under the second name there would be an image that misses its data, or its parent."""
    base, path, other = (tmp_path / n for n in ("base.vhdx", "disk.vhdx", "other.vhdx"))
    vhdx.create(base, SIZE, block_size=MIB)
    make(path, base)
    os.link(base if linked == "parent" else path, other)
    with pytest.raises(vhdx.UnsupportedError, match="hard link"):
        vhdx.merge(path)
    assert content(path) == CONTENT
    vhdx.merge(path, force=True)
    assert content(path) == CONTENT


def test_a_destination_that_is_a_link_stays_one(tmp_path):
    source, real, link = (tmp_path / n for n in ("a.vhdx", "real.vhdx", "link.vhdx"))
    make(source)
    vhdx.create(real, SIZE)
    link.symlink_to(real)
    vhdx.convert(source, link, force=True)
    assert link.is_symlink()
    assert content(real) == CONTENT


# ---- names that cannot be written down ----


@pytest.mark.parametrize("directory", ["back\\slash", "c:", "a\\b\\c"])
def test_a_parent_that_would_not_be_found_again_is_refused(tmp_path, directory):
    place = tmp_path / directory
    place.mkdir()
    disk, base, child = tmp_path / "d.vhdx", place / "base.vhdx", tmp_path / "child.vhdx"
    make(disk)
    vhdx.create(base, SIZE)
    before = disk.read_bytes()
    with pytest.raises(vhdx.InvalidArgumentError, match="cannot be written into an image"):
        vhdx.snapshot(disk, place / "s.vhdx")
    with pytest.raises(vhdx.InvalidArgumentError, match="cannot be written into an image"):
        vhdx.create(child, parent=base)
    assert disk.read_bytes() == before
    assert not child.exists()
    assert sorted(os.listdir(tmp_path)) == sorted(["d.vhdx", directory])
    vhdx.create(child, parent=disk)
    with pytest.raises(vhdx.InvalidArgumentError, match="cannot be written into an image"):
        vhdx.rebase(child, base, unsafe=True)
    assert content(child) == CONTENT


# ---- who is based on an image ----


def test_the_parent_is_told_by_where_the_chain_leads(tmp_path):
    """After a rebase to a copy of the same name the copy is guarded, and the old one is free."""
    old, there = tmp_path / "base.vhdx", tmp_path / "there"
    there.mkdir()
    make(old)
    new = there / "base.vhdx"
    new.write_bytes(old.read_bytes())
    child = tmp_path / "child.vhdx"
    vhdx.create(child, parent=old)
    with pytest.raises(vhdx.InUseError, match=r"child\.vhdx depends on it"):
        vhdx.open(old, "r+")
    vhdx.rebase(child, new)
    with pytest.raises(vhdx.InUseError, match=r"child\.vhdx depends on it"):
        vhdx.open(new, "r+")
    with vhdx.open(old, "r+") as disk:
        disk.pwrite(b"free", 0)
    assert content(child) == CONTENT


@pytest.fixture
def apart(tmp_path):
    """A parent and its child in directories of their own."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    base, child = tmp_path / "a" / "base.vhdx", tmp_path / "b" / "child.vhdx"
    make(base)
    vhdx.create(child, parent=base)
    try:
        os.getxattr(base, "user.vhdx.children")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    return base, child


@pytest.mark.parametrize("what", ["open", "serve", "resize", "snapshot", "create", "convert"])
def test_a_parent_in_another_directory_is_guarded(apart, tmp_path, what):
    base, child = apart
    other = tmp_path / "other.vhdx"
    vhdx.create(other, SIZE)
    before = base.read_bytes()
    with pytest.raises(vhdx.InUseError, match=r"b/child\.vhdx depends on it"):
        {
            "open": lambda: vhdx.open(base, "r+"),
            "serve": lambda: vhdx.serve({"d": base}),
            "resize": lambda: vhdx.resize(base, 2 * SIZE),
            "snapshot": lambda: vhdx.snapshot(base),
            "create": lambda: vhdx.create(base, SIZE, force=True),
            "convert": lambda: vhdx.convert(other, base, force=True),
        }[what]()
    assert base.read_bytes() == before
    assert content(child) == CONTENT
    child.unlink()  # a hint of a child that is gone counts for nothing
    with vhdx.open(base, "r+") as disk:
        disk.pwrite(b"free", 0)


def test_snapshots_and_merges_leave_hints(tmp_path):
    base, there = tmp_path / "base.vhdx", tmp_path / "there"
    there.mkdir()
    make(base)
    disk = there / "disk.vhdx"
    vhdx.create(disk, parent=base)
    vhdx.snapshot(disk, there / "older.vhdx")
    if not children.hinted(base):
        pytest.skip("this file system has no extended attributes")
    with pytest.raises(vhdx.InUseError, match=r"older\.vhdx depends on it"):
        vhdx.open(base, "r+")
    vhdx.merge(disk)  # older takes the name disk
    with pytest.raises(vhdx.InUseError, match=r"disk\.vhdx depends on it"):
        vhdx.open(base, "r+")
    assert content(disk) == CONTENT


def test_hint_golden():
    value = children.pack_hint(["/a/b.vhdx", "/c.vhdx"])
    assert value == b"vhdx children 1 cdca6ca5\0/a/b.vhdx\0/c.vhdx"
    assert children.parse_hint(value) == ["/a/b.vhdx", "/c.vhdx"]
    assert children.parse_hint(value[:-1]) == []
    assert children.parse_hint(b"") == []
    many = [f"/{n:0100}" for n in range(100)]
    kept = children.parse_hint(children.pack_hint(many))
    assert kept == many[-len(kept) :]
    assert len(kept) > 15


# ---- what was never finished ----


@pytest.mark.parametrize("locked", [False, True])
def test_left_overs_are_no_children_and_are_removed(tmp_path, locked):
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    make(base)
    left, fd = create_partial(child)
    vhdx.create(tmp_path / "whole.vhdx", parent=base)
    left.write_bytes((tmp_path / "whole.vhdx").read_bytes())
    (tmp_path / "whole.vhdx").unlink()
    assert is_partial(left.name)
    if not locked:
        os.close(fd)
    with vhdx.open(base, "r+") as disk:
        disk.flush()
    vhdx.create(child, parent=base)
    assert left.exists() == locked
    if locked:
        os.close(fd)


# ---- what a name keeps ----


@pytest.fixture
def owned(tmp_path):
    """An image with an owner, a mode, an ACL and an attribute of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    path = tmp_path / "disk.vhdx"
    make(path)
    os.chown(path, 12345, 54321)
    path.chmod(0o640)
    os.setxattr(path, "user.note", b"kept")
    acl = (
        b"\x02\0\0\0"
        + b"\x01\0\x06\0\xff\xff\xff\xff"
        + b"\x02\0\x04\0\x2c\x01\0\0"
        + b"\x04\0\x04\0\xff\xff\xff\xff"
        + b"\x10\0\x06\0\xff\xff\xff\xff"
        + b"\x20\0\0\0\xff\xff\xff\xff"
    )
    os.setxattr(path, "system.posix_acl_access", acl)
    return path


def attributes(path: Path):
    status = os.stat(path)
    names = [n for n in os.listxattr(path) if not n.startswith(("user.vhdx.", "security."))]
    return status.st_uid, status.st_gid, status.st_mode, {n: os.getxattr(path, n) for n in names}


@pytest.mark.parametrize("what", ["snapshot", "merge", "create", "convert", "convert vhd"])
def test_a_name_keeps_owner_mode_acl_and_attributes(owned, tmp_path, what):
    wanted = attributes(owned)
    assert wanted[0] == 12345
    assert "system.posix_acl_access" in wanted[3]
    other = tmp_path / "other.vhdx"
    make(other)
    if what == "snapshot":
        vhdx.snapshot(owned)
    elif what == "merge":
        vhdx.snapshot(owned, tmp_path / "older.vhdx")
        os.chown(tmp_path / "older.vhdx", 0, 0)
        vhdx.merge(owned)
    elif what == "create":
        vhdx.create(owned, SIZE, force=True)
    else:
        vhdx.convert(other, owned, to="vhd" if "vhd" in what else None, force=True)
    assert attributes(owned) == wanted


def test_an_owner_that_cannot_be_kept_is_refused(owned, tmp_path):
    owned.chmod(0o666)
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if not parent.stat().st_mode & 1:
            pytest.skip("another user cannot get here")
    code = (
        "import os, sys, vhdx\nos.setgid(999); os.setgroups([]); os.setuid(999)\n"
        "try: vhdx.snapshot(sys.argv[1])\n"
        "except vhdx.HostIOError as error: print(error)\n"
    )
    before = owned.read_bytes()
    done = subprocess.run([sys.executable, "-c", code, owned], capture_output=True, text=True)
    assert "cannot be given to its owner (user 12345" in done.stdout, done.stderr
    assert owned.read_bytes() == before
    assert os.listdir(tmp_path) == ["disk.vhdx"]


def test_a_file_without_a_name_is_not_replaced(tmp_path):
    fd = os.open(tmp_path / "gone", os.O_RDWR | os.O_CREAT)
    os.unlink(tmp_path / "gone")
    with pytest.raises(vhdx.InvalidArgumentError, match="was deleted"):
        vhdx.create(f"/proc/self/fd/{fd}", 4 << 20, force=True)
    os.close(fd)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["base.vhdx", "./base.vhdx", "link.vhdx", "hard.vhdx"])
def test_a_conversion_onto_the_own_parent_says_whose_parent_it_is(tmp_path, name):
    vhdx.create(tmp_path / "base.vhdx", 4 << 20)
    vhdx.create(tmp_path / "child.vhdx", parent=tmp_path / "base.vhdx")
    (tmp_path / "link.vhdx").symlink_to("base.vhdx")
    os.link(tmp_path / "base.vhdx", tmp_path / "hard.vhdx")
    before = (tmp_path / "base.vhdx").read_bytes()
    with pytest.raises(vhdx.InUseError, match=r"child.vhdx depends on it"):
        vhdx.convert(tmp_path / "child.vhdx", tmp_path / name, force=True)
    assert (tmp_path / "base.vhdx").read_bytes() == before
