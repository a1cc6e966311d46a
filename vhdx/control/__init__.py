# SPDX-License-Identifier: MIT
"""Live control of servers: each server has a control socket and answers HTTP with JSON there.

An image that a server holds is changed through that server. :mod:`vhdx.control.disks` has the
operations that work the same whether an image is idle or served. :mod:`vhdx.control.service` is the
server side. :mod:`vhdx.control.client` finds servers and sends them requests.
"""

from typing import TYPE_CHECKING

from vhdx import lazy

if TYPE_CHECKING:
    from vhdx.control.client import Owner, find_owner, owners, servers
    from vhdx.control.disks import compact, extents, info, resize, snapshot
    from vhdx.control.service import Control, serve

__all__ = [
    "Control",
    "Owner",
    "compact",
    "extents",
    "find_owner",
    "info",
    "owners",
    "resize",
    "serve",
    "servers",
    "snapshot",
]

__getattr__ = lazy.exports(
    __name__,
    {
        "vhdx.control.client": "Owner find_owner owners servers",
        "vhdx.control.disks": "compact extents info resize snapshot",
        "vhdx.control.service": "Control serve",
    },
)
