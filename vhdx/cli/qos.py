# SPDX-License-Identifier: MIT
"""Commands for Storage QoS: limits, minimums, policies and figures of served disks."""

from __future__ import annotations

import time
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from vhdx import control, lazy
from vhdx.cli.output import DONE, IN_USE, SECONDS, SIZE, json_option, print_json, print_table
from vhdx.errors import InUseError, InvalidArgumentError, NotFoundError, VhdxError
from vhdx.qos import DiskReport, PolicyKind, QosReport, Settings
from vhdx.qos.monitor import Status
from vhdx.units import MIB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from vhdx.control import api
    from vhdx.control.client import ServerInfo
    from vhdx.qos import DeviceReport, FlowReport
else:
    api = lazy.Module("vhdx.control.api")

__all__ = ["changes_of", "qos", "refuse_stuck", "settings_options", "top"]

_WINDOWS = ("1", "60", "300")
_OF_BYTES = ("bandwidth", "bytes")
_WIDE = 160  # columns, where the output is no terminal
_SAMPLED_SECONDS = 1.25  # a second, and the time between two samples
_SETTLING_SECONDS = 5.0
_COLORS = {Status.OK: "green", Status.INSUFFICIENT: "red", Status.UNKNOWN_POLICY: "yellow"}


class _Seen(NamedTuple):
    """A disk's report, and its time in seconds since the watch began."""

    moment: float
    disk: DiskReport


class _Number(click.ParamType):  # type: ignore[type-arg]
    """A number, or none to take a setting away."""

    def __init__(self, plain: click.ParamType, name: str) -> None:  # type: ignore[type-arg]
        self._plain, self.name = plain, name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"{self.name}|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return "none" if value == "none" else self._plain.convert(value, param, ctx)


_IOPS, _BYTES = _Number(click.INT, "N"), _Number(SIZE, "SIZE")
_OPTIONS = {
    "--min-iops": (
        "minimum_iops",
        _IOPS,
        "Minimum of normalised IOPS. An alert is raised when the disk gets less; with "
        "--keep-minimums the disk gets it first.",
    ),
    "--min-depth": (
        "minimum_depth",
        _IOPS,
        "With --keep-minimums: the minimum holds for a client that keeps at least N reads or writes "
        "in flight. [1]",
    ),
    "--weight": (
        "weight",
        _IOPS,
        "With --keep-minimums: share of the device, relative to others. [100]",
    ),
    "--max-iops": ("maximum_iops", _IOPS, "Maximum normalised IOPS."),
    "--max-read-iops": ("maximum_read_iops", _IOPS, "Maximum normalised read IOPS."),
    "--max-write-iops": ("maximum_write_iops", _IOPS, "Maximum normalised write IOPS."),
    "--max-bandwidth": ("maximum_bandwidth", _BYTES, "Maximum bytes a second (100M)."),
    "--max-read-bandwidth": ("maximum_read_bandwidth", _BYTES, "Maximum bytes read a second."),
    "--max-write-bandwidth": ("maximum_write_bandwidth", _BYTES, "Maximum bytes written a second."),
    "--burst-iops": ("burst_iops", _IOPS, "I/Os that may pass at once, on top of --max-iops. [0]"),
    "--burst-bytes": (
        "burst_bytes",
        _BYTES,
        "Bytes that may pass at once, on top of --max-bandwidth. [0]",
    ),
    "--credit-iops": ("credit_iops", _IOPS, "I/Os that an idle disk may save beyond its burst. [0]"),
    "--credit-rate-iops": (
        "credit_rate_iops",
        _IOPS,
        "Maximum saved I/Os used a second. [no bound]",
    ),
}


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for each setting; :func:`changes_of` reads them."""
    for option, (name, kind, text) in reversed(_OPTIONS.items()):
        command = click.option(option, name, type=kind, help=text)(command)
    return command


def changes_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among ``given``; for "none" a setting gets its default."""
    nothing = {each.name: each.default for each in fields(Settings)}
    return {
        name: nothing[name] if value == "none" else value
        for name, value in given.items()
        if value is not None
    }


