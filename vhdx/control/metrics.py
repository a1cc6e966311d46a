# SPDX-License-Identifier: MIT
"""Metrics for Prometheus: counters of connections, and the QoS settings and figures of disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from vhdx.qos.monitor import Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.core import Metric

    from vhdx.front import nbd

__all__ = ["METRICS_TYPE", "exposition"]

METRICS_TYPE = CONTENT_TYPE_LATEST

_WINDOW = "60"
_COMMANDS = ("reads", "writes", "flushes", "trims", "write_zeroes", "block_statuses")
_FIGURES = {
    "normalized_iops": ("normalised I/Os a second", 1.0),
    "bandwidth": ("bytes a second", 1.0),
    "latency": ("mean latency, seconds", 1e-3),
    "latency_p99": ("latency of 99 of 100 requests, seconds", 1e-3),
    "queue_time": ("mean time that limits hold a request, seconds", 1e-3),
}


class _Server(Collector):
    """The metrics of one server, read at each scrape."""

    def __init__(self, server: nbd.Server) -> None:
        self._server = server

    def collect(self) -> Iterable[Metric]:
        yield from self._connections()
        yield from self._disks()

    def _connections(self) -> Iterable[Metric]:
        count = GaugeMetricFamily("vhdx_connections", "Clients of a disk.", labels=["disk"])
        requests = CounterMetricFamily(
            "vhdx_requests", "Requests of a disk's clients.", labels=["disk", "kind"]
        )
        moved = CounterMetricFamily(
            "vhdx_bytes", "Payload of a disk's clients.", labels=["disk", "way"]
        )
        found = self._server.counters()
        for disk, total in self._server.totals().items():
            count.add_metric([disk], sum(name == disk for name, _ in found))
            for kind in _COMMANDS:
                requests.add_metric([disk, kind], getattr(total, kind))
            moved.add_metric([disk, "read"], total.bytes_read)
            moved.add_metric([disk, "written"], total.bytes_written)
        yield from (count, requests, moved)

    def _disks(self) -> Iterable[Metric]:
        self._server.qos.subscribe()  # so that the next scrape has figures of the last minute
        found = self._server.qos.report()
        device = found.scheduling
        for which, what in (
            ("capacity_iops", "Capacity of the shared device, normalised I/Os a second."),
            ("reserved_iops", "Sum of minimums, normalised I/Os a second."),
            ("waiting", "Requests that wait for a slot of the shared device."),
        ):
            value = getattr(device, which)
            if device.keeps_minimums and value is not None:
                yield GaugeMetricFamily(f"vhdx_device_{which}", what, value=value)
        for name, (what, factor) in _FIGURES.items():
            gauge = GaugeMetricFamily(
                f"vhdx_disk_{name}", f"Over the last minute: {what}.", labels=["disk"]
            )
            for disk in found.disks:
                gauge.add_metric([disk.disk], getattr(disk.windows[_WINDOW], name) * factor)
            yield gauge
        for which in ("minimum_iops", "maximum_iops", "maximum_bandwidth"):
            gauge = GaugeMetricFamily(f"vhdx_disk_{which}", "What is wanted.", labels=["disk"])
            for disk in found.disks:
                wanted = getattr(disk.effective, which)
                if wanted is not None:
                    gauge.add_metric([disk.disk], wanted)
            yield gauge
        status = GaugeMetricFamily(
            "vhdx_disk_status", "1 for the status that a disk has.", labels=["disk", "status"]
        )
        for disk in found.disks:
            for each in Status:
                status.add_metric([disk.disk, each.value], float(disk.status is each))
        yield status


def exposition(server: nbd.Server) -> bytes:
    """The metrics of ``server`` in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Server(server))
    return generate_latest(registry)
