# SPDX-License-Identifier: MIT
"""All commands, put together; each stands in a module of its own."""

from __future__ import annotations

import click

from vhdx import __version__
from vhdx.cli import images, quality, serving
from vhdx.cli.output import VhdxGroup

__all__ = ["main"]


@click.group(
    cls=VhdxGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Sizes are written 64G, 512M or 4096, in binary units. "
    "Exit codes: 0 done, 1 failed, 2 usage, 3 image damaged, 4 in use, 130 interrupted by a signal. "
    'For completion in bash: eval "$(_VHDX_COMPLETE=bash_source vhdx)"',
)
@click.version_option(__version__, prog_name="vhdx")
def main() -> None:
    """Real VHDX images on Linux: create, look at, resize, convert and serve them."""


for command in (
    images.create,
    images.info,
    images.map_extents,
    images.dump,
    images.convert,
    images.check,
    images.compact,
    images.resize,
    images.snapshot,
    images.merge,
    images.rebase,
    serving.serve,
    serving.ps,
    serving.stop,
    quality.qos,
    quality.top,
):
    main.add_command(command)
