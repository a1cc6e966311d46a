# SPDX-License-Identifier: MIT
"""Files are read from images without root, by dissect in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import vhdx
from tests.conftest import absent
from tests.t4_cli.command import VHDX, run
from vhdx import files
from vhdx.units import MIB

SIZE = 64 * MIB


@pytest.fixture
def tree(tmp_path):
    """A directory with files of many kinds."""
    if importlib.util.find_spec("dissect") is None:
        absent("dissect")
    path = tmp_path / "tree"
    (path / "sub" / "deep").mkdir(parents=True)
    (path / "sub" / "deep" / "ünï cödé").write_text("inside")
    (path / "large").write_bytes(os.urandom(3_000_001) + bytes(2 * MIB) + b"end")
    (path / "empty").touch()
    (path / "runs").write_text("#!/bin/sh\n")
    (path / "runs").chmod(0o755)
    (path / "link").symlink_to("sub/deep")
    (path / "away").symlink_to("/sub/../link")
    (path / "circle").symlink_to("circle")
    return path


@pytest.fixture
def image(tree, tmp_path, peer):
    """An ext4 with that directory, made without root."""
    peer("mkfs.ext4")
    raw, path = tmp_path / "fs.raw", tmp_path / "disk.vhdx"
    with raw.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-d", tree, raw], check=True)
    vhdx.convert(raw, path)
    return path


def test_partitions(tree, tmp_path, peer):
    peer("mkfs.ext4", "sfdisk")
    raw = tmp_path / "disk.raw"
    raw.touch()
    os.truncate(raw, SIZE)
    table = "label: gpt\nstart=2048, size=20M\nstart=43008, size=20M\n"
    subprocess.run(["/sbin/sfdisk", "-q", raw], input=table, text=True, check=True)
    make = ["/sbin/mkfs.ext4", "-q", "-F", "-d", tree]
    subprocess.run([*make, "-E", "offset=1048576", raw, "20M"], check=True)
    assert {each.name for each in files.list_files(raw)} >= {"large", "sub"}
    subprocess.run([*make, "-E", f"offset={43008 * 512}", raw, "20M"], check=True)
    with pytest.raises(vhdx.InvalidArgumentError, match=r"1 \(ext\), 2 \(ext\)"):
        files.list_files(raw)
    assert b"".join(files.read_file(raw, "/runs", partition="2")) == b"#!/bin/sh\n"


def test_list(image):
    found = {each.name: each for each in files.list_files(image)}
    assert found.keys() == {"sub", "large", "empty", "runs", "link", "away", "circle", "lost+found"}
    assert (found["large"].kind, found["large"].size) == ("file", 3_000_001 + 2 * MIB + 3)
    assert (found["runs"].mode, found["link"].target) == (0o755, "sub/deep")
    assert [each.name for each in files.list_files(image, "/sub/deep")] == ["ünï cödé"]
    (one,) = files.list_files(image, "/empty")
    assert (one.name, one.size) == ("empty", 0)


def test_read(image, tree):
    data = b"".join(files.read_file(image, "/large"))
    assert data == (tree / "large").read_bytes()
    assert b"".join(files.read_file(image, "/link/ünï cödé")) == b"inside"  # through a link
    assert b"".join(files.read_file(image, "/away/../deep/ünï cödé")) == b"inside"
    with pytest.raises(vhdx.VhdxError, match="cannot be followed"):
        list(files.read_file(image, "/circle"))
    pieces = files.read_file(image, "/large")
    next(pieces)
    pieces.close()  # the reader is ended


def test_copy(image, tree, tmp_path):
    out = tmp_path / "out"
    seen = []
    copied = files.copy_out(image, "/", out, recursive=True, progress=lambda *n: seen.append(n))
    (out / "lost+found").rmdir()
    assert copied == 4
    assert seen[-1][0] == seen[-1][1] > 3_000_001
    subprocess.run(["diff", "-r", "--no-dereference", tree, out], check=True)
    assert (out / "runs").stat().st_mode & 0o777 == 0o755
    assert (out / "large").stat().st_blocks * 512 < 4 * MIB  # zeros became a hole
    assert int((out / "large").stat().st_mtime) == int((tree / "large").stat().st_mtime)
    with pytest.raises(vhdx.ExistsError):
        files.copy_out(image, "/empty", out / "large")
    assert files.copy_out(image, "/empty", out / "large", force=True) == 1
    assert (out / "large").stat().st_size == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in tree.iterdir())
    with pytest.raises(vhdx.InvalidArgumentError, match="--recursive"):
        files.copy_out(image, "/sub", tmp_path)
    with pytest.raises(vhdx.NotFoundError, match="directory does not exist"):
        files.copy_out(image, "/empty", tmp_path / "no" / "such")


def test_bad_input(image, tmp_path):
    for inside in ("/missing", "/empty/below"):
        with pytest.raises(vhdx.NotFoundError, match="there is no such file"):
            files.list_files(image, inside)
    with pytest.raises(vhdx.NotFoundError, match="there is no partition 3"):
        files.list_files(image, partition="3")
    with pytest.raises(vhdx.NotFoundError):
        files.list_files(tmp_path / "missing.vhdx")
    with pytest.raises(vhdx.InvalidArgumentError, match="it is not a file"):
        list(files.read_file(image, "/sub"))
    empty = tmp_path / "empty.vhdx"
    vhdx.create(empty, SIZE)
    with pytest.raises(vhdx.UnsupportedError, match="no file system was found"):
        files.list_files(empty)
    with vhdx.open(image, "r+"), pytest.raises(vhdx.InUseError):
        files.list_files(image)


def test_reading_changes_nothing(image):
    before = image.read_bytes()
    files.list_files(image)
    b"".join(files.read_file(image, "/large"))
    assert image.read_bytes() == before


def test_hostile_names(image, tmp_path):
    """A name with a slash leads nowhere else, and the rest is copied."""
    data = bytearray(image.read_bytes())
    for name, hostile in ((b"empty", b"e/pty"), (b"runs", b"../x")):
        at = data.index(name + bytes(-len(name) % 4), 4 * MIB)
        data[at : at + len(name)] = hostile
    hostile = tmp_path / "hostile.vhdx"
    hostile.write_bytes(data)
    out = tmp_path / "out"
    with contextlib.suppress(vhdx.VhdxError):
        files.copy_out(hostile, "/", out, recursive=True)
    assert not (tmp_path / "x").exists()
    assert not (out / "e").exists()
    assert (out / "sub" / "deep" / "ünï cödé").read_text() == "inside"


def run_any(*arguments):
    command = [*VHDX, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr


def test_damaged_file_systems(image, tmp_path):
    """Each of many damages is an error or a wrong file, never a hang or a traceback."""
    data = image.read_bytes()
    start = data.index(b"lost+found", 4 * MIB) & ~0xFFF
    for step in range(6):
        damaged = bytearray(data)
        at = start - 65536 * (step % 4) + 97 * step
        damaged[at : at + 64] = os.urandom(64)
        path = tmp_path / "damaged.vhdx"
        path.write_bytes(damaged)
        said = run_any("cp", "-r", f"{path}:/", tmp_path / f"out{step}")
        assert "Traceback" not in said


def test_volumes_of_lvm(sample, tree):
    assert tree
    image = sample("lvm2.vhdx")
    with pytest.raises(vhdx.InvalidArgumentError, match="test-vol01"):
        files.list_files(image)
    found = [each.name for each in files.list_files(image, partition="test-ntfs")]
    assert found == ["data"]


def test_windows_image(sample, tree):
    assert tree
    assert files.list_files(sample("dynamic.vhdx")) == []  # an empty NTFS


def test_commands(image, tree, tmp_path):
    said = run("ls", f"{image}:/")
    assert "drwxr-xr-x" in said
    assert "link -> sub/deep" in said
    assert [e["name"] for e in json.loads(run("ls", f"{image}:/sub", "--json"))] == ["deep"]
    assert run("cat", f"{image}:/runs") == "#!/bin/sh\n"
    run("cp", f"{image}:/large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tree / "large").read_bytes()
    assert "it exists" in run("cp", f"{image}:/large", tmp_path / "copy", code=1)
    assert "use vhdx mount" in run("cp", tmp_path / "copy", f"{image}:/", code=2)
    assert "there is no such file" in run("cat", f"{image}:/nothing", code=1)
    odd = tmp_path / "a:b.vhdx"
    image.rename(odd)
    assert "runs" in run("ls", odd)
    assert run("cat", f"{odd}:/runs") == "#!/bin/sh\n"


def test_interrupted(image, tmp_path):
    """Ctrl-C during a copy: no part of a file stays."""
    for step in range(4):
        out = tmp_path / f"out{step}"
        with subprocess.Popen(
            [*VHDX, "cp", f"{image}:/large", out],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            time.sleep(0.2 * step)
            os.killpg(process.pid, signal.SIGINT)
            said = process.stderr.read()
        before = process.returncode == -2 or "init_import_site" in said  # Python was not ready
        assert before or process.returncode in {0, 130}, said
        if out.exists():
            assert out.stat().st_size == 3_000_001 + 2 * MIB + 3
        assert [each for each in Path(tmp_path).iterdir() if each.name.startswith(".vhdx-cp")] == []
