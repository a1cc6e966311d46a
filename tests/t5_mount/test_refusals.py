# SPDX-License-Identifier: MIT
"""What cannot be mounted is refused in words that help, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time

import pytest

import vhdx
from tests.t4_cli.command import VHDX, run
from tests.t5_mount.disks import SIZE, digest, do, loop, make_disk, make_filesystem, make_image
from vhdx import mounting
from vhdx.errors import Reason
from vhdx.mounting import records
from vhdx.units import MIB


@pytest.fixture
def image(where, tmp_path):
    """An ext4 without partitions."""
    return make_image(tmp_path, "ext4")


def test_no_file_system(where, tmp_path):
    image = tmp_path / "empty.vhdx"
    vhdx.create(image, SIZE)
    with pytest.raises(vhdx.VhdxError, match="no file system was found"):
        mounting.mount(image, where)
    with pytest.raises(vhdx.VhdxError, match="it cannot be mounted as ext4"):
        mounting.mount(image, where, filesystem="ext4")
    with pytest.raises(vhdx.UnsupportedError, match="neither the kernel nor"):
        mounting.mount(image, where, filesystem="nosuchfs")


def test_partitions(where, tmp_path):
    image = make_image(tmp_path, "ext4", "gpt")
    with pytest.raises(vhdx.NotFoundError, match="there is no partition 3"):
        mounting.mount(image, where, partition=3)
    two = tmp_path / "two.raw"
    two.touch()
    os.truncate(two, SIZE)
    do("sfdisk", "-q", two, input="label: dos\nsize=100M\nsize=100M\n")
    with pytest.raises(vhdx.InvalidArgumentError, match=r"partitions 1 \(no file system, 100 MiB\)"):
        mounting.mount(two, where)


def test_hostile_partition_table(where, tmp_path):
    """Partitions that end behind the disk, or that describe each other without an end."""
    raw = tmp_path / "disk.raw"
    sector = bytearray(512)
    sector[446:462] = struct.pack("<B3xB3xII", 0, 0x83, 2048, 0xFFFFFFFF)
    sector[462:478] = struct.pack("<B3xB3xII", 0, 0x05, 63, 4096)
    sector[510:] = b"\x55\xaa"
    extended = bytearray(512)
    extended[462:478] = struct.pack("<B3xB3xII", 0, 0x05, 0, 4096)
    extended[510:] = b"\x55\xaa"
    raw.write_bytes(bytes(sector) + bytes(62 * 512) + bytes(extended))
    os.truncate(raw, 16 * MIB)
    with pytest.raises(vhdx.VhdxError):
        mounting.mount(raw, where, partition=1)
    for device in mounting.attach(raw, read_only=True).devices:
        assert device.length <= 16 * MIB
    mounting.detach(raw)


def test_mount_point(image, where, tmp_path):
    with pytest.raises(vhdx.NotFoundError, match="there is no such directory"):
        mounting.mount(image, tmp_path / "missing")
    with pytest.raises(vhdx.InvalidArgumentError, match="it is not a directory"):
        mounting.mount(image, image)
    (where / "file").touch()
    with pytest.raises(vhdx.InvalidArgumentError, match="it is not empty"):
        mounting.mount(image, where)
    (where / "file").unlink()
    do("mount", "-t", "tmpfs", "none", where)
    try:
        with pytest.raises(vhdx.InUseError, match="something is mounted there already"):
            mounting.mount(image, where)
        with pytest.raises(vhdx.InvalidArgumentError, match="was not mounted by vhdx"):
            mounting.unmount(where)
    finally:
        do("umount", where)
    with pytest.raises(vhdx.NotFoundError):
        mounting.mount(tmp_path / "missing.vhdx", where)
    with pytest.raises(vhdx.NotFoundError):
        mounting.unmount(tmp_path / "missing")
    with (
        loop(image) as device,
        pytest.raises(vhdx.InvalidArgumentError, match="not attached by vhdx"),
    ):
        mounting.detach(device)
    assert not mounting.unmount(image)


def test_what_is_mounted_already(image, where, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    mounting.mount(image, where, read_only=True)
    with pytest.raises(vhdx.InUseError, match="read-only"):
        mounting.mount(image, where)
    with pytest.raises(vhdx.InUseError, match="read-only"):
        mounting.mount(image, second)
    with pytest.raises(vhdx.InUseError, match="the disk is mounted already"):
        mounting.mount(image, second, read_only=True)
    with pytest.raises(vhdx.InUseError, match="it is attached read-only"):
        mounting.attach(image)
    with pytest.raises(vhdx.InUseError, match="it is mounted on"):
        mounting.detach(image)
    mounting.unmount(where)
    mounting.mount(image, where)
    for settings in ({"read_only": True}, {"snapshot": True}):
        with pytest.raises(vhdx.InUseError, match="it is attached"):
            mounting.mount(image, where, **settings)
    mounting.unmount(where)


def test_used_elsewhere(image, where, tmp_path, peer):
    peer("qemu-io")
    with vhdx.open(image, "r+"), pytest.raises(vhdx.InUseError):
        mounting.mount(image, where)
    raw = make_disk(tmp_path / "raw.raw", "ext4")
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", raw], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as qemu:
        qemu.stdin.write("read 0 512\n")
        qemu.stdin.flush()
        qemu.stdout.readline()
        with pytest.raises(vhdx.InUseError):
            mounting.mount(raw, where)
        qemu.stdin.close()
    with subprocess.Popen([*VHDX, "serve", image], stdout=subprocess.PIPE, text=True) as server:
        server.stdout.readline()
        with pytest.raises(vhdx.InUseError):
            mounting.mount(image, where)
        server.terminate()


def test_busy(image, where):
    mounting.mount(image, where)
    with subprocess.Popen(["sleep", "60"], cwd=where) as user:
        with pytest.raises(vhdx.InUseError, match=rf"it is in use by sleep \({user.pid}\)"):
            mounting.unmount(where)
        assert os.path.ismount(where)
        (where / "still").write_text("works")
        user.kill()
    assert mounting.unmount(where)
    device = mounting.attach(image).devices[0].device
    do("mount", device, where)
    with pytest.raises(vhdx.InUseError, match=f"{device} is in use"):
        mounting.detach(image)
    do("umount", where)
    assert mounting.detach(image)
    with vhdx.mounted(image, where, read_only=True):
        assert (where / "still").read_text() == "works"


def test_unmounted_by_other_means(image, where):
    """After umount(8) the image is still attached; it says so, and vhdx umount ends it."""
    mounting.mount(image, where)
    (where / "file").write_text("content")
    do("umount", where)
    (found,) = [each for each in mounting.mounts() if each.image == str(image)]
    assert "not mounted any more" in found.problem
    assert mounting.unmount(where)
    mounting.mount(image, where)
    do("umount", where)
    mounting.mount(image, where)  # as if it had never been mounted
    assert (where / "file").read_text() == "content"
    mounting.unmount(where)


def test_mount_point_is_renamed_or_removed(image, where, tmp_path):
    mounting.mount(image, where)
    (where / "file").write_text("content")
    with pytest.raises(OSError, match="busy"):
        where.rmdir()
    moved = tmp_path / "moved"
    moved.mkdir()
    try:
        do("mount", "--move", where, moved)
    except AssertionError:
        do("mount", "--make-private", tmp_path.anchor)  # a move needs a private parent
        do("mount", "--move", where, moved)
    where.rmdir()
    assert mounting.unmount(image)
    assert not os.path.ismount(moved)
    where.mkdir()
    with vhdx.mounted(image, where, read_only=True):
        assert (where / "file").read_text() == "content"


def dirty(image, directory):
    """Leaves the file system as a crash does: copies the image while it is mounted."""
    mounting.mount(image, directory)
    (directory / "synced").write_text("content")
    os.sync()
    raw = image.with_suffix(".crashed.raw")
    with loop(records.load(mounting.attaching.key_of(image)).view, "-r") as device:
        shutil.copyfile(device, raw)
    mounting.unmount(directory)
    return raw


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_dirty_journal(where, tmp_path, kind):
    """Writing needs consent; reading changes nothing; a snapshot shows what the journal has."""
    raw = dirty(make_image(tmp_path, kind), where)
    before = digest(raw)
    done = mounting.mount(raw, where, read_only=True)
    assert "its journal is not replayed" in done.notes[0]
    mounting.unmount(where)
    assert digest(raw) == before
    with pytest.raises(vhdx.VhdxError, match="was not unmounted") as caught:
        mounting.mount(raw, where)
    assert caught.value.reason is Reason.NEEDS_CONSENT
    assert "mounting it for writing replays" in run("mount", raw, where, code=1)
    assert digest(raw) == before
    image = tmp_path / "crashed.vhdx"
    vhdx.convert(raw, image)
    before = digest(image)
    with vhdx.mounted(image, where, snapshot=True, yes=True):
        assert (where / "synced").read_text() == "content"
    assert digest(image) == before
    assert mounting.mount(image, where, yes=True).notes == ("its journal was replayed",)
    assert (where / "synced").read_text() == "content"
    mounting.unmount(where)
    assert mounting.mount(image, where).notes == ()
    mounting.unmount(where)


def test_hibernated_windows(where, tmp_path):
    """A hiberfil.sys that begins with "hibr" is a session of Windows that would be lost."""
    image = make_image(tmp_path, "ntfs")
    with vhdx.mounted(image, where):
        (where / "hiberfil.sys").write_bytes(b"hibr" + bytes(8188))
        (where / "file").write_text("content")
    before = digest(image)
    with pytest.raises(vhdx.VhdxError, match="Windows is hibernated") as caught:
        mounting.mount(image, where)
    assert caught.value.reason is Reason.NEEDS_CONSENT
    with vhdx.mounted(image, where, read_only=True):
        assert (where / "file").read_text() == "content"
    assert digest(image) == before
    done = mounting.mount(image, where, yes=True)
    assert done.notes == ("the hibernated session of Windows was thrown away",)
    mounting.unmount(where)


def test_dirty_ntfs(where, tmp_path):
    """Windows has set the flag that says that the volume must be checked."""
    raw = make_disk(tmp_path / "ntfs.raw", "ntfs")
    data = bytearray(raw.read_bytes())
    (table,) = struct.unpack_from("<Q", data, 0x30)
    cluster = 512 * data[0x0D]
    record = table * cluster + 3 * 1024
    at = record + struct.unpack_from("<H", data, record + 0x14)[0]
    while struct.unpack_from("<I", data, at)[0] != 0x70:
        at += struct.unpack_from("<I", data, at + 4)[0]
    data[at + struct.unpack_from("<H", data, at + 0x14)[0] + 10] |= 1
    (mirror,) = struct.unpack_from("<Q", data, 0x38)
    copy = mirror * cluster + 3 * 1024
    data[copy : copy + 1024] = data[record : record + 1024]
    raw.write_bytes(data)
    with pytest.raises(vhdx.VhdxError, match="chkdsk") as caught:
        mounting.mount(raw, where)
    assert caught.value.reason is Reason.NEEDS_CONSENT
    with vhdx.mounted(raw, where, read_only=True):
        pass
    assert raw.read_bytes() == data
    assert mounting.mount(raw, where, yes=True).notes
    mounting.unmount(where)


def test_containers(where, tmp_path):
    """What is in another thing is told with the way to reach it."""
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
        file.write(b"\xeb\x58\x90-FVE-FS-" + bytes(501))
        file.seek(510)
        file.write(b"\x55\xaa")
    with pytest.raises(vhdx.VhdxError, match=r"BitLocker|no file system"):
        mounting.mount(raw, where)
    do("mkswap", "-q", raw)
    with pytest.raises(vhdx.UnsupportedError, match="swap space"):
        mounting.mount(raw, where)


@pytest.mark.parametrize("filesystem", [None, "btrfs"])
def test_btrfs_is_mounted_once(where, tmp_path, filesystem):
    """The kernel would take two copies of a btrfs for one."""
    first = make_image(tmp_path, "btrfs")
    second, other = tmp_path / "second.vhdx", tmp_path / "mnt2"
    shutil.copyfile(first, second)
    other.mkdir()
    with vhdx.mounted(first, where), pytest.raises(vhdx.InUseError, match="same id"):
        mounting.mount(second, other, filesystem=filesystem)


def test_copies_of_other_file_systems_are_mounted_together(where, tmp_path):
    first = make_image(tmp_path, "xfs")
    second, other = tmp_path / "second.vhdx", tmp_path / "mnt2"
    shutil.copyfile(first, second)
    other.mkdir()
    with vhdx.mounted(first, where), vhdx.mounted(second, other):
        (where / "file").write_text("first")
        (other / "file").write_text("second")
    with vhdx.mounted(first, where):
        assert (where / "file").read_text() == "first"


def test_missing_programs(image, where, monkeypatch):
    """It names the package to install."""
    found = shutil.which
    for program, package in (("nbdfuse", "libnbd-bin"), ("fusermount3", "fuse3")):
        with monkeypatch.context() as patch:
            patch.setattr(
                shutil,
                "which",
                lambda name, *rest, program=program, **more: (
                    None if name == program else found(name, *rest, **more)
                ),
            )
            with pytest.raises(vhdx.UnsupportedError, match=f"apt install {package}"):
                mounting.mount(image, where, via="fuse")


def test_not_root(image, where, tmp_path):
    tmp_path.chmod(0o755)
    text = f"""
