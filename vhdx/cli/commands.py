# SPDX-License-Identifier: MIT
"""The group of all commands. The module of a command is loaded when the command is used."""

from __future__ import annotations

import importlib
import sys

import click

from vhdx import __version__, lazy
from vhdx.cli.output import VhdxGroup, raise_from_now

__all__ = ["main"]

_IMAGES, _SERVING, _QOS = "vhdx.cli.images", "vhdx.cli.serving", "vhdx.cli.qos"
_MOUNTING, _FILES, _POOLS = "vhdx.cli.mounting", "vhdx.cli.files", "vhdx.cli.pools"
_HOMES = {
    "create": _IMAGES,
    "info": _IMAGES,
    "map": _IMAGES,
    "dump": _IMAGES,
    "convert": _IMAGES,
    "check": _IMAGES,
    "compact": _IMAGES,
    "resize": _IMAGES,
    "snapshot": _IMAGES,
    "merge": _IMAGES,
    "rebase": _IMAGES,
    "serve": _SERVING,
    "ps": _SERVING,
    "stop": _SERVING,
    "mount": _MOUNTING,
    "umount": _MOUNTING,
    "attach": _MOUNTING,
    "detach": _MOUNTING,
    "mounts": _MOUNTING,
    "ls": _FILES,
    "cat": _FILES,
    "cp": _FILES,
    "qos": _QOS,
    "top": _QOS,
    "pool": _POOLS,
    "space": _POOLS,
    "volume": _POOLS,
}
_READING = {"info", "map", "dump", "ps", "mounts", "ls", "cat"}
"""Commands that change nothing, so a signal ends them at once."""
_OTHER_NAMES = {"map": "map_extents", "volume": "volume_group"}


def _load(name: str) -> None:
    """Loads what the command ``name`` needs, so that no signal raises during an import."""
    for module in ("vhdx.control.disks", "vhdx.control.transport"):
        importlib.import_module(module)
    home = _HOMES.get(name)
    if home == _MOUNTING:
        lazy.load_everything("vhdx.mounting")
    if home == _FILES:
        lazy.load_everything("vhdx.files", but=("vhdx.files.reader", "vhdx.files.copying"))
    if home == _POOLS:
        lazy.load_everything("vhdx.spaces")
        lazy.load_everything("vhdx.volume")
    if home in {_IMAGES, _MOUNTING, _POOLS}:
        lazy.load_everything("vhdx.image")
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if home in {_IMAGES, _MOUNTING, _FILES, _POOLS} and terminal:
        importlib.import_module("vhdx.cli.progress")


class _Commands(VhdxGroup):
    asking = frozenset(name for name, home in _HOMES.items() if home in {_SERVING, _QOS})

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_HOMES)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name not in _READING and name != "serve":  # serve has its own handlers
            _load(name or "")
            raise_from_now()
        return name, command, rest

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _HOMES:
            return None
        module = importlib.import_module(_HOMES[cmd_name])
        command: click.Command = getattr(module, _OTHER_NAMES.get(cmd_name, cmd_name))
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Sizes are written 64G, 512M or 4096, in binary units. "
    "Exit codes: 0 done, 1 failed, 2 usage, 3 image damaged, 4 in use, 130 interrupted by a signal. "
    'For completion in bash: eval "$(_VHDX_COMPLETE=bash_source vhdx)"',
)
@click.version_option(__version__, prog_name="vhdx")
def main() -> None:
    """Create, inspect, resize, convert and serve VHDX images."""