def _server_of(path: str) -> tuple[ServerInfo, str]:
    found = control.owners(path, by_name=True)
    if not found:
        refuse_stuck(control.servers())
        raise NotFoundError("no server of yours serves it", path=path, hint="see vhdx ps")
    return found[0].server, found[0].export


def refuse_stuck(servers: list[ServerInfo]) -> None:
    """Refuses to go on if a server cannot be asked, because what is missing may be there.

    Raises:
        InUseError: naming the server's process.
    """
    problems = [f"process {x.pid} {x.problem}" for x in servers if x.problem is not None]
    if problems:
        raise InUseError("; ".join(problems))


def _chosen(pid: int | None) -> list[ServerInfo]:
    """The servers that are meant.

    Raises:
        NotFoundError: there is none.
        InUseError, ProtocolError: one of them cannot be asked.
    """
    found = [server for server in control.servers() if pid in {None, server.pid}]
    refuse_stuck(found)
    if not found:
        raise NotFoundError("no server of yours runs" if pid is None else f"{pid} is none of yours")
    for server in found:
        server.target("")  # refuses another version
    return found


def _askable() -> tuple[list[ServerInfo], int]:
    """The servers that can be asked, and the exit code; the others are named on standard error."""
    servers = control.servers()
    for server in servers:
        if server.refusal is not None:
            click.echo(f"vhdx: process {server.pid} {server.refusal}", err=True)
    found = [server for server in servers if server.refusal is None]
    return found, DONE if len(found) == len(servers) else IN_USE


_pid = click.option("--pid", type=int, help="Only the server with this process id.")


@click.group()
def qos() -> None:
    """Limit served disks, give them minimums, and see what they get.

    A read or write counts as one I/O for each 8 KiB begun, as in Windows.
    """


@qos.command("set")
@click.argument("path", type=click.Path())
@settings_options
@click.option("--policy", help='Name or id of a policy that applies as well; "" for none.')
def set_(path: str, policy: str | None, **given: Any) -> None:
    """Change the limits, minimum or policy of a served disk, at once.

    Example: vhdx qos set disk.vhdx --max-iops 500 --min-iops 100
    """
    changes = changes_of(given)
    if not changes and policy is None:
        raise click.UsageError("say what to change; --max-iops none removes a limit")
    server, name = _server_of(path)
    _warn(server.set_disk(name, changes, policy).warning)


def _warn(warning: str | None) -> None:
    if warning is not None:
        click.echo(f"vhdx: {warning}", err=True)


@qos.command()
@click.argument("path", type=click.Path(), required=False)
@json_option
def show(path: str | None, as_json: bool) -> int:
    """Show limits, minimums, policies and current figures of served disks.

    Example: vhdx qos show disk.vhdx --json
    """
    if path is not None:
        server, name = _server_of(path)
        server.subscribe()
        found, code = [_only(server.qos(), name)], DONE
    else:
        servers, code = _askable()
        for server in servers:
            server.subscribe()
        found = [server.qos() for server in servers]
    if as_json:
        print_json(found if path is None else found[0])
        return code
    rows = [_row(disk, each) for each in found for disk in each.disks]
    if not rows:
        click.echo("nothing is served" if code == DONE else "nothing else is served")
        return code
    print_table(("disk", "status", "min", "max", "bandwidth", "policy", "iops", "mean ms"), rows)
    for each in found:
        for disk in each.disks:
            if more := _in_words(disk.effective, _IN_COLUMNS):
                click.echo(f"{disk.disk}: {more}")
        named = {disk.policy_id for disk in each.disks}
        for policy in each.policies:
            if policy.kind is PolicyKind.AGGREGATED and policy.policy_id in named:
                wanted = _in_words(policy.settings) or "nothing"
                click.echo(f"policy {policy.name}, its disks together: {wanted}")
        for line in _scheduling(each.scheduling):
            click.echo(line)
    return code


