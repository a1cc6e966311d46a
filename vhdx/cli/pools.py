# SPDX-License-Identifier: MIT
"""Commands for Storage Spaces: pools of disks, spaces on them, and files of volumes."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import click

from vhdx import spaces, volume
from vhdx.cli.output import SIZE, change, json_option, print_json, print_table, progress_bar
from vhdx.control.pools import PoolOfServer, pool_of_server
from vhdx.errors import InvalidArgumentError
from vhdx.spaces import hints
from vhdx.spaces.disks import DiskSpec
from vhdx.spaces.making import check_distinct
from vhdx.spaces.planning import plan as make_plan
from vhdx.spaces.states import MediaType, Provisioning, Resiliency, RetirePolicy, Usage
from vhdx.units import format_size, parse_size
from vhdx.volume.copying import copy_file

if TYPE_CHECKING:
    from vhdx.spaces import PoolReport

__all__ = ["pool", "space", "volume_group"]

_USAGES = {
    "auto": Usage.AUTO_SELECT,
    "manual": Usage.MANUAL_SELECT,
    "spare": Usage.HOT_SPARE,
    "retired": Usage.RETIRED,
}
_MEDIA = {"hdd": MediaType.HDD, "ssd": MediaType.SSD}
_SIZE_TEXT = re.compile(r"\d+(\.\d+)?\s*[KMGTP]?i?B?", re.IGNORECASE)


class _Disk(click.ParamType):  # type: ignore[type-arg]
    """NAME=PATH[:SIZE][:hdd|ssd][:manual|spare][:model]."""

    name = "NAME=PATH[:SIZE][:hdd|ssd][:spare|manual][:model]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> DiskSpec:
        if isinstance(value, DiskSpec):
            return value
        name, equals, rest = value.partition("=")
        if not equals or not rest:
            self.fail(f"{value!r} is not NAME=PATH[:SIZE]", param, ctx)
        size, media, usage, model = None, MediaType.UNSPECIFIED, Usage.AUTO_SELECT, False
        path, *words = rest.split(":")
        while words:
            word = words.pop()
            if word in _MEDIA:
                media = _MEDIA[word]
            elif word in _USAGES:
                usage = _USAGES[word]
            elif word == "model":
                model = True
            elif _SIZE_TEXT.fullmatch(word) and size is None:
                size = parse_size(word)
            else:  # a part of the path
                path = ":".join([path, *words, word])
                break
        try:
            latency = media.word if model and media is not MediaType.UNSPECIFIED else None
            if model and latency is None:
                self.fail("model needs hdd or ssd", param, ctx)
            return DiskSpec(name, path, size, media, usage, latency)
        except InvalidArgumentError as error:
            self.fail(str(error), param, ctx)


_disk = click.option(
    "--disk",
    "disks",
    type=_Disk(),
    multiple=True,
    metavar="NAME=PATH[:SIZE][:hdd|ssd][:spare|manual][:model]",
    help="A disk: a new sparse file of SIZE, or a file or block device that is there; may be "
    "repeated. model: it is as slow as such a disk.",
)
_where = click.option(
    "--disks",
    "paths",
    multiple=True,
    type=click.Path(),
    help="Path of a disk; may be repeated. [default: where they were last]",
)


def _opened(name: str, paths: tuple[str, ...], mode: str = "r+") -> spaces.Pool | PoolOfServer:
    """The pool, or the server that has it open."""
    served = None if paths else pool_of_server(name)
    if served is not None:
        return served
    pool = spaces.Pool.open(name, mode, disks=paths)
    for path, error in pool.problems.items():
        click.echo(f"vhdx: warning: {error if error.path else f'{path}: {error}'}", err=True)
    return pool


# ---- pools ----


@click.group()
def pool() -> None:
    """Pools of disks: create, look at, repair and change them.

    Example: vhdx pool create demo --disk a=a.img:20G --disk b=b.img:20G --disk c=c.img:20G
    """


@pool.command("create")
@click.argument("name")
@_disk
@click.option("--slab", type=SIZE, help="What is allocated at once on a disk. [default: 256M]")
@click.option(
    "--retire",
    type=click.Choice([policy.word for policy in RetirePolicy]),
    default="always",
    show_default=True,
    help="Replace disks that fail. auto: only by a hot spare; always: also in free space.",
)
@click.option(
    "--retire-after",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    help="Seconds that a disk may be away before that.",
)
@click.option("--force", is_flag=True, help="Use disks that hold data or belong to a pool.")
def create_pool(
    name: str,
    disks: tuple[DiskSpec, ...],
    slab: int | None,
    retire: str,
    retire_after: float,
    force: bool,
) -> None:
    """Make a pool of disks.

    Example: vhdx pool create demo --disk ssd0=ssd0.img:20G:ssd --disk hdd0=hdd0.img:100G:hdd
    """
    if not disks:
        raise InvalidArgumentError("a pool needs disks", hint="name them with --disk")
    with change():
        spaces.Pool.create(
            name,
            disks,
            slab=spaces.DEFAULT_SLAB if slab is None else slab,
            retire=RetirePolicy(retire.capitalize()),
            retire_seconds=retire_after,
            force=force,
        ).close()


@pool.command("list")
@json_option
def list_pools(as_json: bool) -> None:
    """Show the pools that are known here."""
    found = hints.hints()
    if as_json:
        print_json(found)
        return
    rows = [(hint.name, str(len(hint.disks)), ", ".join(hint.disks)) for hint in found]
    print_table(("pool", "disks", "paths"), rows)


@pool.command("import")
@click.argument("paths", nargs=-1, required=True, type=click.Path())
def import_pool(paths: tuple[str, ...]) -> None:
    """Make a pool known by its name, from its disks.

    Example: vhdx pool import /mnt/usb/*.img
    """
    with change(), spaces.Pool.open(disks=paths) as opened:
        opened.remember()
        click.echo(opened.name)


@pool.command("export")
@click.argument("name")
def export_pool(name: str) -> None:
    """Forget where a pool is, so that it can move to another host; its disks stay as they are."""
    hints.find_hint(name)
    with change():
        hints.forget_hint(name)


@pool.command("rename")
@click.argument("name")
@click.argument("new")
def rename_pool(name: str, new: str) -> None:
    """Give a pool another name.

    Example: vhdx pool rename demo lab
    """
    with change(), _opened(name, ()) as opened:
        opened.rename(new)


@pool.command("status")
@click.argument("name")
@_where
@click.option("--events", is_flag=True, help="Show what happened to it.")
@json_option
def status(name: str, paths: tuple[str, ...], events: bool, as_json: bool) -> None:
    """Show disks, spaces, health and jobs of a pool.

    Example: vhdx pool status demo --json
    """
    with _opened(name, paths, "r") as opened:
        report = opened.report()
    if as_json:
        print_json(report)
    elif events:
        _show_events(report)
    else:
        _show(report)


def _show(report: PoolReport) -> None:
    used = f"{format_size(report.allocated)} of {format_size(report.size)} allocated"
    click.echo(f"{report.name}: {report.status} ({report.health}), {used}")
    click.echo()
    print_table(
        ("disk", "media", "usage", "size", "slabs", "status", "why"),
        [
            (
                disk.name,
                disk.media,
                disk.usage,
                format_size(disk.size),
                f"{disk.used_slabs}/{disk.slabs}",
                disk.status,
                disk.reason or "",
            )
            for disk in report.disks
        ],
    )
    if report.spaces:
        click.echo()
        print_table(
            ("space", "layout", "size", "takes", "status", "to repair"),
            [
                (
                    each.name,
                    _layout(each),
                    format_size(each.size),
                    format_size(each.footprint),
                    each.status,
                    str(each.stale_slabs + each.unreconciled_rows or ""),
                )
                for each in report.spaces
            ],
        )
    for kind, count in report.jobs.items():
        click.echo(f"\n{kind}: {count} slabs wait")
    for why in report.refused:
        click.echo(f"cannot be repaired now: {why}")


def _layout(each: spaces.SpaceReport) -> str:
    copies = f" x{each.copies}" if each.copies > 1 else ""
    columns = f", {each.columns} columns" if each.columns > 1 else ""
    return f"{each.resiliency}{copies}{columns}, {each.provisioning}"


def _show_events(report: PoolReport) -> None:
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time / 1000)),
            event.kind,
            event.subject,
            event.text,
        )
        for event in report.events
    ]
    print_table(("time", "event", "of", "what"), rows)


@pool.command("add")
@click.argument("name")
@_disk
@click.option("--force", is_flag=True, help="Use a disk that holds data or belongs to a pool.")
def add_disk(name: str, disks: tuple[DiskSpec, ...], force: bool) -> None:
    """Add disks to a pool.

    Example: vhdx pool add demo --disk d=d.img:20G
    """
    check_distinct(disks)
    with change(), _opened(name, ()) as opened:
        for spec in disks:
            opened.add_disk(spec, force=force)


@pool.command("remove")
@click.argument("name")
@click.argument("disk")
def remove_disk(name: str, disk: str) -> None:
    """Move everything off a disk, and take it out of the pool."""
    with progress_bar("moving") as progress, change(), _opened(name, ()) as opened:
        opened.remove_disk(disk, progress=progress)


@pool.command("usage")
@click.argument("name")
@click.argument("disk")
@click.argument("usage", type=click.Choice(list(_USAGES)))
def set_usage(name: str, disk: str, usage: str) -> None:
    """Change what a disk is used for; a retired one is emptied by a repair."""
    with change(), _opened(name, ()) as opened:
        opened.set_usage(disk, _USAGES[usage])


@pool.command("repair")
@click.argument("name")
@_where
@json_option
def repair(name: str, paths: tuple[str, ...], as_json: bool) -> int:
    """Replace disks that failed or are missing, and make every copy current.

    The exit code is 3 if something could not be repaired.
    """
    with progress_bar("repairing") as progress, change(), _opened(name, paths) as opened:
        report = opened.repair(progress=progress)
    if as_json:
        print_json(report)
    else:
        _show(report)
    return 3 if report.jobs else 0


@pool.command("scrub")
@click.argument("name")
@click.option("--space", "space_name", help="Only this space.")
@click.option("--repair", is_flag=True, help="Make copies equal where most of three agree.")
@json_option
def scrub(name: str, space_name: str | None, repair: bool, as_json: bool) -> int:
    """Compare the copies of mirrors.

    The exit code is 3 if some differ and were not repaired, or could not be read.
    """
    with progress_bar("comparing") as progress, change(), _opened(name, ()) as opened:
        opened.settle()
        found = opened.scrub(space_name, repair=repair, progress=progress)
    if as_json:
        print_json(found)
    else:
        click.echo(f"{format_size(found.compared)} of each copy compared: {found.text}")
        for each in found.differences:
            tie = " (no majority)" if each.is_tie else ""
            where = f"{each.space}, row {each.row}, column {each.column}, at {each.offset:#x}"
            click.echo(f"  {where}: {', '.join(each.disks)}{tie}")
    return 3 if found.unread or found.different > found.repaired else 0


@pool.command("plan")
@_disk
@click.option("--slab", type=SIZE, help="[default: 256M]")
@json_option
def plan(disks: tuple[DiskSpec, ...], slab: int | None, as_json: bool) -> None:
    """Show which layouts are possible on disks, and what they give.

    Example: vhdx pool plan --disk a=a:20G --disk b=b:20G --disk c=c:10G
    """
    found = make_plan(
        {spec.name: spec.size or 0 for spec in disks if spec.usage is Usage.AUTO_SELECT},
        spaces.DEFAULT_SLAB if slab is None else slab,
    )
    if as_json:
        print_json(found)
        return
    print_table(
        ("layout", "columns", "capacity", "efficiency", "survives", "more capacity with"),
        [
            (
                each.layout,
                str(each.columns),
                format_size(each.capacity) if each.capacity else "-",
                f"{each.efficiency:.0%}" if each.capacity else "-",
                each.survives,
                each.advice,
            )
            for each in found
        ],
    )


# ---- spaces ----


@click.group()
def space() -> None:
    """Spaces: virtual disks of a pool.

    Example: vhdx space create demo data --size 10G --resiliency mirror
    """


@space.command("create")
@click.argument("pool_name", metavar="POOL")
@click.argument("name")
@click.option("--size", type=SIZE, required=True, help="Size, such as 10G.")
@click.option(
    "--resiliency",
    type=click.Choice([each.word for each in Resiliency]),
    default="mirror",
    show_default=True,
)
@click.option("--copies", type=click.IntRange(2, 3), help="Of a mirror. [default: 2]")
@click.option("--columns", type=click.IntRange(1, 64), help="[default: as many as the disks allow]")
@click.option("--interleave", type=SIZE, help="Bytes on a column before the next. [default: 256K]")
@click.option(
    "--provisioning", type=click.Choice(["thin", "fixed"]), default="thin", show_default=True
)
@click.option("--media", type=click.Choice(list(_MEDIA)), help="Only on disks of this type.")
@click.option("--raw", is_flag=True, help="A raw disk, space://POOL/NAME, and not a volume of files.")
def create_space(
    pool_name: str,
    name: str,
    size: int,
    resiliency: str,
    copies: int | None,
    columns: int | None,
    interleave: int | None,
    provisioning: str,
    media: str | None,
    raw: bool,
) -> None:
    """Make a space, with a volume in which images are named space://POOL/NAME/disk.vhdx.

    Example: vhdx space create demo data --size 10G --resiliency mirror --copies 3
    """
    with change(), _opened(pool_name, ()) as opened:
        opened.create_space(
            name,
            size,
            resiliency=Resiliency(resiliency.capitalize()),
            copies=copies,
            columns=columns,
            interleave=interleave,
            provisioning=Provisioning[provisioning.upper()],
            media=MediaType.UNSPECIFIED if media is None else _MEDIA[media],
            has_volume=not raw,
        )


@space.command("delete")
@click.argument("pool_name", metavar="POOL")
@click.argument("name")
@click.option("--force", is_flag=True, help="Delete it although its files are lost.")
def delete_space(pool_name: str, name: str, force: bool) -> None:
    """Delete a space and everything in it."""
    if not force:
        raise InvalidArgumentError(
            f"everything in space {name!r} would be lost", hint="use --force to delete it"
        )
    with change(), _opened(pool_name, ()) as opened:
        opened.delete_space(name)


@space.command("rename")
@click.argument("pool_name", metavar="POOL")
@click.argument("name")
@click.argument("new")
def rename_space(pool_name: str, name: str, new: str) -> None:
    """Give a space another name.

    Example: vhdx space rename demo data images
    """
    with change(), _opened(pool_name, ()) as opened:
        opened.rename_space(name, new)


@space.command("resize")
@click.argument("pool_name", metavar="POOL")
@click.argument("name")
@click.argument("size", type=SIZE)
def resize_space(pool_name: str, name: str, size: int) -> None:
    """Make a space larger."""
    with change(), _opened(pool_name, ()) as opened:
        opened.resize_space(name, size)


# ---- volumes ----


@click.group("volume")
def volume_group() -> None:
    """Files of volumes: list, copy, rename and remove them.

    Example: vhdx volume cp disk.vhdx space://demo/data/disk.vhdx
    """


@volume_group.command("ls")
@click.argument("path")
@json_option
def list_files(path: str, as_json: bool) -> None:
    """List the files of a volume.

    Example: vhdx volume ls space://demo/data
    """
    found = volume.list_files(path)
    if as_json:
        print_json(found)
        return
    print_table(
        ("name", "size", "takes", "names"),
        [
            (each.name, format_size(each.size), format_size(each.allocated), str(each.links))
            for each in found
        ],
    )


@volume_group.command("cp")
@click.argument("source")
@click.argument("destination")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def copy(source: str, destination: str, force: bool) -> None:
    """Copy a file as it is, into a volume or out of it.

    Example: vhdx volume cp space://demo/data/disk.vhdx disk.vhdx
    """
    with progress_bar("copying") as progress, change():
        copy_file(source, destination, force=force, progress=progress)


@volume_group.command("mv")
@click.argument("source")
@click.argument("destination")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def move(source: str, destination: str, force: bool) -> None:
    """Rename a file of a volume."""
    with change():
        volume.rename_file(source, destination, force=force)


@volume_group.command("rm")
@click.argument("paths", nargs=-1, required=True)
def remove(paths: tuple[str, ...]) -> None:
    """Remove files of a volume."""
    with change():
        for path in paths:
            volume.remove_file(path)
