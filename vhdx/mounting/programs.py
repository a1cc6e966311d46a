# SPDX-License-Identifier: MIT
"""Runs the programs of the system that attach and mount: util-linux, nbd-client, nbdfuse, ntfs-3g."""

from __future__ import annotations

import contextlib
import contextvars
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from vhdx.errors import HostIOError, Reason, UnsupportedError, VhdxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Output",
    "Process",
    "find",
    "has",
    "keeping",
    "last_line",
    "load_module",
    "run",
    "spawn",
    "wait_until",
]

_PACKAGES = {
    "blkid": "util-linux",
    "partx": "util-linux",
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "fusermount3": "fuse3",
    "nbdfuse": "libnbd-bin",
    "nbd-client": "nbd-client",
    "mount.ntfs-3g": "ntfs-3g",
    "ntfs-3g.probe": "ntfs-3g",
}
"""The Debian package of each program."""

_SECONDS = 60.0
_POLL_SECONDS = 0.02


class Output(NamedTuple):
    """What a program left: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The last line that it wrote to standard error, or its exit code."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"

    @property
    def beginning(self) -> str:
        """The first two lines that it wrote to standard error, or its exit code."""
        lines = [line.strip().rstrip(".") for line in self.err.splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("dmesg(1)")]
        return "; ".join(said[:2]) or f"exit code {self.code}"


def _path() -> str:
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def has(name: str) -> bool:
    """Whether a program is installed."""
    return shutil.which(name, path=_path()) is not None


_kept: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar("_kept", default=())


@contextlib.contextmanager
def keeping(fd: int) -> Iterator[None]:
    """Lets the programs that :func:`run` starts inherit a descriptor.

    If it is that of a lock, the lock is held until they end, even if this process is killed.
    """
    before = _kept.set((*_kept.get(), fd))
    try:
        yield
    finally:
        _kept.reset(before)


def find(name: str) -> str:
    """The path of a program.

    Raises:
        UnsupportedError: it is not installed; the hint names its Debian package.
    """
    found = shutil.which(name, path=_path())
    if found is None:
        raise UnsupportedError(
            f"the program {name} is not installed", hint=f"apt install {_PACKAGES.get(name, name)}"
        )
    return found


def _environment() -> dict[str, str]:
    # A user's runtime directory vanishes at logout, and these processes stay.
    kept = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    return kept | {"PATH": _path(), "LC_ALL": "C.UTF-8"}


def run(name: str, *arguments: str, seconds: float = _SECONDS, keep_lock: bool = True) -> Output:
    """Runs a program to its end. It is not in our process group, so Ctrl-C does not reach it.

    Args:
        name, arguments: the program, and what it is given.
        seconds: the longest time.
        keep_lock: let it inherit the lock; not for a program that leaves a daemon.

    Raises:
        UnsupportedError: it is not installed.
        HostIOError: it cannot be started, or has not ended in time.
    """
    try:
        child = subprocess.Popen(
            [find(name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
            pass_fds=_kept.get() if keep_lock else (),
            text=True,
            errors="surrogateescape",
        )
    except OSError as error:
        raise HostIOError(f"{name} cannot be started: {error.strerror}") from error
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        child.kill()  # a program that waits in the kernel does not die, so nobody waits for it
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
        raise HostIOError(f"{name} has not ended after {seconds:g} s") from error
    return Output(child.returncode, out, err)


def load_module(name: str) -> bool:
    """Makes sure that the kernel has a module, or has it built in; returns whether it does."""
    if Path("/sys/module", name).is_dir():
        return True
    return has("modprobe") and run("modprobe", "--quiet", name).code == 0


def wait_until(
    happened: Callable[[], bool], seconds: float, cancel: Callable[[], bool] | None = None
) -> bool:
    """Polls until ``happened`` returns True; returns False after ``seconds``.

    Raises:
        VhdxError: ``cancel`` returned True (reason CANCELLED).
    """
    deadline = time.monotonic() + seconds
    while not happened():
        if cancel is not None and cancel():
            raise VhdxError("the operation was cancelled", reason=Reason.CANCELLED)
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


class Process(msgspec.Struct, frozen=True):
    """A process that outlives the command that started it.

    Attributes:
        pid: its number.
        started: clock ticks from the boot to its start, because numbers are used again.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this number now."""
        return cls(pid, _status_of(pid)[0])

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        started, state = _status_of(self.pid)
        if started != self.started:
            return False
        if state == "Z":
            _reap(self.pid)
        return state not in {"Z", "X"}

    def signal(self, number: int) -> None:
        """Sends a signal, if the process runs."""
        with contextlib.suppress(ProcessLookupError):
            if self.alive:
                os.kill(self.pid, number)

    def end(self, seconds: float) -> None:
        """Asks it to end, and kills it after ``seconds``."""
        self.signal(signal.SIGTERM)
        if not wait_until(lambda: not self.alive, seconds):
            self.signal(signal.SIGKILL)
            wait_until(lambda: not self.alive, 5.0)


def _status_of(pid: int) -> tuple[int, str]:
    """When a process started, and its state; 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0, "X"
    fields = text.rpartition(")")[2].split()  # the name before it may contain anything
    return int(fields[19]), fields[0]


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # another process may have started it
        os.waitpid(pid, os.WNOHANG)


def last_line(path: Path) -> str:
    """The last line of a log; empty if there is none."""
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


_GATE = 'cd / && read -r go && exec "$@" </dev/null'
"""Starts a program when a line arrives; ends if the other end is closed before."""


def spawn(
    arguments: list[str], *, output: int, errors: Path, remember: Callable[[Process], None]
) -> Process:
    """Starts a program that goes on when this process ends.

    Its working directory is the root, so that it keeps no file system busy.

    Args:
        arguments: the program and its arguments.
        output: the file descriptor for its standard output.
        errors: the file that its standard error is appended to.
        remember: records the process. The program starts afterwards, so that no program runs that
            is not recorded, whenever this process is killed.
    """
    command = [find("sh"), "-c", _GATE, "sh", find(arguments[0]), *arguments[1:]]
    gate, go = os.pipe()
    try:
        with errors.open("ab") as log:
            child = subprocess.Popen(
                command,
                stdin=gate,
                stdout=output,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
        child.returncode = 0  # it is not waited for: Process does that
        process = Process.of(child.pid)
        remember(process)
        os.write(go, b"go\n")
    except OSError as error:
        raise HostIOError(f"{arguments[0]} cannot be started: {error.strerror}") from error
    finally:
        os.close(gate)
        os.close(go)
    return process
