# SPDX-License-Identifier: MIT
"""Mounts images: a private server, the kernel's NBD client or FUSE with loop devices, mount(8).

Only root can mount. ``attaching`` starts the server and shows its disk to the kernel in one of the
``ways``, and ``detaching`` undoes that. ``devices`` and ``filesystems`` decide what is mounted, and
how. ``records`` keeps what is mounted for the next command.
"""

from typing import TYPE_CHECKING

from vhdx import lazy

if TYPE_CHECKING:
    from vhdx.mounting.attach_devices import Attached, attach
    from vhdx.mounting.context import mounted
    from vhdx.mounting.mount_image import Mounted, mount
    from vhdx.mounting.reports import MountReport, mounts, servers_in_use
    from vhdx.mounting.unmount_image import detach, unmount

__all__ = [
    "Attached",
    "MountReport",
    "Mounted",
    "attach",
    "detach",
    "mount",
    "mounted",
    "mounts",
    "servers_in_use",
    "unmount",
]

__getattr__ = lazy.exports(
    __name__,
    {
        "vhdx.mounting.attach_devices": "Attached attach",
        "vhdx.mounting.context": "mounted",
        "vhdx.mounting.mount_image": "Mounted mount",
        "vhdx.mounting.reports": "MountReport mounts servers_in_use",
        "vhdx.mounting.unmount_image": "detach unmount",
    },
)
