# SPDX-License-Identifier: MIT
"""A volume: named files on a space, whose metadata the pool's ledger keeps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.errors import InUseError, InvalidArgumentError, NotFoundError, VhdxError
from vhdx.volume.files import VolumeFile
from vhdx.volume.state import PAGE, FileState, Pages, VolumeState

if TYPE_CHECKING:
    import numpy.typing as npt

    from vhdx import plane
    from vhdx.spaces import Pool

__all__ = ["FileInfo", "Volume"]

_LONGEST_NAME = 255


@dataclass(frozen=True)
class FileInfo:
    """A name in a volume.

    Attributes:
        name: of the file.
        size: bytes.
        allocated: bytes that it takes.
        links: how many names it has.
    """

    name: str
    size: int
    allocated: int
    links: int


@dataclass
class _Open:
    """A file that is open, perhaps several times."""

    file: VolumeFile
    readers: int = 0
    writers: int = 0
    unlocked: int = 0
    closing: bool = False

    @property
    def count(self) -> int:
        return self.readers + self.writers + self.unlocked


class Volume:
    """An open volume.

    Args:
        pool: an open pool; the volume holds one of its spaces until :meth:`close`.
        name: of the space.

    Attributes:
        lock: covers every change; taken before the pool's.
        state: what the ledger says.
        pages: which are free.
        number: of the space.
        device: the space.
        read_only: nothing may be changed.
    """

    def __init__(self, pool: Pool, name: str) -> None:
        self.lock = threading.RLock()
        self._closed_one = threading.Condition(self.lock)
        self._pool, self.name = pool, name
        self.number = pool.leases.take(name)
        try:
            self.device: plane.Device = pool.leases.device(self.number)
            self.read_only = pool.read_only
            self.state = VolumeState()
            pool.leases.attach_owner(self.number, self.state)
            self.pages = Pages(self.state, self.device.size // PAGE)
            self._open: dict[int, _Open] = {}
            if not self.read_only:
                self._remove_nameless()
        except BaseException:
            pool.leases.give_back(self.number)
            raise

    def close(self) -> None:
        """Gives the space back; no file may be open."""
        self._pool.leases.detach_owner(self.number)
        self._pool.leases.give_back(self.number)

    def path_of(self, number: int) -> str:
        """A path of a file, for messages."""
        name = next((n for n, i in self.state.names.items() if i == number), "a new file")
        return f"space://{self._pool.name}/{self.name}/{name}"

    # ---- changes; under the lock ----

    def commit(self, payloads: Iterable[bytes], *, grows: bool = False) -> None:
        """Makes records durable, and applies them; those that grow need room in the ledger."""
        self._pool.leases.commit_owner(self.number, payloads, grows=grows)

    def take_zeroed(self, count: int, least: int) -> npt.NDArray[np.int64]:
        """Takes free pages and makes them read zeros."""
        self._pool.leases.need_room()
        self.pages.grow(self.device.size // PAGE)
        taken = self.pages.take(count, least)
        try:
            cuts = np.flatnonzero(np.diff(taken) != 1) + 1
            for run in np.split(taken, cuts):
                self.device.zero(int(run[0]) * PAGE, len(run) * PAGE)
            self.device.flush()  # else a crash could show what was there before
        except BaseException:
            self.pages.give_back(taken)
            raise
        return taken

    def _remove_nameless(self) -> None:
        """Removes files that were never complete."""
        named = set(self.state.names.values())
        for number in list(self.state.files):
            if number not in named:
                self._remove_file(number)

    def _remove_file(self, number: int) -> None:
        runs = self.state.files[number].runs
        self.commit([self.state.file_gone_record(number)])
        for run in runs:
            self.pages.give_back(np.arange(run.place, run.place + run.length))
        for run in runs:
            with contextlib.suppress(VhdxError):  # only a hint
                self.device.trim(run.place * PAGE, run.length * PAGE)

    # ---- files ----

    def find(self, name: str) -> int:
        """The number of a file.

        Raises:
            FileNotFoundError: there is no such name.
        """
        try:
            return self.state.names[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def files(self) -> list[FileInfo]:
        """All names, in order."""
        with self.lock:
            found = []
            for name, number in sorted(self.state.names.items()):
                file = self.state.files[number]
                found.append(FileInfo(name, file.size, file.pages * PAGE, self.state.links(number)))
            return found

    def create(self) -> int:
        """A new, empty file without a name; open for writing."""
        with self.lock:
            number = self.state.last_id + 1
            self.commit([self.state.file_record(FileState(number, 0))], grows=True)
            self._open[number] = _Open(VolumeFile(self, number), writers=1)
            return number

    def open(self, number: int, *, write: bool, locked: bool) -> VolumeFile:
        """Opens a file; every open file is closed by :meth:`release`.

        Raises:
            InUseError: it is open in a way that excludes this.
        """
        with self.lock:
            while (found := self._open.get(number)) is not None and found.closing:
                self._closed_one.wait()  # its last commit is under way
            if number not in self.state.files:
                raise NotFoundError("there is no such file", path=self._pool.name)
            if found is not None and locked and (found.writers or (write and found.readers)):
                raise InUseError("it is open already in this process", path=self.path_of(number))
            if found is None:
                found = self._open[number] = _Open(VolumeFile(self, number))
            if not locked:
                found.unlocked += 1
            elif write:
                found.writers += 1
            else:
                found.readers += 1
            return found.file

    def file(self, number: int) -> VolumeFile:
        """A file that is open."""
        return self._open[number].file

    def become_reader(self, number: int) -> None:
        """A writer only reads from now on."""
        with self.lock:
            found = self._open[number]
            found.writers -= 1
            found.readers += 1

    def release(self, number: int, *, write: bool, locked: bool) -> None:
        """Ends one use of a file; without a name it is removed at the last."""
        with self.lock:
            found = self._open[number]
            if not locked:
                found.unlocked -= 1
            elif write:
                found.writers -= 1
            else:
                found.readers -= 1
            if found.count:
                return
            found.closing = True
        try:
            found.file.close()  # not under the lock: it commits
        finally:
            with self.lock:
                del self._open[number]
                self._closed_one.notify_all()
                if not self.read_only and not self.state.links(number):
                    self._remove_file(number)

    # ---- names ----

    def name_file(self, number: int, name: str, *, replace: bool) -> None:
        """Gives a file a name, at one moment; durable.

        Raises:
            FileExistsError: the name is taken, and ``replace`` is not set.
        """
        with self.lock:
            _check_name(name)
            old = self.state.names.get(name)
            if old is not None and not replace:
                raise FileExistsError(name)
            self.commit([self.state.name_record(name, number)], grows=True)
            self._forget(old)

    def rename(self, name: str, other: str) -> None:
        """Renames a file, and replaces ``other``; durable."""
        with self.lock:
            _check_name(other)
            number, old = self.find(name), self.state.names.get(other)
            if name == other:
                return
            self.commit([self.state.name_record(other, number), self.state.name_gone_record(name)])
            self._forget(old)

    def remove(self, name: str) -> None:
        """Removes a name, and the file if it was the last and nobody uses it; durable."""
        with self.lock:
            number = self.find(name)
            self.commit([self.state.name_gone_record(name)])
            self._forget(number)

    def _forget(self, number: int | None) -> None:
        """Removes a file that has lost its last name, unless it is open."""
        if number is None or self.state.links(number) or number in self._open:
            return
        self._remove_file(number)

    def change_note(self, number: int, change: Callable[[bytes], bytes]) -> None:
        """Replaces the note of a file; durable."""
        with self.lock:
            file = self.state.files[number]
            changed = FileState(file.id, file.size, change(file.note))
            self.commit([self.state.file_record(changed)])


def _check_name(name: str) -> None:
    if not name or "/" in name or "\0" in name or name in {".", ".."}:
        raise InvalidArgumentError(f"no file can be named {name!r}")
    if len(name.encode(errors="surrogatepass")) > _LONGEST_NAME:
        raise InvalidArgumentError(f"a name has at most {_LONGEST_NAME} bytes")
