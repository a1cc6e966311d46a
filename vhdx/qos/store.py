# SPDX-License-Identifier: MIT
"""The QoS file of a server: the settings of disks, and the policies.

The file is JSON with a format, a version, a generation, and the CRC-32C of the content (its
canonical JSON: sorted keys, no spaces). It is written under a temporary name, made durable and
renamed, so a crash leaves the old or the new file. A file whose checksum does not match is refused
and never repaired. While a server uses the file, a lock on ``.NAME.lock`` in the same directory
keeps other servers from writing it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

from vhdx.errors import (
    DamagedError,
    HostIOError,
    InUseError,
    InvalidArgumentError,
    NoSpaceError,
    Reason,
    UnsupportedError,
    VhdxError,
)
from vhdx.image.attributes import copy_attributes
from vhdx.qos.policy import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vhdx.qos.policy import Policy
    from vhdx.qos.reservations import DesiredQos

__all__ = ["Store"]

_FORMAT, _VERSION = "vhdx qos", 1
_LARGEST = 64 << 20
_NOTHING_WANTED = {"settings": Settings().as_dict(), "policy": None}


class Store:
    """The content of a QoS file.

    Args:
        path: the path of the file, which the first :meth:`save` creates.

    Attributes:
        content: "disks" (by the real path of the image) and "policies".
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path):
            raise InvalidArgumentError("the QoS file has no name")
        self.path = Path(os.path.realpath(path))  # the target of a link is written and locked
        self.generation = 0
        self._mode: int | None = None  # of the existing file
        self.content: dict[str, Any] = {"disks": {}, "policies": []}
        self._lock = threading.Lock()
        self._guard = self._locked()
        try:
            data = self._read()
            if data is not None:
                self._parse(data)
        except BaseException:
            self.close()
            raise

    def _locked(self) -> int:
        name = self.path.with_name(f".{self.path.name}.lock")
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except (OSError, ValueError) as error:
            raise HostIOError(f"its lock file cannot be opened: {error}", path=self.path) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise InUseError(
                "another server uses this QoS file", path=self.path, hint="give each its own file"
            ) from error
        return fd

    def _read(self) -> bytes | None:
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its other end.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise HostIOError(f"it cannot be read: {error}", path=self.path) from error
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise HostIOError("not a regular file", reason=Reason.NOT_A_FILE, path=self.path)
            self._mode = stat.S_IMODE(found.st_mode)
            with open(fd, "rb", closefd=False) as file:
                return file.read(_LARGEST + 1)
        except OSError as error:
            if isinstance(error, VhdxError):
                raise
            raise HostIOError(f"it cannot be read: {error.strerror}", path=self.path) from error
        finally:
            os.close(fd)

    def close(self) -> None:
        """Releases the lock on the file."""
        if self._guard >= 0:
            os.close(self._guard)
        self._guard = -1

    @contextlib.contextmanager
    def content_errors(self) -> Iterator[None]:
        """Turns an error in the block into one that reports the file as damaged.

        Raises:
            DamagedError: the block failed.
        """
        try:
            yield
        except VhdxError as error:
            raise self._refuse(f"its content is invalid: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._refuse("its content is invalid") from error

    def _refuse(self, why: str) -> DamagedError:
        return DamagedError(
            why,
            reason=Reason.QOS_FILE,
            path=self.path,
            offset=0,
            hint="restore a copy, or remove it to start without limits",
        )

    def _parse(self, data: bytes) -> None:
        if len(data) > _LARGEST:
            raise self._refuse("it is too large for a QoS file")
        try:
            found = json.loads(data)
            content, checksum = found["content"], found["checksum"]
            kind, version, generation = found["format"], found["version"], found["generation"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._refuse("it is not a QoS file") from error
        if kind != _FORMAT:
            raise self._refuse("it is not a QoS file")
        if version != _VERSION:
            raise UnsupportedError(
                f"its version is {version}; this program supports {_VERSION}", path=self.path
            )
        if checksum != _checksum(content):
            raise self._refuse("its checksum is wrong: it was cut short or changed by hand")
        if not (
            isinstance(generation, int)
            and isinstance(content, dict)
            and isinstance(content.get("disks"), dict)
            and isinstance(content.get("policies"), list)
        ):
            raise self._refuse("its content is invalid")
        self.content, self.generation = content, generation

    def update(self, disks: Mapping[str, DesiredQos], policies: Iterable[Policy]) -> None:
        """Saves the settings of these disks, by real path, and all policies.

        Entries of other disks stay as they are. If nothing changed, nothing is written.

        Raises:
            HostIOError, NoSpaceError: it cannot be written; the old file stays.
        """
        kept = dict(self.content["disks"])
        for path, (settings, policy_id) in disks.items():
            policy = None if policy_id is None else str(policy_id)
            entry = {"settings": settings.as_dict(), "policy": policy}
            if path in kept or entry != _NOTHING_WANTED:
                kept[path] = entry
        content = {"disks": kept, "policies": [policy.as_dict() for policy in policies]}
        if content != self.content:
            self.save(content)

    def save(self, content: dict[str, Any]) -> None:
        """Replaces the content, durably.

        Raises:
            HostIOError, NoSpaceError: it cannot be written; the old file stays.
        """
        with self._lock:
            generation = self.generation + 1
            text = pack(content, generation)
            if len(text) > _LARGEST:
                raise HostIOError("the QoS file would be larger than 64 MiB", path=self.path)
            try:
                directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    existed = self._mode is not None
                    self._replace(text)
                    self._make_durable(directory, existed=existed)
                finally:
                    os.close(directory)
            except OSError as error:
                raise _failed(error, self.path) from error
            self.content, self.generation = content, generation

    def _make_durable(self, directory: int, *, existed: bool) -> None:
        """Makes the rename durable; if that fails, restores the old content and raises."""
        try:
            os.fsync(directory)
        except OSError:
            with contextlib.suppress(OSError):
                if existed:
                    self._replace(pack(self.content, self.generation))
                else:
                    self.path.unlink()
            raise

    def _replace(self, text: str) -> None:
        temporary = self.path.with_name(f".{self.path.name}.partial")  # the lock makes it ours
        try:
            temporary.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(temporary, flags, 0o644), "w", encoding="utf-8") as file:
                if self.path.exists():
                    copy_attributes(self.path, file.fileno())
                elif self._mode is not None:  # the file was removed
                    os.fchmod(file.fileno(), self._mode)
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            self._mode = mode
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


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
    if isinstance(error, VhdxError):
        return error
    if error.errno == NoSpaceError.error_number:
        return NoSpaceError("no space left for the QoS file", path=path)
    return HostIOError(f"the QoS file cannot be written: {error.strerror}", path=path)
