# SPDX-License-Identifier: MIT
"""Commands that serve images over NBD, and that list and stop servers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vhdx import control, mounting
from vhdx.cli import INTERRUPTED, SIGNALS
from vhdx.cli.output import (
    DONE,
    SAME_SECONDS,
    SECONDS,
    SIZE,
    json_option,
    print_json,
    print_table,
)
from vhdx.cli.qos import changes_of, refuse_stuck, settings_options
from vhdx.errors import InUseError, InvalidArgumentError, NotFoundError, VhdxError
from vhdx.front import nbd
from vhdx.host import Limits
from vhdx.image.formats import FORMATS
from vhdx.plane import DEEPEST, ModelKind
from vhdx.qos import LARGEST_IOPS, NORMALISED_UNIT, Scheduling
from vhdx.units import format_size

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["ps", "serve", "stop"]


def _exports(paths: tuple[str, ...]) -> dict[str, str | os.PathLike[str]]:
    exports: dict[str, str | os.PathLike[str]] = {}
    for each in paths:
        name, equals, path = each.partition("=")
        if not equals or Path(each).exists():
            name, path = Path(each).stem, each
        if name in exports:
            raise InvalidArgumentError(
                f"two exports would be called {name!r}", hint="name them: NAME=PATH"
            )
        exports[name] = path
    return exports


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="[NAME=]PATH...")
@click.option(
    "--listen",
    metavar="URI",
    help="nbd+unix:///?socket=PATH or nbd://HOST[:PORT]. [default: the socket that systemd or "
    "libnbd hands over, or a private unix socket]",
)
@click.option("--read-only", "-r", is_flag=True, help="Refuse changes.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Format. [default: detected]")
@click.option(
    "--run",
    "command",
    metavar="CMD",
    help="Run a shell command with $uri set, then exit with its exit code.",
)
@click.option(
    "--drain-seconds",
    type=SECONDS,
    default=10.0,
    show_default=True,
    help="At the end, time for clients to read their replies.",
)
@click.option("--max-connections", type=click.IntRange(1), default=100, show_default=True)
@click.option("--handshake-seconds", type=SECONDS, default=10.0, show_default=True)
@settings_options
@click.option(
    "--qos",
    "qos_file",
    type=click.Path(dir_okay=False),
    help="File that keeps settings and policies for the next start.",
)
@click.option(
    "--qos-unit",
    type=SIZE,
    default=NORMALISED_UNIT,
    show_default=True,
    help="Size of one normalised I/O.",
)
@click.option(
    "--qos-hook", metavar="CMD", help="Command to run for each alert; $VHDX_DISK names the disk."
)
@click.option(
    "--keep-minimums", is_flag=True, help="Schedule the disks so that each gets its minimum."
)
@click.option(
    "--depth",
    type=click.IntRange(1, DEEPEST),
    help="With --keep-minimums: most requests in flight at the device. [8]",
)
@click.option(
    "--capacity-iops",
    type=click.IntRange(1, LARGEST_IOPS),
    help="Normalised I/Os a second that the device can do. [measured, or the model's]",
)
@click.option(
    "--model",
    type=click.Choice([kind.name.lower() for kind in ModelKind]),
    help="Behave as if all disks were on one such device.",
)
def serve(
    paths: tuple[str, ...],
    listen: str | None,
    read_only: bool,
    format_: str | None,
    command: str | None,
    drain_seconds: float,
    max_connections: int,
    handshake_seconds: float,
    qos_file: str | None,
    qos_unit: int,
    qos_hook: str | None,
    keep_minimums: bool,
    depth: int | None,
    capacity_iops: int | None,
    model: str | None,
    **given: Any,
) -> int:
    """Serve images over NBD until SIGTERM, SIGHUP, Ctrl-C or vhdx stop.

    A second signal, more than half a second later, ends the server at once.
    The first line on standard output is the URI of the first export, once the server accepts
    connections. With --run, or if systemd or libnbd passed a socket, nothing is printed.
    Limits apply to each disk; vhdx qos changes them while the server runs.

    Example: vhdx serve disk.vhdx --listen nbd+unix:///?socket=/run/disk.sock --max-iops 500
    """
    only_then = (depth, capacity_iops, given["weight"], given["minimum_depth"])
    if not keep_minimums and any(each is not None for each in only_then):
        raise click.UsageError(
            "--depth, --capacity-iops, --weight and --min-depth go with --keep-minimums"
        )
    scheduling = Scheduling(
        keep_minimums=keep_minimums,
        depth=8 if depth is None else depth,
        capacity_iops=capacity_iops,
        model=None if model is None else ModelKind[model.upper()],
    )
    inherited = nbd.inherited_socket()
    if inherited is not None and listen is not None:
        raise click.UsageError(
            "a socket was passed to the server (LISTEN_FDS), so --listen cannot be used"
        )
    exports = _exports(paths)
    events = _Events()
    limits = Limits(connections=max_connections, handshake_seconds=handshake_seconds)
    server = control.serve(
        exports,
        listen=listen if inherited is None else inherited,
        read_only=read_only,
        limits=limits,
        format=format_,
        qos=dict.fromkeys(exports, changes_of(given)),
        qos_file=qos_file,
        qos_unit=qos_unit,
        qos_hook=qos_hook,
        scheduling=scheduling,
        on_stop=events.stop,
    )
    code = DONE
    try:
        if command is None:
            # A program that passed a socket knows its address, and may use standard output itself.
            for uri in server.uris.values() if inherited is None else ():
                click.echo(uri)
        else:
            code = _run(command, server, events)
        if command is None and events.wait() == signal.SIGINT:
            code = INTERRUPTED
    finally:
        server.close(drain_seconds)
    return code


@click.command()
@json_option
def ps(as_json: bool) -> None:
    """List your servers and the disks they serve.

    Example: vhdx ps --json
    """
    found = control.servers()
    used = mounting.servers_in_use()
    if as_json:
        print_json(
            [
                {
                    "pid": server.pid,
                    "started": server.started,
                    "exports": server.exports,
                    "connections": server.connections,
                    "answers": server.answers,
                    "problem": server.refusal,
                    "mounted": used.get(server.pid, []),
                }
                for server in found
            ]
        )
        return
    if not found:
        click.echo("nothing is served")
        return
    print_table(
        ("pid", "export", "size", "mode", "clients", "path", "uri"),
        [
            (
                str(server.pid),
                export.name,
                format_size(export.virtual_size),
                "r" if export.read_only else "r+",
                str(export.connections),
                export.path,
                export.uri,
            )
            for server in found
            for export in server.exports
        ],
    )
    for server in found:
        if server.refusal is not None:
            click.echo(f"{server.pid} {server.refusal}")
        if server.pid in used:
            click.echo(f"{server.pid} serves {', '.join(used[server.pid])} (vhdx mounts)")


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(), metavar="[PATH...]")
@click.option("--pid", "pids", type=int, multiple=True, help="Stop the server of this process.")
@click.option("--all", "everything", is_flag=True, help="Stop all your servers.")
def stop(paths: tuple[str, ...], pids: tuple[int, ...], everything: bool) -> None:
    """Stop the servers of these images, and wait until the images are closed.

    Example: vhdx stop disk.vhdx
    """
    if everything == bool(paths or pids):
        raise click.UsageError("say which: PATH, --pid or --all")
    found = control.servers()
    chosen = found if everything else [server for server in found if server.pid in pids]
    for pid in set(pids) - {server.pid for server in found}:
        raise NotFoundError(f"process {pid} is no server of yours")
    for path in paths:
        holders = control.owners(path, by_name=True)
        if not holders:
            refuse_stuck(found)
            raise NotFoundError("no server of yours serves it", path=path, hint="see vhdx ps")
        chosen += [owner.server for owner in holders]
    failures: list[VhdxError] = []
    used = mounting.servers_in_use()
    for server in {server.socket: server for server in chosen}.values():
        try:
            if server.pid in used:
                raise _mounted(server.pid, used[server.pid])
            server.stop()
        except VhdxError as error:  # the other servers are stopped nevertheless
            failures.append(error)
    for failure in failures[1:]:
        click.echo(f"vhdx: {failure}", err=True)
    if failures:
        raise failures[0]


def _mounted(pid: int, where: list[str]) -> InUseError:
    return InUseError(
        f"process {pid} serves what is mounted or attached: {', '.join(where)}",
        hint="vhdx umount, or vhdx detach, ends it",
    )


class _Events:
    """Lets the main thread wait for the first signal, or for a call of :meth:`note`.

    The kernel may deliver a signal to any thread. Python then writes to the wake-up descriptor.
    This ends the read in :meth:`wait`, so the main thread runs the handler.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._noted = threading.Event()
        self._signal: int | None = None
        self._seen = 0.0
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is not None:
            if now - self._seen > SAME_SECONDS:
                os.write(2, b"vhdx: ended at once; what was flushed is kept\n")
                os._exit(INTERRUPTED)
            return
        self._signal, self._seen = number, now
        if number == signal.SIGINT and sys.stderr is not None and sys.stderr.isatty():
            os.write(2, b"\nvhdx: finishing requests, then stopping; Ctrl-C again ends at once\n")

    def stop(self) -> None:
        """Ends the wait as SIGTERM does. A second call, unlike a second signal, has no effect."""
        if self._signal is None:
            self._signal = signal.SIGTERM
        self.note()

    def note(self) -> None:
        """Ends the wait without a signal."""
        self._noted.set()
        self._writer.send(b"\0")

    def wait(self) -> int | None:
        """The first signal, or None after a note."""
        while self._signal is None and not self._noted.is_set():
            self._reader.recv(16)
        return self._signal


def _run(command: str, server: nbd.Server, events: _Events) -> int:
    """Runs ``command`` while the server runs, and passes the first signal on to the command."""
    environment = os.environ | {"uri": server.uri, "unixsocket": server.socket_path or ""}
    child = subprocess.Popen(command, shell=True, env=environment)  # noqa: S602 - it is the user's

    def wait() -> None:
        child.wait()
        events.note()

    threading.Thread(target=wait, name="serve-run", daemon=True).start()
    number = events.wait()
    if number is not None:
        child.send_signal(number)
    code = child.wait()
    return 128 - code if code < 0 else code