def _only(found: QosReport, name: str) -> QosReport:
    return replace(
        found,
        disks=[disk for disk in found.disks if disk.disk == name],
        flows=[flow for flow in found.flows if flow.disk == name],
    )


def _scheduling(device: DeviceReport) -> list[str]:
    """One line about the device that a server's disks share; no line without a scheduler."""
    if not device.keeps_minimums:
        return []
    capacity, kind = device.capacity_iops, device.model
    does = "has no known capacity yet" if capacity is None else f"does {capacity:.0f}"
    seen = ", as measured lately" if device.capacity_measured else ""
    worst = " at worst" if kind is not None and capacity is not None else ""
    called = "device" if kind is None else f"modelled {kind}"
    state = "are kept" if device.admitted else "cannot all be kept, so lower one"
    return [
        f"minimums {state}: {device.reserved_iops} normalised IOPS are reserved, the {called} "
        f"{does}{worst}{seen} ({device.depth} requests at a time)"
    ]


def _or_none(value: int | None) -> str:
    return "-" if value is None else str(value)


_TEXTS = {
    "minimum_iops": "at least {} IOPS",
    "maximum_iops": "at most {} IOPS",
    "maximum_bandwidth": "at most {}/s",
    "maximum_read_iops": "reads at most {} IOPS",
    "maximum_write_iops": "writes at most {} IOPS",
    "maximum_read_bandwidth": "reads at most {}/s",
    "maximum_write_bandwidth": "writes at most {}/s",
    "burst_iops": "bursts of {} I/Os",
    "burst_bytes": "bursts of {}",
    "credit_iops": "a credit of {} I/Os",
    "credit_rate_iops": "spent at {} IOPS at most",
    "minimum_depth": "guaranteed with {} requests in flight",
    "weight": "weight {}",
}
_IN_COLUMNS = 3


def _in_words(settings: Settings, skipped: int = 0) -> str:
    """The settings in words, without the first ``skipped`` kinds; empty if none is set."""
    values = {name: getattr(settings, name) for name in list(_TEXTS)[skipped:]}
    return ", ".join(
        _TEXTS[name].format(format_size(value) if name.endswith(_OF_BYTES) else value)
        for name, value in values.items()
        if value
    )


def _row(disk: DiskReport, found: QosReport) -> tuple[str, ...]:
    wanted, now = disk.effective, disk.windows["1"]
    bandwidth = wanted.maximum_bandwidth
    names = {policy.policy_id: policy.name for policy in found.policies}
    is_sampled = found.sampled_seconds >= _SAMPLED_SECONDS
    policy = "-" if disk.policy_id is None else names.get(disk.policy_id, str(disk.policy_id))
    return (
        disk.disk,
        disk.status.value,
        _or_none(wanted.minimum_iops),
        _or_none(wanted.maximum_iops),
        "-" if bandwidth is None else f"{format_size(bandwidth)}/s",
        policy,
        f"{now.normalized_iops:.0f}" if is_sampled else "-",
        f"{now.latency:.2f}" if is_sampled else "-",
    )


# ---- policies ----


@qos.group()
def policy() -> None:
    """Named settings for several disks: for each disk (dedicated), or shared (aggregated)."""


@policy.command("set")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice([k.value for k in PolicyKind]),
    help="Kind of a new policy. [default: dedicated]",
)
@click.option("--id", "policy_id", help="Id of a new policy, to restore a removed one.")
@settings_options
@_pid
def policy_set(
    name: str, kind: str | None, policy_id: str | None, pid: int | None, **given: Any
) -> None:
    """Make or change a policy, and apply it to its disks at once. Prints the policy's id.

    Example: vhdx qos policy set gold --kind aggregated --max-iops 5000
    """
    made_id = policy_id
    failures: list[VhdxError] = []
    for server in (servers := _chosen(pid)):
        try:
            made = server.set_policy(api.ChangePolicy(name, changes_of(given), kind, made_id))
        except VhdxError as error:  # the other servers are still asked
            if len(servers) > 1:
                click.echo(f"vhdx: process {server.pid} refuses the policy", err=True)
            failures.append(error)
            continue
        made_id = made.policy_id  # the same in every server
        _warn(made.warning)
    if len(failures) < len(servers):
        click.echo(made_id)
    if failures:
        raise failures[0]


