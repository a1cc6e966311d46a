# SPDX-License-Identifier: MIT
"""Commands on image files: those that create, inspect, change, check and convert them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vhdx import control, image, lazy
from vhdx.cli.output import (
    SEQUENCE,
    SIZE,
    change,
    json_option,
    print_json,
    print_table,
    progress_bar,
)
from vhdx.image.formats import FORMATS
from vhdx.image.vhdx import dump as dumping
from vhdx.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vhdx.image.vhdx import repairing

    _Command = Callable[..., Any]
else:  # loaded for the command that needs it
    repairing = lazy.Module("vhdx.image.vhdx.repairing")

__all__ = [
    "check",
    "compact",
    "convert",
    "create",
    "dump",
    "info",
    "map_extents",
    "merge",
    "rebase",
    "resize",
    "snapshot",
]

_format = click.option(
    "--format", "format_", type=click.Choice(FORMATS), help="Format. [default: detected]"
)
_OPTIONS_OF_VIEW = (
    click.option("--header", type=click.IntRange(1, 2), help="Use this header, current or not."),
    click.option("--region-table", type=click.IntRange(1, 2), help="Use this region table."),
    click.option(
        "--log",
        type=SEQUENCE,
        help="Replay the log up to this entry (see dump log), or none. [default: active sequence]",
    ),
)


def _view(command: _Command) -> _Command:
    """Adds the options for forensics: which header, region table and log sequence are used."""
    for option in reversed(_OPTIONS_OF_VIEW):
        command = option(command)
    return command


_parents = click.option(
    "--parent-dir",
    multiple=True,
    type=click.Path(file_okay=False),
    help="Also search this directory for parents; may be repeated.",
)


@click.command()
@click.argument("path", type=click.Path())
@click.option("--size", type=SIZE, help="Virtual size, such as 64G. [default: the parent's]")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["dynamic", "fixed", "differencing"]),
    help="[default: dynamic, or differencing with a parent]",
)
@click.option("--parent", type=click.Path(), help="Parent of a differencing image.")
@click.option(
    "--block-size",
    type=SIZE,
    help="1M to 256M, a power of two. [default: 32M; differencing and VHD 2M]",
)
@click.option("--logical-sector", type=click.Choice(["512", "4096"]), help="[default: 512]")
@click.option("--physical-sector", type=click.Choice(["512", "4096"]), help="[default: 4096]")
@click.option("--no-sparse", is_flag=True, help="Leave no unallocated parts in the host file.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def create(
    path: str,
    size: int | None,
    kind: str | None,
    parent: str | None,
    block_size: int | None,
    logical_sector: str | None,
    physical_sector: str | None,
    no_sparse: bool,
    force: bool,
) -> None:
    """Create an empty image: a VHD if its name ends in .vhd or .avhd, else a VHDX.

    Example: vhdx create disk.vhdx --size 64G
    """
    with progress_bar("allocating") as progress, change():
        image.create(
            path,
            size,
            type=kind,
            parent=parent,
            block_size=block_size,
            logical_sector_size=None if logical_sector is None else int(logical_sector),
            physical_sector_size=None if physical_sector is None else int(physical_sector),
            sparse=not no_sparse,
            force=force,
            progress=progress,
        )


@click.command()
@click.argument("path", type=click.Path())
@_format
@_parents
@click.option("--no-chain", is_flag=True, help="Do not open the parents.")
@click.option("--chain", is_flag=True, help="Show every layer, this one first.")
@_view
@json_option
def info(
    path: str,
    format_: str | None,
    parent_dir: tuple[str, ...],
    no_chain: bool,
    chain: bool,
    header: int | None,
    region_table: int | None,
    log: int | None,
    as_json: bool,
) -> None:
    """Show the properties of an image.

    Example: vhdx info disk.vhdx --json
    """
    view = image.View(header, region_table, log)
    facts = control.info(
        path, format=format_, parent_search=parent_dir, chain=not no_chain, view=view
    )
    layers = facts.pop("chain")
    if chain:
        _show_chain(layers, as_json)
        return
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<{width}}{_shown(name, value)}")


def _show_chain(layers: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(layers)
        return
    print_table(
        ("", "path", "type", "virtual size", "file size"),
        [
            (
                str(depth),
                layer["path"],
                layer["type"],
                format_size(layer["virtual_size"]),
                format_size(layer["file_size"]),
            )
            for depth, layer in enumerate(layers)
        ],
    )


def _shown(name: str, value: Any) -> str:
    if name.endswith("_size") and isinstance(value, int):
        return f"{format_size(value)} ({value} bytes)" if value >= 1024 else f"{value} bytes"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(
            f"{key.replace('_', ' ')} {' '.join(entry) if isinstance(entry, list) else entry}"
            for key, entry in value.items()
            if entry != 0
        )
    return str(value)


@click.command()
@click.argument("path", type=click.Path())
@click.option(
    "--repair",
    is_flag=True,
    help="Repair what needs no guess; overwritten bytes are kept in PATH.undo.",
)
@click.option("--undo", is_flag=True, help="Undo the last repair.")
@json_option
@click.pass_context
def check(context: click.Context, path: str, repair: bool, undo: bool, as_json: bool) -> None:
    """Check a VHDX image against its specification. The exit code is 3 if errors remain.

    Example: vhdx check disk.vhdx --repair
    """
    if repair and undo:
        raise click.UsageError("choose --repair or --undo")
    if undo:
        with change():
            image.undo(path)
        click.echo("the last repair is undone")
        return
    if repair:
        with change():
            report = image.repair(path)
    else:
        report = image.check(path)
    if as_json:
        print_json(report.as_dict())
    else:
        for finding in report.repaired:
            click.echo(f"repaired: {finding.message}")
        for finding in report.findings:
            where = "" if finding.offset is None else f" at {finding.offset:#x}"
            click.echo(f"{finding.severity}{where}: {finding.message} [{finding.code}]")
        if report.repaired:
            kept = repairing.undo_path(path)
            click.echo(f"the overwritten bytes are kept in {kept}")
        if not report.findings:
            click.echo("no errors")
        elif any(finding.repair for finding in report.findings) and not repair:
            click.echo("--repair can repair some of this")
        elif report.errors and repair:
            click.echo("what is left needs a guess: copy what can be read, or restore a backup")
    context.exit(3 if report.errors else 0)


@click.command()
@click.argument("path", type=click.Path())
@_parents
@json_option
def compact(path: str, parent_dir: tuple[str, ...], as_json: bool) -> None:
    """Return the space of all-zero and trimmed blocks to the host.

    Example: vhdx compact disk.vhdx
    """
    with progress_bar("compacting") as progress, change():
        done = control.compact(path, parent_search=parent_dir, progress=progress)
    if as_json:
        print_json(done.as_dict())
    else:
        click.echo(
            f"{format_size(done.file_size_before)} became {format_size(done.file_size_after)}: "
            f"{done.zeroed} blocks were zeros, {done.moved} moved down; "
            f"it takes {format_size(done.reclaimed)} less space on the host"
        )


@click.command()
@click.argument("path", type=click.Path())
@click.argument("size", type=SIZE)
@click.option("--shrink", is_flag=True, help="Allow a smaller size, down to the last partition.")
@click.option(
    "--unsafe",
    is_flag=True,
    help="With --shrink: even without a partition table, or if it cuts off the backup of a GPT.",
)
@click.option(
    "--move-gpt",
    is_flag=True,
    help="Move the backup of a GPT to the new end. No guest may use the disk meanwhile.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Proceed even if a child image depends on this one. The child becomes unusable.",
)
def resize(path: str, size: int, shrink: bool, unsafe: bool, move_gpt: bool, force: bool) -> None:
    """Change the virtual size. The guest must adapt its partitions itself.

    Example: vhdx resize disk.vhdx 128G
    """
    with change():
        note = control.resize(
            path, size, shrink=shrink, unsafe=unsafe, move_gpt=move_gpt, force=force
        )
    if note is not None:
        click.echo(f"vhdx: {path}: {note}", err=True)


@click.command()
@click.argument("path", type=click.Path())
@click.option(
    "--checkpoint",
    type=click.Path(),
    help="Path of the checkpoint. [default: the image's name with the time, in its directory]",
)
@click.option(
    "--force",
    is_flag=True,
    help="Proceed even if a child image depends on this one. The child becomes unusable.",
)
def snapshot(path: str, checkpoint: str | None, force: bool) -> None:
    """Keep the current content of a disk in a checkpoint, and continue in a child image.

    Prints the path of the checkpoint.

    Example: vhdx snapshot disk.vhdx --checkpoint before-upgrade.vhdx
    """
    with change():
        name = control.snapshot(path, checkpoint, force=force)
    click.echo(name)


@click.command()
@click.argument("path", type=click.Path())
@_parents
@click.option(
    "--force",
    is_flag=True,
    help="Proceed even if other images depend on the parent. They become unusable.",
)
@click.option(
    "--keep-parent-name",
    is_flag=True,
    help="Keep the parent's name instead of the image's, as qemu-img commit and Merge-VHD do.",
)
def merge(path: str, parent_dir: tuple[str, ...], force: bool, keep_parent_name: bool) -> None:
    """Merge a differencing image into its parent, whose file takes the image's name.

    The parent's own name is gone afterwards (or the image's, with --keep-parent-name). If other
    images are based on the parent, the merge is refused without --force.

    Example: vhdx merge disk.vhdx
    """
    with progress_bar("merging") as progress, change():
        image.merge(
            path,
            parent_search=parent_dir,
            force=force,
            keep_parent_name=keep_parent_name,
            progress=progress,
        )


@click.command()
@click.argument("path", type=click.Path())
@click.option("--parent", type=click.Path(), required=True, help="The new parent.")
@_parents
@click.option("--unsafe", is_flag=True, help="Assume the old parent's content; copy nothing.")
def rebase(path: str, parent: str, parent_dir: tuple[str, ...], unsafe: bool) -> None:
    """Give a differencing image another parent; its content stays.

    Example: vhdx rebase disk.vhdx --parent moved/base.vhdx
    """
    with progress_bar("comparing") as progress, change():
        image.rebase(path, parent, parent_search=parent_dir, unsafe=unsafe, progress=progress)


@click.command(name="map")
@click.argument("path", type=click.Path())
@_format
@_parents
@json_option
def map_extents(path: str, format_: str | None, parent_dir: tuple[str, ...], as_json: bool) -> None:
    """Show which ranges of a disk are stored, zero, or holes.

    Example: vhdx map disk.vhdx
    """
    found = control.extents(path, format=format_, parent_search=parent_dir)
    if as_json:
        print_json(
            [
                {"offset": e.offset, "length": e.length, "state": e.state, "depth": e.depth}
                for e in found
            ]
        )
        return
    click.echo(f"{'offset':>16}  {'length':>16}  {'state':<6} depth")
    for extent in found:
        depth = "" if extent.depth is None else extent.depth
        click.echo(
            f"{extent.offset:>16}  {extent.length:>16}  {extent.state.value:<6} {depth}".rstrip()
        )


@click.command()
@click.argument("what", type=click.Choice(dumping.SECTIONS))
@click.argument("path", type=click.Path())
@_view
@json_option
def dump(
    what: str,
    path: str,
    header: int | None,
    region_table: int | None,
    log: int | None,
    as_json: bool,
) -> None:
    """Print on-disk structures as they are stored, even damaged ones.

    Example: vhdx dump headers disk.vhdx
    """
    found = dumping.dump(path, what, image.View(header, region_table, log))
    if as_json:
        print_json(list(found))
        return
    _print_records(found)


def _print_records(records: Iterable[dict[str, Any]]) -> None:
    for record in records:
        click.echo(
            "  ".join(
                f"{name}={value:#x}"
                if name in dumping.HEXADECIMAL and isinstance(value, int)
                else f"{name}={value}"
                for name, value in record.items()
            )
        )


@click.command()
@click.argument("source", type=click.Path())
@click.argument("destination", type=click.Path())
@click.option("--azure", is_flag=True, help="Make what Azure accepts: a fixed VHD of whole MiB.")
@click.option("--to", type=click.Choice(FORMATS), help="Format to write. [default: by the suffix]")
@_format
@_parents
@click.option(
    "--type", "kind", type=click.Choice(["dynamic", "fixed"]), default="dynamic", show_default=True
)
@click.option("--block-size", type=SIZE, help="1M to 256M, a power of two. [default: 32M; VHD: 2M]")
@click.option("--logical-sector", type=click.Choice(["512", "4096"]), help="[default: the source's]")
@click.option("--no-sparse", is_flag=True, help="Leave no unallocated parts in the host file.")
@_view
@click.option("--force", is_flag=True, help="Replace an existing file.")
def convert(
    source: str,
    destination: str,
    azure: bool,
    to: str | None,
    format_: str | None,
    parent_dir: tuple[str, ...],
    kind: str,
    block_size: int | None,
    logical_sector: str | None,
    no_sparse: bool,
    header: int | None,
    region_table: int | None,
    log: int | None,
    force: bool,
) -> None:
    """Copy a disk into a new image; only stored ranges are read.

    Example: vhdx convert disk.raw disk.vhdx
    """
    with progress_bar("converting") as progress, change():
        padded = image.convert(
            source,
            destination,
            to=to,
            azure=azure,
            format=format_,
            type=kind,
            block_size=block_size,
            logical_sector_size=None if logical_sector is None else int(logical_sector),
            parent_search=parent_dir,
            view=image.View(header, region_table, log),
            sparse=not no_sparse,
            force=force,
            progress=progress,
        )
    if padded:
        click.echo(
            f"vhdx: {source} does not end at a {'MiB' if azure else 'sector'}: "
            f"{padded} bytes of zeros were added",
            err=True,
        )
