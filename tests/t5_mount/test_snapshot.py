# SPDX-License-Identifier: MIT
"""vhdx mount --snapshot: changes are kept apart until it is said what becomes of them."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest

import vhdx
from tests.t4_cli.command import VHDX, run
from tests.t5_mount.disks import SIZE, digest, do, fill, make_filesystem, make_image, read_tree
from vhdx import mounting


@pytest.fixture
def image(where, tmp_path):
    path = make_image(tmp_path, "ext4", "gpt")
    with vhdx.mounted(path, where):
        (where / "before").write_text("before")
    return path


def overlay_of(image):
    return image.with_name(f"{image.stem}.mounted.vhdx")


def test_discard(image, where):
    before = digest(image)
    run("mount", image, where, "--snapshot")
    assert overlay_of(image).exists()
    assert "snapshot" in run("mounts")
    fill(where)
    (where / "before").unlink()
    said = run("umount", where, code=2)
    assert "--commit merges them into the image, --discard throws them away" in said
    assert os.path.ismount(where)
    run("umount", where, "--discard")
    assert not overlay_of(image).exists()
    assert digest(image) == before
    with vhdx.mounted(image, where, read_only=True):
        assert set(read_tree(where)) == {"before"}


def test_commit(image, where):
    run("mount", image, where, "--snapshot")
    written = fill(where)
    run("umount", image, "--commit")
    assert not overlay_of(image).exists()
    assert vhdx.check(image).errors == 0
    with vhdx.mounted(image, where, read_only=True):
        assert read_tree(where) == written


def test_commit_into_a_chain(image, where, tmp_path):
    child = tmp_path / "child.vhdx"
    vhdx.create(child, parent=image)
    before = digest(image)
    mounting.mount(child, where, snapshot=True)
    written = fill(where)
    mounting.unmount(where, commit=True)
    assert digest(image) == before
    assert vhdx.info(child)["parent"]
    with vhdx.mounted(child, where, read_only=True):
        assert read_tree(where) == written


def test_words_that_do_not_fit(image, where, tmp_path):
    with pytest.raises(vhdx.InvalidArgumentError, match="--read-only allows none"):
        mounting.mount(image, where, snapshot=True, read_only=True)
    mounting.mount(image, where)
    with pytest.raises(vhdx.InvalidArgumentError, match="without --snapshot"):
        mounting.unmount(where, discard=True)
    assert os.path.ismount(where)
    mounting.unmount(where)
    raw = make_image(tmp_path, "xfs", suffix="raw")
    with pytest.raises(vhdx.InvalidArgumentError, match="--snapshot needs a VHDX"):
        mounting.mount(raw, where, snapshot=True)


def test_overlay_of_another_time(image, where):
    """What was not ended is not thrown away."""
    vhdx.create(overlay_of(image), parent=image)
    with pytest.raises(vhdx.ExistsError, match="that was not ended"):
        mounting.mount(image, where, snapshot=True)
    assert overlay_of(image).exists()


def test_mount_that_fails_leaves_no_overlay(image, where):
    with pytest.raises(vhdx.NotFoundError):
        mounting.mount(image, where, snapshot=True, partition=7)
    assert not overlay_of(image).exists()


def test_busy_then_commit(image, where, tmp_path):
    """A second mount of the file system keeps the device busy; the changes wait."""
    other = tmp_path / "other"
    other.mkdir()
    mounting.mount(image, where, snapshot=True)
    (where / "precious").write_text("precious")
    do("mount", "--bind", where, other)
    with pytest.raises(vhdx.InUseError):
        mounting.unmount(where, commit=True)
    do("umount", other)
    assert mounting.unmount(image, commit=True)
    with vhdx.mounted(image, where, read_only=True):
        assert (where / "precious").read_text() == "precious"


def test_commit_that_is_refused(image, where, tmp_path):
    """Another image is based on it, so it must not change; the changes wait."""
    child = tmp_path / "child.vhdx"
    vhdx.create(child, parent=image)
    mounting.mount(image, where, snapshot=True)
    (where / "precious").write_text("precious")
    with pytest.raises(vhdx.InUseError, match=r"child\.vhdx"):
        mounting.unmount(where, commit=True)
    assert overlay_of(image).exists()
    assert "its changes wait" in run("mounts")
    for refused in (lambda: mounting.mount(image, where), lambda: mounting.detach(image)):
        with pytest.raises(vhdx.InUseError, match="changes of --snapshot wait"):
            refused()
    with pytest.raises(vhdx.InvalidArgumentError, match="say what becomes"):
        mounting.unmount(image)
    child.unlink()
    assert mounting.unmount(image, commit=True)
    with pytest.raises(vhdx.NotFoundError, match="no changes to keep"):
        mounting.unmount(image, commit=True)
    with vhdx.mounted(image, where, read_only=True):
        assert (where / "precious").read_text() == "precious"


def test_umount_of_another_program(image, where):
    """After umount(8) it must still be said what becomes of the changes."""
    mounting.mount(image, where, snapshot=True)
    (where / "precious").write_text("precious")
    do("umount", where)
    with pytest.raises(vhdx.InUseError, match="changes of --snapshot wait"):
        mounting.detach(image)
    assert mounting.unmount(where, commit=True)
    with vhdx.mounted(image, where, read_only=True):
        assert (where / "precious").read_text() == "precious"


def test_killed_commit(image, where):
    """A command is killed at many moments of a commit, and the next one brings it to its end."""
    for step in range(6):
        mounting.mount(image, where, snapshot=True)
        (where / f"precious{step}").write_text("precious")
        with subprocess.Popen(
            [*VHDX, "umount", where, "--commit"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.25 + 0.1 * step)
            process.kill()
        with contextlib.suppress(vhdx.NotFoundError):
            mounting.unmount(image, commit=True)
        with vhdx.mounted(image, where, read_only=True):
            assert (where / f"precious{step}").read_text() == "precious"


def test_two_partitions(where, tmp_path):
    """What becomes of the changes is said when the last one is unmounted."""
    image, other = tmp_path / "two.vhdx", tmp_path / "other"
    other.mkdir()
    vhdx.create(image, SIZE)
    disk = mounting.attach(image).devices[0].device
    do("sfdisk", "-q", "--no-reread", disk, input="label: dos\nsize=100M\nsize=100M\n")
    devices = mounting.attach(image).devices  # the new partitions are seen
    assert [each.partition for each in devices] == [None, 1, 2]
    for each in devices[1:]:
        make_filesystem(each.device, "ext4")
    mounting.detach(image)
    mounting.mount(image, where, partition=1, snapshot=True)
    mounting.mount(image, other, partition=2, snapshot=True)
    with pytest.raises(vhdx.InvalidArgumentError, match="other partitions"):
        mounting.unmount(where, commit=True)
    (where / "one").touch()
    mounting.unmount(where)
    mounting.unmount(other, commit=True)
    with vhdx.mounted(image, where, partition=1, read_only=True):
        assert (where / "one").exists()
