# SPDX-License-Identifier: MIT
"""Deferred imports: most commands need only a small part of the package."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Module", "exports", "load_everything"]


class Module:
    """Stands for a module, which is imported at the first access to one of its attributes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next access bypasses this method
        return value


def exports(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for ``package`` (PEP 562), which imports each name at its first access.

    Args:
        package: its ``__name__``.
        names: maps each module to the names that it defines, separated by spaces;
            ``its_name:name`` where the package exports a name under another one.
    """
    homes: dict[str, tuple[str, str]] = {}
    for module, each in names.items():
        for theirs, _, ours in (one.partition(":") for one in each.split()):
            homes[ours or theirs] = (module, theirs)

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, theirs = homes[name]
        value = getattr(importlib.import_module(module), theirs)
        setattr(sys.modules[package], name, value)  # the next access bypasses this function
        return value

    return find


@functools.cache
def load_everything(package: str, *, but: tuple[str, ...] = ()) -> None:
    """Imports all modules of a package except those under the prefixes ``but``.

    A long-running program calls this at its start. If the package is upgraded meanwhile, a module
    that is imported later could be of another version.
    """
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not found.name.startswith(but):
            importlib.import_module(found.name)
