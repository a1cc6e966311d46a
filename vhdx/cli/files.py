# SPDX-License-Identifier: MIT
"""Commands that read files of images without root."""

from __future__ import annotations

import datetime
import os
import stat
import sys
from typing import TYPE_CHECKING, Any

import click

from vhdx import files
from vhdx.cli.output import json_option, print_json, print_table, progress_bar, shown
from vhdx.errors import InvalidArgumentError
from vhdx.image.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["cat", "cp", "ls"]

_KINDS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "link": stat.S_IFLNK, "other": 0}


class _Inside(click.ParamType):  # type: ignore[type-arg]
    """IMAGE:/PATH; the image is the shortest beginning that is the name of a file."""

    name = "image:/path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        del param, ctx
        at = value.find(":/")
        first = at
        while at >= 0:
            if os.path.exists(value[:at]):
                return value[:at], value[at + 1 :]
            at = value.find(":/", at + 1)
        if first >= 0 and not os.path.exists(value):
            return value[:first], value[first + 1 :]
        return value.removesuffix(":"), "/"


def _where_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--parent-dir",
            "parent_search",
            multiple=True,
            type=click.Path(file_okay=False),
            help="Another directory to search for parents; repeatable.",
        ),
        click.option("--format", type=click.Choice(FORMATS), help="Format. [default: detected]"),
        click.option(
            "--partition",
            "-p",
            metavar="NUMBER|NAME",
            help="Partition, or name of a logical volume; 0 is the whole disk. "
            "[the only one with a file system]",
        ),
    ):
        command = option(command)
    return command


def _when(modified: float) -> str:
    try:
        at = datetime.datetime.fromtimestamp(modified).astimezone()
    except (OverflowError, OSError, ValueError):
        return "?"
    return f"{at:%Y-%m-%d %H:%M}"


@click.command()
@click.argument("path", type=_Inside(), metavar="IMAGE[:/PATH]")
@_where_options
@json_option
def ls(as_json: bool, path: tuple[str, str], **where: Any) -> None:
    """List files of an image, without root and without mounting.

    Example: vhdx ls windows.vhdx:/Users
    """
    found = files.list_files(*path, **where)
    if as_json:
        names = ("name", "kind", "size", "mode", "modified", "target")
        print_json([{name: getattr(each, name) for name in names} for each in found])
        return
    rows = []
    for each in found:
        target = "" if each.target is None else f" -> {each.target}"
        mode = stat.filemode(_KINDS[each.kind] | each.mode)
        rows.append((mode, str(each.size), _when(each.modified), shown(each.name + target)))
    if rows:
        print_table(("mode", "bytes", "modified", "name"), rows)


@click.command()
@click.argument("path", type=_Inside(), metavar="IMAGE:/PATH")
@_where_options
def cat(path: tuple[str, str], **where: Any) -> None:
    """Write a file of an image to standard output, without root.

    Example: vhdx cat disk.vhdx:/etc/fstab
    """
    for piece in files.read_file(*path, **where):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


@click.command()
@click.argument("path", type=_Inside(), metavar="IMAGE:/PATH")
@click.argument("destination", type=click.Path())
@click.option("--recursive", "-r", is_flag=True, help="Copy a directory with all that is in it.")
@click.option("--force", "-f", is_flag=True, help="Replace an existing file.")
@_where_options
def cp(path: tuple[str, str], destination: str, **given: Any) -> None:
    """Copy files out of an image, without root. To copy files into it, use vhdx mount.

    Example: vhdx cp disk.vhdx:/etc/fstab .
    """
    if ":/" in destination and os.path.exists(destination.partition(":/")[0]):
        raise InvalidArgumentError(
            "files are only copied out of images", path=destination, hint="use vhdx mount"
        )
    with progress_bar("cp") as progress:
        files.copy_out(*path, destination, progress=progress, **given)