@policy.command("list")
@_pid
@json_option
def policy_list(pid: int | None, as_json: bool) -> None:
    """List policies and the disks that have them.

    Example: vhdx qos policy list
    """
    found = [server.qos() for server in _chosen(pid)]
    if as_json:
        print_json([{"pid": each.pid, "policies": each.policies} for each in found])
        return
    rows = [
        (
            each.name,
            each.kind.value,
            _or_none(each.settings.minimum_iops),
            _or_none(each.settings.maximum_iops),
            ", ".join(d.disk for d in one.disks if d.policy_id == each.policy_id) or "-",
            str(each.policy_id),
        )
        for one in found
        for each in one.policies
    ]
    if not rows:
        click.echo("there are no policies")
        return
    print_table(("name", "kind", "min", "max", "disks", "id"), rows)


@policy.command("remove")
@click.argument("name")
@_pid
def policy_remove(name: str, pid: int | None) -> None:
    """Remove a policy. Its disks keep only their own limits, until it is restored (set --id).

    Example: vhdx qos policy remove gold
    """
    failures = []
    for server in (servers := _chosen(pid)):
        try:
            for disk in server.remove_policy(name):
                click.echo(f"vhdx: {disk} runs on without the policy", err=True)
        except NotFoundError as error:
            failures.append(error)
    if len(failures) == len(servers):
        raise failures[0]


# ---- watching ----


@qos.command()
@click.option("--seconds", type=SECONDS, default=60.0, show_default=True, help="Duration.")
@click.option("--plot", type=click.Path(dir_okay=False), help="File for a plot of it (PNG, SVG).")
@json_option
def watch(seconds: float, plot: str | None, as_json: bool) -> None:
    """Print the figures of every served disk, once a second.

    Example: vhdx qos watch --seconds 120 --plot run.png
    """
    if plot is not None:
        _draw([], plot)  # fails now if the file cannot be written
    seen: list[_Seen] = []
    try:
        _watch(seconds, seen, as_json=as_json)
    finally:
        if plot is not None:
            _draw(seen, plot)


def _watch(seconds: float, seen: list[_Seen], *, as_json: bool) -> None:
    if not _askable()[0]:
        _chosen(None)
    began = time.monotonic()
    due = began
    while time.monotonic() - began < seconds:
        due += 1
        time.sleep(max(0.0, due - time.monotonic()))
        found = _reports()
        if not found:
            _chosen(None)
        for disk in (d for each in found for d in each.disks):
            now, moment = disk.windows["1"], time.monotonic() - began
            seen.append(_Seen(moment, disk))
            if as_json:
                facts = {"time": time.time(), "moment": round(moment, 3), "disk": disk.disk}
                print_json(facts | {"status": disk.status} | asdict(now), indent=None)
            else:
                click.echo(
                    f"{moment:6.1f} s  {disk.disk:<16} {now.normalized_iops:9.1f} IOPS  "
                    f"{format_size(int(now.bandwidth))}/s  {now.latency:.2f} ms  {disk.status}"
                )


def _reports() -> list[QosReport]:
    """The reports of all servers that answer; makes these servers sample figures."""
    found = []
    for server in control.servers():
        if server.refusal is None:
            try:
                server.subscribe()
                found.append(server.qos())
            except VhdxError:
                continue  # the server has just ended
    return found


