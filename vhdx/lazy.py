# SPDX-License-Identifier: MIT
"""Imports that wait until they are needed: most commands need a small part of all that there is."""

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
    """Stands for a module, which is imported when somebody asks for an attribute of it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next look finds it without coming here
        return value


def exports(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for ``package`` (PEP 562), which imports a name when it is first asked for.

    Args:
        package: its ``__name__``.
        names: for each module the names that it has, separated by spaces; ``its_name:name`` where
            the package calls it otherwise.
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
        setattr(sys.modules[package], name, value)  # the next look finds it without coming here
        return value

    return find


@functools.cache
def load_everything(package: str, *, but: tuple[str, ...] = ()) -> None:
    """Imports a package whole, but for these parts of it, and what its modules use.

    A program that runs for long does so at its start. What it loaded later could be of another
    version, when the package was upgraded meanwhile.
    """
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not found.name.startswith(but):
            importlib.import_module(found.name)
