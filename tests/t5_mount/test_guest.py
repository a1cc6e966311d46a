# SPDX-License-Identifier: MIT
"""Linux of a guest as our client: virtio-blk over NBD, nbd.ko over the network, vhdx mount by nbd.ko.

The guest is killed as a host loses power. What it had synced is in the image, and the file systems
are whole after the replay of their journals.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time

import pytest

import vhdx
from tests.conftest import absent
from tests.t5_mount import guest
from tests.t5_mount.disks import do
from vhdx import mounting
from vhdx.units import MIB

pytestmark = pytest.mark.xdist_group("guest")
_FILL = """
fill() {  # files of many sizes in a directory, and their sums on the console
    for n in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of=$1/file$n bs=1000 count=$((n * n * n * 5)) 2>/dev/null
    done
    cp /bin/busybox $1/busybox
    sync
    (cd $1; sha256sum *) | while read sum name; do say "SUM $1/$name $sum"; done
}
"""


@pytest.fixture(scope="module")
def tools(peer):
    """What every guest has, as a function that makes it."""
    peer("qemu-system-x86_64", "mkfs.vfat", "busybox", "nbd-client", "modprobe", "mkfs.xfs", "fstrim")
    found = guest.kernel()
    if found is None:
        absent("Debian's cloud kernel")

    def make(*more):
        files = guest.Files()
        names = "modprobe nbd-client mke2fs mkfs.xfs sfdisk fstrim blockdev resize2fs partx blkid"
        files.programs(*names.split(), *more)
        files.modules(found[2], "virtio_pci", "virtio_blk", "virtio_net", "nbd", "loop", "fuse")
        files.modules(found[2], "ext4", "xfs", "vfat", "nls_cp437", "nls_ascii")
        return files

    return make


@contextlib.contextmanager
def served(image, listen):
    """The image, served by this process."""
    disk = vhdx.open(image, "r+")
    server = vhdx.serve({"disk": disk}, listen=listen)
    try:
        yield disk, server
    finally:
        server.close()
        disk.close()


def run_until(process, words, seconds=240):
    """Reads the console until a line has the words; kills the guest then, as a power failure does."""
    text = read_until(process, words, seconds)
    time.sleep(0.5)  # it goes on writing
    process.kill()
    process.communicate()
    return text


def read_until(process, words, seconds=240):
    """Reads the console until a line has the words."""
    text = ""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            text += line.decode(errors="replace")
            if words in text or "FAILED" in text:
                break
    finally:
        timer.cancel()
        if words not in text:
            process.kill()
    assert words in text, text
    return text


def sums_in(text):
    """The sums of files that a guest has written."""
    found = dict(re.findall(r"GUEST: SUM (\S+) (\w+)", text))
    assert found
    return found


def sums_of(directory):
    """What :func:`sums_in` returns, as far as a directory of the host has it."""
    files = [path for path in directory.iterdir() if path.is_file()]
    return {
        path.name: do("sha256sum", path).split()[0] for path in files if path.name != "unfinished"
    }


def test_virtio_disk_of_a_guest_that_loses_power(where, tmp_path, tools):
    image, socket = tmp_path / "disk.vhdx", tmp_path / "s"
    vhdx.create(image, 1024 * MIB)
    script = f"""{_FILL}
    for each in ext4 xfs; do check modprobe $each; done
    printf 'label: gpt\\nsize=400M\\nsize=400M\\n' | check /usr/sbin/sfdisk -q /dev/vda
    check /usr/sbin/mke2fs -q -t ext4 /dev/vda1
    check /usr/sbin/mkfs.xfs -q /dev/vda2
    mkdir /a /b
    check mount -t ext4 /dev/vda1 /a
    check mount -t xfs /dev/vda2 /b
    for each in /a /b; do dd if=/dev/urandom of=$each/old bs=1M count=150 2>/dev/null; done
    sync; rm /a/old /b/old; sync
    check /usr/sbin/fstrim /a; check /usr/sbin/fstrim /b
    fill /a; fill /b
    say synced
    while :; do
        dd if=/dev/zero of=/a/unfinished bs=64k count=200; dd if=/dev/zero of=/b/unfinished count=999
    done 2>/dev/null
    """
    drive = f"file=nbd+unix:///disk?socket={socket},if=virtio,format=raw,discard=unmap,cache=none"
    with served(image, f"nbd+unix:///?socket={socket}"):
        process = guest.boot(tmp_path, tools(), script, "-drive", drive)
        seen = sums_in(run_until(process, "GUEST: synced"))
    assert vhdx.check(image).errors == 0
    assert image.stat().st_blocks * 512 < 250 * MIB, "fstrim gave nothing back"
    for number, name in ((1, "/a"), (2, "/b")):
        mounting.mount(image, where, partition=number, yes=True)
        assert sums_of(where) == {
            path.rpartition("/")[2]: each for path, each in seen.items() if path.startswith(name)
        }
        mounting.unmount(where)
    _check_filesystems(image)


def _check_filesystems(image):
    devices = {each.partition: each.device for each in mounting.attach(image).devices}
    try:
        do("e2fsck", "-fn", devices[1])
        do("xfs_repair", "-n", devices[2])
    finally:
        mounting.detach(image)


def test_kernel_client_over_the_network(where, tmp_path, tools):
    """nbd-client in a guest. The disk grows meanwhile, and a reconnection shows that."""
    image = tmp_path / "disk.vhdx"
    vhdx.create(image, 100 * MIB)
    with served(image, "nbd://127.0.0.1:0") as (disk, server):
        port = re.search(r":(\d+)", server.uri)[1]
        script = f"""{_FILL}
        check modprobe ext4; check modprobe nbd
        connect() {{ check nbd-client 10.0.2.2 {port} /dev/nbd0 -name disk -connections 2; sleep 1; }}
        connect
        check /usr/sbin/mke2fs -q -t ext4 /dev/nbd0
        mkdir /a; check mount -t ext4 /dev/nbd0 /a
        fill /a
        check umount /a
        say "SIZE $(blockdev --getsize64 /dev/nbd0)"
        check nbd-client -d /dev/nbd0
        say "grow now"; sleep 4
        connect
        say "SIZE $(blockdev --getsize64 /dev/nbd0)"
        check mount -t ext4 /dev/nbd0 /a
        check /usr/sbin/resize2fs /dev/nbd0 2>&1
        dd if=/dev/urandom of=/a/more bs=1M count=120 2>/dev/null
        check sync
        say "SUM /a/more $(sha256sum </a/more | cut -c1-64)"
        say synced
        while :; do dd if=/dev/zero of=/a/unfinished bs=64k count=200; done 2>/dev/null
        """
        process = guest.boot(tmp_path, tools(), script)
        text = read_until(process, "grow now")
        disk.resize(300 * MIB)
        text += run_until(process, "GUEST: synced")
    seen = sums_in(text)
    assert f"SIZE {100 * MIB}" in text
    assert vhdx.check(image).errors == 0
    mounting.mount(image, where, yes=True)
    assert sums_of(where) == {path.rpartition("/")[2]: each for path, each in seen.items()}
    mounting.unmount(where)


def test_vhdx_mount_by_the_kernel_client(tmp_path, tools):
    """The command inside a guest, where the kernel has nbd, so that it is the way."""
    files = tools("mkfs.vfat", "losetup", "mount", "umount", "findmnt")
    files.python()
    script = """
    cd /tmp; mkdir m
    dd if=/dev/urandom of=data bs=1M count=4 2>/dev/null
    vhdx() { /usr/bin/vhdx "$@" 2>errors || { code=$?; cat errors; return $code; }; }
    check vhdx create a.vhdx --size 400M --block-size 1M
    check vhdx attach a.vhdx
    printf 'label: gpt\\nsize=150M\\nsize=100M\\nsize=100M\\n' | check /usr/sbin/sfdisk -q /dev/nbd0
    check /usr/sbin/mke2fs -q -t ext4 /dev/nbd0p1
    check /usr/sbin/mkfs.vfat /dev/nbd0p2
    mkdir m2; check mount -t vfat /dev/nbd0p2 m2
    vhdx detach a.vhdx && say "FAILED: detached while in use"
    check umount m2
    check vhdx detach /dev/nbd0p2
    check vhdx mount a.vhdx m --partition 1
    check vhdx mounts
    check cp data m/data
    check vhdx umount m
    sum=$(sha256sum <a.vhdx)
    check vhdx mount a.vhdx m -p 1 -r
    check cmp data m/data
    check vhdx umount m
    check test "$sum" = "$(sha256sum <a.vhdx)"
    check vhdx mount a.vhdx m -p 2
    check cp data m/data
    check vhdx mount a.vhdx m2 -p 1
    check vhdx umount m
    cp data m2/synced; sync
    kill -9 $(grep -l 'mounting[.]daemon' /proc/[0-9]*/cmdline | cut -d/ -f3)
    sleep 1
    vhdx mounts | grep 'server has died' || say "FAILED: mounts says nothing"
    vhdx umount m2 && say "FAILED: a false success"
    check vhdx mount a.vhdx m -p 1 --yes
    check cmp data m/synced
    check vhdx umount m
    vhdx mounts | grep 'nothing is mounted' || say "FAILED: something remains"
    test "$(cat /sys/block/nbd0/size)" = 0 || say "FAILED: nbd0 is still attached"
    """
    text = guest.run(tmp_path, files, script, seconds=400)
    assert "FAILED" not in text, text
    assert re.search(r"a\.vhdx +r\+ +nbd +/dev/nbd0p1 +1 +ext4 +/tmp/m", text), text
