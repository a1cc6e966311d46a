# SPDX-License-Identifier: MIT
"""vhdx mount --snapshot: changes are kept apart until it is said what becomes of them."""

from __future__ import annotations

import os

import pytest

import vhdx
from tests.t4_cli.command import run
from tests.t5_mount.disks import digest, fill, make_image, read_tree
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