def _plotting() -> Any:
    try:
        import matplotlib as plotting
    except ImportError as error:
        raise InvalidArgumentError(
            "matplotlib is not installed", hint="pip install 'vhdx[plot]'"
        ) from error
    plotting.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(seen: list[_Seen], path: str | Path) -> None:
    """Achieved IOPS of each disk over time, its limits dashed, and latencies below."""
    pyplot = _plotting()
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(10, 6))
    for name in sorted({each.disk.disk for each in seen}):
        mine = [each for each in seen if each.disk.disk == name]
        moments = [each.moment for each in mine]
        figures = [each.disk.windows["1"] for each in mine]
        line = upper.plot(moments, [now.normalized_iops for now in figures], label=name)[0]
        lower.plot(moments, [now.latency_p99 for now in figures])
        for which, style in (("maximum_iops", "--"), ("minimum_iops", ":")):
            values = [getattr(each.disk.effective, which) for each in mine]
            if any(value is not None for value in values):
                plain = [float("nan") if v is None else v for v in values]
                upper.plot(moments, plain, style, color=line.get_color(), linewidth=1)
    upper.set_ylabel("normalised IOPS")
    upper.set_ylim(bottom=0)
    upper.set_title("dashed: maximum, dotted: minimum", fontsize=9)
    lower.set_ylabel("99 % latency, ms")
    lower.set_xlabel("seconds")
    if seen:
        upper.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"the picture cannot be written: {error}", path=path) from error
    finally:
        pyplot.close(figure)


@click.command()
@click.option(
    "--window",
    type=click.Choice(_WINDOWS),
    default="1",
    show_default=True,
    help="Seconds over which figures are averaged.",
)
@click.option("--once", is_flag=True, help="Print one screen and end.")
@json_option
def top(window: str, once: bool, as_json: bool) -> int:
    """Show what served disks and their clients get, live, until Ctrl-C.

    Example: vhdx top
    """
    found, code = _askable()
    if as_json:
        print_json(_settled())
        return code
    if not found:
        _chosen(None)
    console = Console()
    if once or not console.is_terminal:
        if not console.is_terminal:
            console.width = max(console.width, _WIDE)
        console.print(_screen(_settled(), window))
        return code
    try:
        with Live(_screen(_reports(), window), console=console, screen=True) as live:
            while True:
                time.sleep(1)
                live.update(_screen(_reports(), window))
    except KeyboardInterrupt:
        return DONE


def _settled() -> list[QosReport]:
    """Reports with figures over a full second; a server that was not sampling needs as long."""
    deadline = time.monotonic() + _SETTLING_SECONDS
    while True:
        found = _reports()
        wait = max((_SAMPLED_SECONDS - each.sampled_seconds for each in found), default=0.0)
        if wait <= 0 or time.monotonic() > deadline:
            return found
        time.sleep(wait + 0.01)


def _screen(found: list[QosReport], window: str) -> Group:
    disks, flows = _table("disks", "status", "min", "max"), _table("flows", "initiator")
    for each in found:
        for disk in each.disks:
            color = _COLORS[disk.status]
            wanted = (disk.effective.minimum_iops, disk.effective.maximum_iops)
            status = f"[{color}]{disk.status}[/]"
            disks.add_row(*_cells(disk, status, window, *map(_or_none, wanted)))
        for flow in each.flows:
            flows.add_row(*_cells(flow, escape(flow.initiator), window))
    lines = [line for one in found for line in _scheduling(one.scheduling)]
    return Group(disks, flows, *lines)


def _table(title: str, second: str, *more: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    table.add_column("disk", no_wrap=True, ratio=1)  # names give way to figures
    table.add_column(second, no_wrap=True, ratio=1)
    for name in ("IOPS", "offered", "MiB/s", "mean ms", "p99 ms", "queue ms", *more, "waiting"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    return table


def _cells(each: DiskReport | FlowReport, second: str, window: str, *more: str) -> list[str]:
    now = each.windows[window]
    return [
        escape(each.disk),
        second,
        f"{now.normalized_iops:.0f}",
        f"{now.offered_iops:.0f}",
        f"{now.bandwidth / MIB:.1f}",
        f"{now.latency:.2f}",
        f"{now.latency_p99:.2f}",
        f"{now.queue_time:.2f}",
        *more,
        str(each.waiting),
    ]
