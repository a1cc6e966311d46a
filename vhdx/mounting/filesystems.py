# SPDX-License-Identifier: MIT
"""How each file system is mounted, and what is said first: encrypted, dirty, hibernated, in use.

A file system that was not unmounted has a journal to replay. For reading, the journal stays as it is,
because the image must not change; the files are then as of the last checkpoint of the journal. For
writing, the kernel replays the journal, after the user has agreed.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from vhdx.errors import InUseError, InvalidArgumentError, Reason, UnsupportedError, VhdxError
from vhdx.mounting.programs import has, load_module, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhdx.mounting.partitions import Content

__all__ = ["Plan", "check_options", "mount", "needs_consent", "needs_replay", "plan"]

_CONTAINERS = {
    "BitLocker": "it is encrypted with BitLocker: vhdx attach, cryptsetup open --type bitlk DEVICE "
    "NAME, then mount /dev/mapper/NAME",
    "crypto_LUKS": "it is encrypted with LUKS: vhdx attach, cryptsetup open DEVICE NAME, then mount "
    "/dev/mapper/NAME",
    "LVM2_member": "it belongs to LVM: vhdx attach, vgchange --activate y, then mount the logical "
    "volume; vgchange --activate n before vhdx detach",
    "linux_raid_member": "it belongs to a RAID: vhdx attach, mdadm --assemble --scan, then mount the "
    "array",
    "zfs_member": "it belongs to a ZFS pool: vhdx attach, zpool import",
    "swap": "it is swap space, not a file system",
    "ReFS": "it is ReFS, which Linux cannot read",
}
_MOUNT_SECONDS = 3600.0  # the replay of a journal may take long
_ALWAYS = ("nosuid", "nodev")
"""The last options of every mount, so that the maker of an image cannot become root here."""
_REFUSED = {"loop", "offset", "sizelimit", "remount", "bind", "rbind", "move", "suid", "dev"}


class Plan(NamedTuple):
    """How to mount.

    Attributes:
        kind: the type for mount(8).
        options: for mount(8).
        notes: what the user should know.
    """

    kind: str
    options: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_options(options: str, *, read_only: bool) -> None:
    """Refuses options of a user that would mount something else, or in another way.

    Raises:
        InvalidArgumentError: there is such an option.
    """
    for each in options.split(","):
        name = each.partition("=")[0].strip()
        if name in _REFUSED or (name == "rw" and read_only):
            raise InvalidArgumentError(f"the option {name} is not possible here")


def needs_consent(what: str) -> VhdxError:
    """The refusal of a mount that a user must agree to first."""
    return VhdxError(
        what,
        reason=Reason.NEEDS_CONSENT,
        hint="--yes does it; --read-only changes nothing",
    )


def plan(
    content: Content,
    *,
    wanted: str | None,
    read_only: bool,
    yes: bool,
    needs_replay: Callable[[str], bool],
    device: str,
) -> Plan:
    """How to mount a file system.

    Args:
        content: what blkid found.
        wanted: the type that the user names, or None.
        read_only: mount for reading.
        yes: the user agrees to a replay, or to the loss of a hibernated session.
        needs_replay: tries a read-only mount of a type and returns whether a journal prevents it.
        device: the block device.

    Raises:
        InvalidArgumentError: the wanted type is none of a disk.
        UnsupportedError: it is no file system, or one that cannot be mounted here.
        InUseError: the same file system is mounted already, and may be so only once.
        VhdxError: the user must agree first (reason NEEDS_CONSENT).
    """
    kind = wanted or content.kind
    if not kind:
        raise UnsupportedError(
            "no file system was found", hint="vhdx attach shows what the disk holds; --fs names one"
        )
    if wanted is None and kind in _CONTAINERS:
        raise UnsupportedError(_CONTAINERS[kind])
    if wanted is not None and not _is_on_disks(kind):
        raise InvalidArgumentError(f"{kind} is no file system of a disk")
    if wanted is not None and not is_known(kind) and kind not in _SPECIAL:
        raise UnsupportedError(f"neither the kernel nor a program here can mount {kind}")

    def read(length: int, offset: int) -> bytes:
        with Path(device).open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    special = _SPECIAL.get(kind)
    if special is None:
        return Plan(kind)
    return special(_Case(content, read, read_only, yes, needs_replay, device, kind))


class _Case(NamedTuple):
    content: Content
    read: Callable[[int, int], bytes]
    read_only: bool
    yes: bool
    needs_replay: Callable[[str], bool]
    device: str
    kind: str


def _journal(case: _Case, dirty: bool, skip: str, options: tuple[str, ...] = ()) -> Plan:
    """A file system whose journal must be replayed if it was not unmounted."""
    if not dirty:
        return Plan(case.kind, options)
    if case.read_only:
        note = (
            "it was not unmounted, and its journal is not replayed, because nothing may change: "
            "recent changes of files may be missing (--snapshot shows them)"
        )
        return Plan(case.kind, (*options, skip), (note,))
    if not case.yes:
        raise needs_consent(
            f"the {case.kind} file system was not unmounted (a crash, or it is in use elsewhere), "
            "and mounting it for writing replays its journal"
        )
    return Plan(case.kind, options, ("its journal was replayed",))


def _ext(case: _Case) -> Plan:
    superblock = case.read(1024, 1024)
    if len(superblock) < 1024 or superblock[0x38:0x3A] != b"\x53\xef":
        return Plan(case.kind)  # mount says what is wrong
    (incompatible,) = struct.unpack_from("<I", superblock, 0x60)
    (state,) = struct.unpack_from("<H", superblock, 0x3A)
    made = _journal(case, bool(incompatible & 4), "noload")  # INCOMPAT_RECOVER
    if state & 2:  # EXT4_ERROR_FS
        made = made._replace(notes=(*made.notes, "it has recorded errors: run e2fsck on it"))
    return made


def _xfs(case: _Case) -> Plan:
    # nouuid: a clone of the image may be mounted, too.
    return _journal(case, case.needs_replay("xfs"), "norecovery", ("nouuid",))


def _btrfs(case: _Case) -> Plan:
    superblock = case.read(4096, 65536)
    if len(superblock) < 4096 or superblock[0x40:0x48] != b"_BHRfS_M":
        return Plan(case.kind)
    fsid = str(UUID(bytes=superblock[0x20:0x30]))
    if Path("/sys/fs/btrfs", fsid).exists():
        raise InUseError(
            f"a btrfs with the same id ({fsid}) is mounted, and the kernel would mix them up",
            hint="unmount the other one first",
        )
    (devices,) = struct.unpack_from("<Q", superblock, 0x88)
    if devices > 1:
        raise UnsupportedError(
            f"it is one of {devices} devices of a btrfs",
            hint="vhdx attach all of their images, then mount one with mount(8)",
        )
    (log_root,) = struct.unpack_from("<Q", superblock, 0x60)
    return _journal(case, log_root != 0, "rescue=nologreplay")


def _fat(case: _Case) -> Plan:
    sector = case.read(512, 0)
    at = 0x41 if sector[0x16:0x18] == b"\0\0" else 0x25  # FAT32 has no 16-bit size of a FAT
    options = ("utf8=1",)
    if len(sector) == 512 and sector[at] & 1:
        note = "it was not unmounted: run fsck.vfat on it"
        return Plan("vfat", options, (note,))
    return Plan("vfat", options)


def _ntfs(case: _Case) -> Plan:
    kind = _ntfs_driver() if case.kind == "ntfs" else case.kind
    if case.read_only:
        return Plan(kind, ("norecover",) if kind == "ntfs-3g" else ())
    if not has("ntfs-3g.probe"):
        if not case.yes:
            raise needs_consent(
                "ntfs-3g is not installed, so it cannot be seen whether Windows is hibernated in "
                "it, and writing to a hibernated Windows destroys files (apt install ntfs-3g)"
            )
        return Plan(kind)
    code = run("ntfs-3g.probe", "--readwrite", case.device).code
    if code == _HIBERNATED:
        if not case.yes:
            raise needs_consent(
                "Windows is hibernated in it (or was shut down with Fast Startup), and mounting it "
                "for writing throws the hibernated session away"
            )
        if not has("mount.ntfs-3g"):
            raise UnsupportedError(
                "Windows is hibernated in it, and only ntfs-3g can throw the session away",
                hint="apt install ntfs-3g",
            )
        note = "the hibernated session of Windows was thrown away"
        return Plan("ntfs-3g", ("remove_hiberfile",), (note,))
    dirty = code == _UNCLEAN or _ntfs_is_dirty(case.read)
    if dirty and not case.yes:
        raise needs_consent(
            "the NTFS was not unmounted: Windows has to check it (chkdsk /f), and writing before "
            "that may lose files"
        )
    options = ("force",) if dirty and kind == "ntfs3" else ()
    notes = ("Windows should check it (chkdsk /f)",) if dirty else ()
    return Plan(kind, options, notes)


_HIBERNATED, _UNCLEAN = 14, 15  # exit codes of ntfs-3g.probe


def _ntfs_driver() -> str:
    """ntfs3 where the kernel has it, else ntfs-3g.

    Raises:
        UnsupportedError: there is neither.
    """
    if "ntfs3" in Path("/proc/filesystems").read_text().split() or load_module("ntfs3"):
        return "ntfs3"
    if has("mount.ntfs-3g"):
        return "ntfs-3g"
    raise UnsupportedError(
        "it is NTFS, and neither the kernel (ntfs3) nor a program here can mount it",
        hint="apt install ntfs-3g",
    )


def _ntfs_is_dirty(read: Callable[[int, int], bytes]) -> bool:
    """Whether the volume flag VOLUME_IS_DIRTY is set; it is in record 3 of the MFT ($Volume)."""
    boot = read(512, 0)
    if len(boot) < 512 or boot[3:11] != b"NTFS    ":
        return False
    sector, per_cluster = struct.unpack_from("<HB", boot, 0x0B)
    (table,) = struct.unpack_from("<Q", boot, 0x30)
    (size,) = struct.unpack_from("<b", boot, 0x40)
    cluster = sector * (per_cluster if per_cluster <= 128 else 1 << (256 - per_cluster))
    length = size * cluster if size > 0 else 1 << -size
    place = table * cluster + 3 * length
    if not 512 <= length <= 65536 or place >= 1 << 62:
        return False
    record = read(length, place)
    if len(record) < length or record[:4] != b"FILE":
        return False
    (at,) = struct.unpack_from("<H", record, 0x14)
    while at + 24 <= length:
        kind, total = struct.unpack_from("<II", record, at)
        if kind == 0x70:  # $VOLUME_INFORMATION, always resident
            (value,) = struct.unpack_from("<H", record, at + 0x14)
            flags = at + value + 10
            return flags + 2 <= length and bool(record[flags] & 1)
        if kind == 0xFFFFFFFF or total == 0:
            break
        at += total
    return False


_SPECIAL: dict[str, Callable[[_Case], Plan]] = {
    "ext3": _ext,
    "ext4": _ext,
    "xfs": _xfs,
    "btrfs": _btrfs,
    "vfat": _fat,
    "ntfs": _ntfs,
    "ntfs3": _ntfs,
    "ntfs-3g": _ntfs,
}


def _is_on_disks(kind: str) -> bool:
    """Whether a type is not one of those that need no device, such as tmpfs."""
    lines = Path("/proc/filesystems").read_text().splitlines()
    return f"nodev\t{kind}" not in lines or kind in _SPECIAL


def is_known(kind: str) -> bool:
    """Whether the kernel has a file system, or a helper of mount(8) does."""
    known = Path("/proc/filesystems").read_text().split()
    return kind in known or has(f"mount.{kind}") or load_module(f"fs-{kind}")


def mount(plan: Plan, device: str, directory: str, *, read_only: bool, options: str = "") -> None:
    """Mounts a device.

    Raises:
        UnsupportedError: nothing here knows the file system.
        VhdxError: mount(8) failed; the message is its own.
    """
    wanted = [each for each in options.split(",") if each]
    given = [*plan.options, "ro" if read_only else "rw", *wanted, *_ALWAYS]
    done = run(
        "mount",
        *("-t", plan.kind, "-o", ",".join(given), device, directory),
        seconds=_MOUNT_SECONDS,
        keep_lock=plan.kind != "ntfs-3g" and "fuse" not in plan.kind,  # those leave a daemon
    )
    if done.code == 0:
        return
    if not is_known(plan.kind):
        raise UnsupportedError(f"neither the kernel nor a program here can mount {plan.kind}")
    complaint = done.beginning.removeprefix("mount: ")
    raise VhdxError(
        f"it cannot be mounted as {plan.kind}: {complaint}",
        reason=Reason.IO,
        path=device,
        hint="dmesg may say more; vhdx attach gives the device, for a check of the file system",
    )


def needs_replay(kind: str, device: str, where: Path) -> bool:
    """Whether a journal keeps a read-only device from being mounted; tries it.

    Args:
        kind: the type.
        device: a read-only block device.
        where: an empty directory.
    """
    is_known(kind)  # or the kernel could not read it at all
    done = run("mount", "-t", kind, "-o", "ro,nosuid,nodev,noexec,nouuid", device, os.fspath(where))
    if done.code == 0:
        run("umount", os.fspath(where))
    return done.code != 0 and "read-only" in done.err
