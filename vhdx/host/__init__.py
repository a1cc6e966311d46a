# SPDX-License-Identifier: MIT
"""A running session: open disks, the thread pool, Storage QoS, and the runtime directory."""

from typing import TYPE_CHECKING

from vhdx import lazy

if TYPE_CHECKING:
    from vhdx.host.options import Limits, ServerOptions
    from vhdx.host.session import Export, Session

__all__ = ["Export", "Limits", "ServerOptions", "Session"]

__getattr__ = lazy.exports(
    __name__,
    {"vhdx.host.options": "Limits ServerOptions", "vhdx.host.session": "Export Session"},
)
