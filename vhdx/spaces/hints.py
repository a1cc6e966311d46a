# SPDX-License-Identifier: MIT
"""Hints: where the disks of a pool were last, so that people can name a pool and not its disks.

A hint is a file NAME.json in ``/var/lib/vhdx/pools`` for root, in ``$XDG_STATE_HOME/vhdx/pools`` or
``~/.local/state/vhdx/pools`` for others, or in the directory that ``VHDX_POOLS`` names. It is not
metadata of the pool: it may be missing, old or wrong, and then disks are given by their paths.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from vhdx.errors import HostIOError, NotFoundError

__all__ = ["Hint", "find_hint", "forget_hint", "hints", "hints_directory", "write_hint"]


@dataclass(frozen=True)
class Hint:
    """Where a pool was.

    Attributes:
        name: the pool's.
        pool: its UUID.
        disks: paths.
    """

    name: str
    pool: UUID
    disks: list[str]


def hints_directory() -> Path:
    """The directory of this user's hints."""
    given = os.environ.get("VHDX_POOLS")
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/vhdx/pools")
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "vhdx" / "pools"


def _read(path: Path) -> Hint | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(path.read_text())
        return Hint(path.stem, UUID(content["pool"]), [str(disk) for disk in content["disks"]])
    return None


def hints() -> list[Hint]:
    """All hints, by name."""
    found = [_read(path) for path in sorted(hints_directory().glob("*.json"))]
    return [hint for hint in found if hint is not None]


def find_hint(name: str) -> Hint:
    """The hint of a pool.

    Raises:
        NotFoundError: there is none.
    """
    hint = _read(hints_directory() / f"{name}.json")
    if hint is None:
        raise NotFoundError(
            f"there is no pool {name!r} here",
            hint="name its disks: --disks PATH (disks=); then vhdx pool import makes it known",
        )
    return hint


def write_hint(hint: Hint) -> None:
    """Makes a pool known by its name.

    Raises:
        HostIOError: the hint cannot be written.
    """
    path = hints_directory() / f"{hint.name}.json"
    text = json.dumps({"pool": str(hint.pool), "disks": hint.disks}, indent=1)
    temporary = path.with_name(f".{hint.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise HostIOError(f"the hint cannot be written: {error.strerror}", path=path) from error


def forget_hint(name: str) -> None:
    """Removes a hint, if there is one."""
    with contextlib.suppress(OSError):
        (hints_directory() / f"{name}.json").unlink()
