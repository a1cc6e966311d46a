# SPDX-License-Identifier: MIT
"""A server's QoS file: what is wanted of which disk, and the policies.

JSON with a format, version, generation and the CRC-32C of the content (its canonical JSON: sorted
keys, no spaces). It is written to a temporary name, made durable and renamed, so a crash leaves the
old or the new one. Recovery: a file whose checksum does not fit is refused; nothing is guessed.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import google_crc32c

from vhdx.errors import DamagedError, HostIOError, NoSpaceError, Reason, UnsupportedError, VhdxError

__all__ = ["Store"]

_FORMAT, _VERSION = "vhdx qos", 1
_LARGEST = 64 << 20


class Store:
    """The content of a QoS file.

    Args:
        path: of the file; made by the first :meth:`save`.

    Attributes:
        content: "disks" by absolute path of the image, and "policies".
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.generation = 0
        self.content: dict[str, Any] = {"disks": {}, "policies": []}
        self._lock = threading.Lock()
        try:
            with self.path.open("rb") as file:
                data = file.read(_LARGEST + 1)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise HostIOError(f"it cannot be read: {error}", path=self.path) from error
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        def refuse(why: str) -> DamagedError:
            return DamagedError(
                why,
                reason=Reason.QOS_FILE,
                path=self.path,
                offset=0,
                hint="restore a copy, or remove it to start without limits",
            )

        if len(data) > _LARGEST:
            raise refuse("it is too large for a QoS file")
        try:
            found = json.loads(data)
            content, checksum = found["content"], found["checksum"]
            kind, version, generation = found["format"], found["version"], found["generation"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise refuse(f"it is no QoS file: {error}") from error
        if kind != _FORMAT:
            raise refuse("it is no QoS file")
        if version != _VERSION:
            raise UnsupportedError(
                f"its version is {version}, this program knows {_VERSION}", path=self.path
            )
        if checksum != _checksum(content):
            raise refuse("its checksum does not fit: it was cut short or changed by hand")
        if not (
            isinstance(generation, int)
            and isinstance(content, dict)
            and isinstance(content.get("disks"), dict)
            and isinstance(content.get("policies"), list)
        ):
            raise refuse("its content is not as it should be")
        self.content, self.generation = content, generation

    def save(self, content: dict[str, Any]) -> None:
        """Replaces the content, durably.

        Raises:
            HostIOError, NoSpaceError: it cannot be written; the old file stays.
        """
        with self._lock:
            generation = self.generation + 1
            text = pack(content, generation)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
            try:
                with temporary.open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
                directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
            except OSError as error:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise _failed(error, self.path) from error
            self.content, self.generation = content, generation


def pack(content: dict[str, Any], generation: int) -> str:
    """The text of a QoS file."""
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "generation": generation,
        "checksum": _checksum(content),
        "content": content,
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _checksum(content: Any) -> str:
    plain = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return f"{google_crc32c.value(plain):08x}"


def _failed(error: OSError, path: Path) -> VhdxError:
    if error.errno == NoSpaceError.error_number:
        return NoSpaceError("no space left for the QoS file", path=path)
    return HostIOError(f"the QoS file cannot be written: {error.strerror}", path=path)
