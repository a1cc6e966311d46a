# SPDX-License-Identifier: MIT
"""What all commands share: parameter types, exit codes, signals, JSON, tables and progress."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import click

from vhdx.cli import INTERRUPTED, SIGNALS, end_at_once
from vhdx.errors import (
    DamagedError,
    InUseError,
    InvalidArgumentError,
    Reason,
    VhdxError,
)
from vhdx.interrupts import DONE_NOTE, Completion, completing
from vhdx.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

__all__ = [
    "SAME_SECONDS",
    "SECONDS",
    "SEQUENCE",
    "SIZE",
    "VhdxGroup",
    "change",
    "exit_code",
    "json_option",
    "print_json",
    "print_table",
    "progress_bar",
    "raise_from_now",
    "shown",
]

_LONGEST_SECONDS = 86400
SAME_SECONDS = 0.5
"""A signal within this time after the first is ignored: timeout(1) and shells send several."""
DONE, FAILED, USAGE, DAMAGED, IN_USE = 0, 1, 2, 3, 4


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def exit_code(error: BaseException) -> int:
    """The exit code of a command that fails with ``error``."""
    if isinstance(error, InvalidArgumentError):
        return USAGE
    if isinstance(error, DamagedError):
        return DAMAGED
    if isinstance(error, InUseError):
        return IN_USE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return FAILED


class _Size(click.ParamType):  # type: ignore[type-arg]
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except InvalidArgumentError as error:
            self.fail(str(error), param, ctx)


SIZE = _Size()


class _Sequence(click.ParamType):  # type: ignore[type-arg]
    name = "none|NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "none":
            return 0
        try:
            return int(value, 0)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither none nor a sequence number", param, ctx)


SEQUENCE = _Sequence()


class _Seconds(click.ParamType):  # type: ignore[type-arg]
    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        if not (math.isfinite(seconds) and 0 < seconds <= _LONGEST_SECONDS):
            self.fail(f"{value} seconds: choose more than 0, up to a day", param, ctx)
        return seconds


SECONDS = _Seconds()


class VhdxGroup(click.Group):
    """Turns errors into one line and an exit code.

    Attributes:
        asking: commands that send requests to a server. When one is interrupted, it is not known
            what the server has changed.
    """

    asking: frozenset[str] = frozenset()

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command. Click would turn a KeyboardInterrupt, with its notes, into an Abort."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            cause = error.__cause__
            if isinstance(cause, VhdxError) and cause.reason != Reason.CANCELLED:
                raise cause from None  # it would have failed without the signal, too
            left = _what_is_left(error)
            if left is None and ctx.invoked_subcommand not in self.asking and not _has_begun():
                left = "nothing was changed"
            raise _InterruptedError(left) from error

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command. Errors that a user can cause are shown without a traceback."""
        signals = _Signals()
        try:
            try:
                code = self._run(args, kwargs)
            finally:
                signals.end()
        except (KeyboardInterrupt, click.Abort, _InterruptedError) as error:
            signals.end()
            left = error.left if isinstance(error, _InterruptedError) else None
            click.echo("vhdx: interrupted" + (f": {left}" if left else ""), err=True)
            code = INTERRUPTED
        signals.leave()
        sys.exit(code)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Runs the command; returns its exit code."""
        kwargs["standalone_mode"] = False
        try:
            result = super().main(*args, **kwargs)
            if sys.stdout is not None:  # None: the parent process closed it
                sys.stdout.flush()
        except click.exceptions.Exit as error:
            return error.exit_code
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except VhdxError as error:
            click.echo(f"vhdx: {error}", err=True)
            return exit_code(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of the output has closed its end
                with contextlib.suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return FAILED
            click.echo(f"vhdx: {error}", err=True)
            return FAILED
        return result if isinstance(result, int) else DONE


class _InterruptedError(BaseException):
    """An interruption on its way through Click.

    Attributes:
        left: what the interrupted command leaves behind; None when that is not known.
    """

    def __init__(self, left: str | None) -> None:
        super().__init__()
        self.left = left


_completion: Completion | None = None
"""State of the change that the running command makes; None before :func:`change` is entered."""


def _has_begun() -> bool:
    return _completion is not None and _completion.begun


@contextlib.contextmanager
def change() -> Iterator[None]:
    """Wraps the one operation by which a command changes something.

    A signal that arrives after that operation has no effect: the command ends normally.
    """
    global _completion
    with completing() as _completion:
        yield


_signals: _Signals | None = None
"""The signal handling of the running command."""


def raise_from_now() -> None:
    """Makes signals raise from now on. Everything that this thread needs must be loaded."""
    if _signals is not None:
        _signals.raising = True


class _Signals:
    """The first signal raises KeyboardInterrupt; a second, later one ends the command at once.

    Before :func:`raise_from_now` the first signal ends the process at once, because nothing has
    begun and an exception in the middle of an import can get lost. A signal is ignored once the
    work of the command is done, or the command has ended.
    """

    def __init__(self) -> None:
        global _completion, _signals
        _completion, _signals = None, self
        self.raising = False
        self._seen: float | None = None
        self._ended = False
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return  # in a test: only the main thread can set handlers
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # None: a handler that is not Python's
                signal.signal(number, self._on_signal)
                self._before[number] = before
                self.raising |= before is not end_at_once  # a program called the command

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._ended:
            return
        if not self.raising:
            end_at_once(number, frame)
        now = time.monotonic()
        if self._seen is not None:
            if now - self._seen > SAME_SECONDS:
                done = _completion is not None and _completion.done
                left = b"the work was done" if done else b"a temporary file may be left"
                os.write(2, b"vhdx: ended at once; " + left + b"\n")
                os._exit(INTERRUPTED)
            return
        self._seen = now
        if _completion is not None and _completion.done:
            return
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(2, b"\nvhdx: stopping; interrupt again to end at once\n")
        raise KeyboardInterrupt

    def end(self) -> None:
        """Notes that the command has ended; later signals are ignored."""
        self._ended = True

    def leave(self) -> None:
        """Ignores further signals, so that the process ends with its exit code.

        If another program called the command, that program's handlers are restored instead.
        """
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if before is end_at_once else before)


def _what_is_left(error: BaseException) -> str | None:
    """The outcome of the interrupted operation; None if no operation was running."""
    if isinstance(error.__cause__, VhdxError):
        return str(error.__cause__)
    return DONE_NOTE if DONE_NOTE in getattr(error, "__notes__", ()) else None


def shown(text: str) -> str:
    """A name from an image or a file system, without what a terminal would obey."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Prints ``value`` as JSON; a report becomes an object with its fields as keys."""
    click.echo(json.dumps(value, indent=indent, default=_plain))


def _plain(value: object) -> Any:
    import msgspec

    return msgspec.to_builtins(value, enc_hook=str)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints columns as wide as their widest cells, even on a narrower terminal."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Draws a bar, on a terminal only; call what it yields with the bytes done and the total."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from vhdx.cli.progress import bar

    with bar(what) as update:
        yield update
