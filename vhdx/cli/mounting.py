# SPDX-License-Identifier: MIT
"""Commands that mount images, and that attach them as block devices."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from vhdx import mounting
from vhdx.cli.output import FAILED, change, json_option, print_json, print_table, shown
from vhdx.errors import Reason, VhdxError
from vhdx.image.formats import FORMATS
from vhdx.mounting.ways import WAYS
from vhdx.units import format_size

__all__ = ["attach", "detach", "mount", "mounts", "umount"]

_via_option = click.option(
    "--via",
    type=click.Choice(list(WAYS)),
    help="How the kernel reaches the disk. [the best there is]",
)
_format_option = click.option(
    "--format", "format_", type=click.Choice(FORMATS), help="Format. [default: detected]"
)
_parent_option = click.option(
    "--parent-dir",
    "parent_search",
    multiple=True,
    type=click.Path(file_okay=False),
    help="Another directory to search for parents; repeatable.",
)


@click.command()
@click.argument("path", type=click.Path())
@click.argument("directory", type=click.Path())
@click.option(
    "--partition",
    "-p",
    type=click.IntRange(0),
    help="Number of the partition; 0 is the whole disk. [the only one with a file system]",
)
@click.option("--read-only", "-r", is_flag=True, help="Do not change one byte of the image.")
@click.option("--fs", "filesystem", metavar="TYPE", help="Type of the file system. [detected]")
@click.option("--options", "-o", default="", help="More options for mount(8), separated by commas.")
@_via_option
@click.option(
    "--yes",
    "-y",
    is_flag=True,
    help="Answer yes to every question, such as whether to replay a journal.",
)
@click.option(
    "--snapshot",
    is_flag=True,
    help="Keep changes apart; vhdx umount --commit keeps them, --discard throws them away.",
)
@_format_option
@_parent_option
@json_option
def mount(as_json: bool, yes: bool, path: str, directory: str, **given: Any) -> None:
    """Mount a file system of an image on an empty directory. Needs root.

    It stays mounted until vhdx umount. Mounting again with the same arguments changes nothing.

    Example: vhdx mount windows.vhdx /mnt --read-only
    """
    settings = {"format" if name == "format_" else name: value for name, value in given.items()}
    try:
        with change():
            done = mounting.mount(path, directory, yes=yes, **settings)
    except VhdxError as error:
        if error.reason is not Reason.NEEDS_CONSENT or not _can_ask():
            raise
        click.echo(f"vhdx: {error.path}: {error.message}", err=True)
        if not click.confirm("Mount it for writing?", err=True):
            raise click.exceptions.Exit(FAILED) from None
        with change():
            done = mounting.mount(path, directory, yes=True, **settings)
    for note in done.notes:
        click.echo(f"vhdx: {directory}: {note}", err=True)
    if as_json:
        print_json(done._asdict())
        return
    what = "the disk" if done.partition is None else f"partition {done.partition}"
    click.echo(f"{what} ({done.filesystem}, {done.device}) is mounted on {done.directory}")


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr is not None


@click.command()
@click.argument("targets", nargs=-1, type=click.Path(), metavar="DIRECTORY|IMAGE...")
@click.option("--all", "everything", is_flag=True, help="Unmount everything that vhdx mounted.")
@click.option("--commit", is_flag=True, help="After mount --snapshot: merge the changes.")
@click.option("--discard", is_flag=True, help="After mount --snapshot: throw the changes away.")
def umount(targets: tuple[str, ...], everything: bool, commit: bool, discard: bool) -> None:
    """Unmount, and close the image. Afterwards its bytes are on the disk, or it says what is not.

    Example: vhdx umount /mnt
    """
    if everything == bool(targets):
        raise click.UsageError("say which: DIRECTORY, IMAGE or --all")
    if everything:
        found = reversed(mounting.mounts())  # an image may lie in another one
        targets = tuple(dict.fromkeys(each.directory or each.image for each in found if _ends(each)))
    failures = []
    for target in targets:
        try:
            with change():
                before = _attached(target)
                if not mounting.unmount(target, commit=commit, discard=discard):
                    click.echo(f"{target}: nothing is mounted there", err=True)
            if before is not None and _attached(before) is not None:
                click.echo(f"{before}: it stays attached until vhdx detach {before}", err=True)
        except VhdxError as error:  # the others are unmounted nevertheless
            failures.append(error)
    _raise(failures)


def _attached(target: str) -> str | None:
    """The attached image that a directory, or a name of an image, belongs to."""
    path = os.path.realpath(target)
    for each in mounting.mounts():
        if path in {each.directory, each.device, os.path.realpath(each.image)}:
            return each.image
    return None


def _ends(report: mounting.MountReport) -> bool:
    """Whether umount has something to do with it."""
    return report.directory is not None or (report.problem is not None and report.way != "?")


def _raise(failures: list[VhdxError]) -> None:
    for failure in failures[1:]:
        click.echo(f"vhdx: {failure}", err=True)
    if failures:
        raise failures[0]


@click.command()
@click.argument("path", type=click.Path())
@click.option("--read-only", "-r", is_flag=True, help="Do not change one byte of the image.")
@_via_option
@_format_option
@_parent_option
@json_option
def attach(as_json: bool, path: str, format_: str | None, **given: Any) -> None:
    """Make a disk and its partitions block devices, until vhdx detach. Needs root.

    This is for what vhdx mount does not do itself: encrypted disks, LVM, RAIDs, fsck, partitions.
    A second vhdx attach shows partitions that were made meanwhile.

    Example: vhdx attach disk.vhdx
    """
    with change():
        done = mounting.attach(path, format=format_, **given)
    if as_json:
        devices = [each._asdict() for each in done.devices]
        print_json({"way": done.way, "devices": devices})
        return
    print_table(
        ("device", "partition", "size", "content", "label"),
        [
            (
                each.device,
                "" if each.partition is None else str(each.partition),
                format_size(each.length),
                each.filesystem,
                each.label,
            )
            for each in done.devices
        ],
    )


@click.command()
@click.argument("targets", nargs=-1, required=True, type=click.Path(), metavar="IMAGE|DEVICE...")
def detach(targets: tuple[str, ...]) -> None:
    """Detach images. Afterwards their bytes are on the disk, or it says what is not.

    Example: vhdx detach disk.vhdx
    """
    failures = []
    for target in targets:
        try:
            with change():
                if not mounting.detach(target):
                    click.echo(f"{target}: it is not attached", err=True)
        except VhdxError as error:
            failures.append(error)
    _raise(failures)


@click.command()
@json_option
def mounts(as_json: bool) -> None:
    """List what vhdx has mounted and attached on this machine.

    Example: vhdx mounts --json
    """
    found = mounting.mounts()
    if as_json:
        print_json([each._asdict() for each in found])
        return
    if not found:
        click.echo("nothing is mounted or attached")
        return
    print_table(
        ("image", "mode", "way", "device", "partition", "type", "directory", "pid"),
        [
            (
                shown(each.image),
                each.mode,
                each.way,
                each.device or "",
                "" if each.partition is None else str(each.partition),
                each.filesystem or "",
                shown(each.directory or ""),
                "" if each.pid is None else str(each.pid),
            )
            for each in found
        ],
    )
    for problem in dict.fromkeys((each.image, each.problem) for each in found):
        if problem[1] is not None:
            click.echo(f"{problem[0]}: {problem[1]}")