import os, vhdx
for name in vhdx.mounting.__all__:
    getattr(vhdx.mounting, name)  # load all, because nobody may read the interpreter's library
os.setuid(65534)
for call in (lambda: vhdx.mounting.mount({str(image)!r}, {str(where)!r}),
             lambda: vhdx.mounting.unmount({str(where)!r}),
             lambda: vhdx.mounting.attach({str(image)!r})):
    try:
        call()
    except vhdx.VhdxError as error:
        assert "only root" in str(error) and "sudo" in str(error), error
    else:
        raise SystemExit("it did not fail")
"""
    do(sys.executable, "-c", "import vhdx.mounting\n" + text)


def test_cancelled(image, where):
    with pytest.raises(vhdx.VhdxError) as caught:
        mounting.mount(image, where, cancel=lambda: True)
    assert caught.value.reason is Reason.CANCELLED


def test_interrupted(image, where):
    """Ctrl-C at some moments of a mount: it is mounted, or nothing is."""
    for step in range(8):
        with subprocess.Popen(
            [*VHDX, "mount", image, where],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            time.sleep(0.12 * step)
            process.send_signal(2)
            said = process.stdout.read()
        before = process.returncode == -2 or "init_import_site" in said  # Python was not ready
        assert before or process.returncode in {0, 130}, said
        assert os.path.ismount(where) == (process.returncode == 0)
        mounting.unmount(where)


def test_filesystem_of_another_name(where, tmp_path):
    """--fs wins over what blkid finds."""
    image = make_image(tmp_path, "ext4")
    done = mounting.mount(image, where, filesystem="ext4", options="noatime,errors=remount-ro")
    assert done.filesystem == "ext4"
    assert "noatime" in do("findmnt", "-no", "OPTIONS", where)
    mounting.unmount(where)


def test_make_filesystem_by_attach(where, tmp_path):
    image = tmp_path / "new.vhdx"
    vhdx.create(image, SIZE)
    make_filesystem(mounting.attach(image).devices[0].device, "ext4")
    done = mounting.mount(image, where)  # it was attached, and stays so
    assert done.filesystem == "ext4"
    mounting.unmount(where)
    assert [each.image for each in mounting.mounts() if each.image == str(image)] == [str(image)]
    assert mounting.detach(image)


def test_options(image, where):
    """Options that would mount something else, or change what must not change."""
    for options in ("loop", "rw,noatime", "remount", "suid", "x,offset=5", "bind"):
        with pytest.raises(vhdx.InvalidArgumentError, match="is not possible here"):
            mounting.mount(image, where, read_only=True, options=options)
    with pytest.raises(vhdx.InvalidArgumentError, match="no file system of a disk"):
        mounting.mount(image, where, filesystem="tmpfs")


@pytest.mark.parametrize(
    "name", ["...vhdx", ".vhdx", "a b'\"$(x)\\n.vhdx", "x" * 240 + ".vhdx", "-r.vhdx"]
)
def test_names_of_images(image, where, tmp_path, name):
    path = tmp_path / name
    image.rename(path)
    mounting.mount(path, where)
    (where / "file").write_text("content")
    mounting.unmount(path)
    with vhdx.mounted(path, where, read_only=True):
        assert (where / "file").read_text() == "content"


@pytest.mark.parametrize("name", ["a\fb", "a\u2028b", "a b\\", "ünï\ncödé"])
def test_names_of_directories(image, tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    mounting.mount(image, path)
    assert [each.directory for each in mounting.mounts() if each.image == str(image)] == [str(path)]
    assert mounting.unmount(path)


def test_another_mount_namespace(image, where):
    """What is mounted where it cannot be seen is left alone."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("unshare needs a root directory that is a mount point")  # not so in a chroot
    script = (  # mounts of other tests would stay in use here
        "grep -oE ' /(run/vhdx|tmp/pytest-)[^ ]+' /proc/self/mounts | xargs -r umount --lazy; "
        f"{' '.join(VHDX)} mount {image} {where} && echo ready; read x; "
        f"echo content > {where}/file; {' '.join(VHDX)} umount {where}"
    )
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        assert process.stdout.readline() == "ready\n"
        for call in (lambda: mounting.mount(image, where), lambda: mounting.unmount(image)):
            with pytest.raises(vhdx.InUseError, match="another mount namespace"):
                call()
        process.communicate("\n")
    assert process.returncode == 0
    with vhdx.mounted(image, where, read_only=True):
        assert (where / "file").read_text() == "content\n"


def test_record_that_cannot_be_read(image, where):
    """It is reported, and the others are not held up."""
    mounting.mount(image, where)
    bad = records.DIRECTORY / f"bad-{os.getpid()}"
    bad.mkdir()
    try:
        (bad / "record.json").write_text('{"version": 99')
        assert "cannot be read" in run("mounts")
        assert mounting.unmount(where)
    finally:
        shutil.rmtree(bad)


def test_changed_partition_table(where, tmp_path):
    """A partition with the number of an older one is another place."""
    image = tmp_path / "disk.vhdx"
    vhdx.create(image, SIZE)
    disk = mounting.attach(image).devices[0].device
    for start in (2048, 20480):
        do("sfdisk", "-q", "--no-reread", disk, input=f"label: dos\nstart={start}, size=100M\n")
        device = mounting.attach(image).devices[1].device
        make_filesystem(device, "ext4")
        mounting.mount(image, where)
        assert int(do("losetup", "-nO", "OFFSET", device)) == start * 512
        mounting.unmount(where)
    mounting.detach(image)
