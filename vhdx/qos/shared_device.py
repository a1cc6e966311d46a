# SPDX-License-Identifier: MIT
"""The device that all disks of a server share: its scheduler, its model, and its capacity.

With scheduling, minimums are kept and not only watched. Each disk and each aggregated policy has a
share of the device, and dmclock serves its minimum first. This works only while the sum of minimums
is below the capacity of the device; a tenth of the capacity is left for unreserved work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vhdx import plane
from vhdx.errors import InvalidArgumentError
from vhdx.qos.admission import USABLE, Load, Verdict, best_depth, most_below, most_together
from vhdx.qos.report import DeviceReport

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from vhdx.qos.policy import Policy, Settings
    from vhdx.qos.reservations import Reservation

__all__ = ["Admission", "Attachment", "Scheduling", "SharedDevice"]

DEFAULT_WEIGHT = 100
_OVERHEAD = 20e-6  # seconds from the end of one piece to the start of the next
_BACKGROUND_IOPS = 16
_LEAST_CONTENDED_NS = 1_000_000_000
_REMEMBERED = 60  # samples of contended time


@dataclass(frozen=True)
class Scheduling:
    """How the disks of a server share their device.

    Attributes:
        keep_minimums: dmclock chooses which request is served next. Otherwise minimums are only
            watched, as in Windows Server 2012 R2.
        depth: requests in flight on the device at a time, 1 to 256. A larger depth lets a hard disk
            choose among more requests, but each request waits for more others.
        capacity_iops: the capacity of the device in normalised IOPS. When None, the capacity is
            that of the model, or is measured.
        model: simulate that all disks share one device of this kind.
    """

    keep_minimums: bool = False
    depth: int = 8
    capacity_iops: int | None = None
    model: plane.ModelKind | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= plane.DEEPEST:
            raise InvalidArgumentError(
                f"a depth of {self.depth}", hint=f"choose 1 to {plane.DEEPEST}"
            )
        if self.capacity_iops is not None and self.capacity_iops < 1:
            raise InvalidArgumentError(
                f"a capacity of {self.capacity_iops} IOPS", hint="choose 1 or more"
            )


@dataclass(frozen=True)
class Admission:
    """Whether the device can keep a set of minimums.

    Attributes:
        capacity_iops: the capacity of the device, normalised; None while it is not known.
        measured: whether the capacity was measured, not given or modelled.
        reserved_iops: the sum of minimums.
        admitted: whether the minimums can be kept; True while the capacity is not known.
        verdict: the result of the worst-case check; None without a model.
    """

    capacity_iops: float | None
    measured: bool
    reserved_iops: int
    admitted: bool
    verdict: Verdict | None = None


class Attachment(NamedTuple):
    """A disk on the shared device.

    Attributes:
        device: the device that its flows send requests to.
        lower: the disk's own device.
        share: the disk's own share; None without a scheduler.
        scheduled: the layer of ``device`` where requests wait for slots; None without a scheduler.
        base: the offset in bytes at which the disk begins on the modelled device.
    """

    device: plane.Device
    lower: plane.Device
    share: plane.Share | None
    scheduled: plane.Scheduled | None
    base: int

    def waiting(self) -> int:
        """The number of its requests that wait for a slot."""
        return 0 if self.scheduled is None else self.scheduled.waiting()


class SharedDevice:
    """The scheduler, the model and the shares of one server.

    Methods that change it are called under the lock of the registry. Methods that only read need no
    lock, because the list of samples is replaced and never changed in place; nor do :meth:`pace` and
    :meth:`close`.
    """

    def __init__(
        self,
        scheduling: Scheduling,
        pool: plane.Pool,
        unit: int,
        sizes: Iterable[int],
        clock: plane.Clock | None,
    ) -> None:
        self._pool, self._clock = pool, clock
        self._model: plane.Model | None = None
        self._scheduler: plane.Scheduler | None = None
        self._background: plane.Share | None = None
        self._base = 0
        self._policy_shares: dict[UUID, plane.Share] = {}
        self._last = (0, 0)
        self._contended: list[tuple[int, int]] = []  # ns, units
        self._capacity: float | None = scheduling.capacity_iops
        self._most_depth = scheduling.depth
        self._bounds: Load | None = None
        if scheduling.model is not None:
            self._model = plane.Model(scheduling.model, max(1 << 20, sum(sizes)))
        if scheduling.keep_minimums:
            self._scheduler = plane.Scheduler(
                pool, unit, scheduling.depth, model=self._model, clock=clock
            )
            self._background = plane.Share(self._scheduler)
            if self._model is not None and self._capacity is None:
                model, piece = self._model, max(self._scheduler.piece, plane.PIECE)
                self._bounds = Load(
                    lambda others: model.worst(unit, others) + _OVERHEAD,
                    lambda others: model.worst(piece, others) + _OVERHEAD,
                    piece // unit / _BACKGROUND_IOPS,
                    scheduling.model is plane.ModelKind.HDD,
                )
            does: float | None = scheduling.capacity_iops
            if does is None and self._model is not None:
                does = self._model.capacity_iops(scheduling.depth, unit)
            most = 0 if does is None else max(_BACKGROUND_IOPS, round(does / 2))
            self._background.set(reservation=_BACKGROUND_IOPS, limit=most, weight=10)

    def attach(self, lower: plane.Device, alias: Attachment | None = None) -> Attachment:
        """Adds a disk to the shared device; ``alias`` is another export of the same image."""
        if alias is not None and alias.lower is lower:
            return alias
        share, base = (None, self._base) if alias is None else (alias.share, alias.base)
        if alias is None:
            share = None if self._scheduler is None else plane.Share(self._scheduler)
            self._base += lower.size
        device = lower
        if self._model is not None:
            device = plane.Delay(device, self._model, self._pool, base=base, clock=self._clock)
        scheduled = None if share is None else plane.Scheduled(device, share)
        return Attachment(scheduled or device, lower, share, scheduled, base)

    def assign(self, attached: Attachment, settings: Settings, policy: Policy | None) -> None:
        """Applies settings to a disk's share; with ``policy``, the disk waits in its share."""
        if attached.share is None or attached.scheduled is None:
            return
        _set_share(attached.share, settings)
        share = attached.share
        if policy is not None and self._scheduler is not None:
            found = self._policy_shares.get(policy.policy_id)
            if found is None:  # never removed: requests may wait in it
                found = self._policy_shares[policy.policy_id] = plane.Share(self._scheduler)
            _set_share(found, policy.settings)
            share = found
        attached.scheduled.set_share(share)

    def pace(self, size: int) -> None:
        """Blocks until background work may start ``size`` bytes; returns at once if unscheduled.

        Background work has a small reservation, so that it makes progress, and is limited to half
        of a given or modelled capacity. Only its start is paced: the work itself holds no slot.
        """
        if self._scheduler is None or self._background is None:
            return
        for done in range(0, size, self._scheduler.piece):
            with self._background.slot(min(self._scheduler.piece, size - done)):
                pass

    def close(self) -> None:
        """Cancels all waits for slots."""
        if self._scheduler is not None:
            self._scheduler.stop()

    # ---- capacity and admission ----

    def lateness(self, share: plane.Share | None) -> float:
        """Seconds by which a share's deadline is missed; infinite without a scheduler."""
        return float("inf") if share is None else share.read().late_ns / 1e9

    def policy_share(self, policy_id: UUID) -> plane.Share | None:
        """The share of an aggregated policy, if it has one."""
        return self._policy_shares.get(policy_id)

    def sample(self) -> None:
        """Records the units served while requests waited because every slot was taken."""
        if self._scheduler is None:
            return
        facts = self._scheduler.read()
        ns = facts.contended_ns - self._last[0]
        if ns >= _LEAST_CONTENDED_NS:
            self._contended = [
                *self._contended[1 - _REMEMBERED :],
                (ns, facts.contended_units - self._last[1]),
            ]
            self._last = facts.contended_ns, facts.contended_units

    def adapt(self, reservations: Sequence[Reservation]) -> None:
        """Limits the pieces in flight so that these minimums are kept."""
        if self._bounds is not None and self._scheduler is not None:
            most = None
            if reservations:
                most = most_below(reservations, self._most_depth, self._bounds)
            self._scheduler.set_most_below(most)

    def admission(self, reservations: Sequence[Reservation]) -> Admission:
        """Whether these minimums can be kept."""
        reserved = sum(each.iops for each in reservations)
        if self._bounds is not None:
            verdict = best_depth(reservations, self._most_depth, self._bounds)
            return Admission(verdict.capacity, False, reserved, verdict.kept, verdict)
        capacity, measured = self._capacity, False
        if capacity is None and self._contended:
            capacity, measured = min(u * 1e9 / n for n, u in self._contended), True
        return Admission(
            capacity, measured, reserved, capacity is None or reserved <= USABLE * capacity
        )

    def warning(self, reservations: Sequence[Reservation]) -> str | None:
        """A warning if these minimums cannot be kept, else None."""
        found = self.admission(reservations)
        reserved = found.reserved_iops
        if self._scheduler is None or found.admitted:
            return None
        if found.verdict is not None and self._bounds is not None:
            fewest = min(each.depth for each in reservations)
            together = most_together(reservations, self._most_depth, self._bounds)
            return (
                f"minimums of {reserved} normalised IOPS in all cannot be kept; in these proportions "
                f"{together} can (with {fewest} under way the device does {found.capacity_iops:.0f} "
                "in the worst case, where each disk waits for the largest requests of the others)"
            )
        does = "has done" if found.measured else "does"
        return (
            f"minimums of {reserved} normalised IOPS in all cannot be kept: the device {does} "
            f"{found.capacity_iops:.0f}, of which {USABLE:.0%} can be reserved"
        )

    def admit(self, before: Sequence[Reservation], after: Sequence[Reservation]) -> str | None:
        """Refuses a change to minimums that a given or modelled capacity cannot keep.

        Returns:
            A warning if the minimums cannot be kept but the change is allowed, else None.

        Raises:
            InvalidArgumentError: the change is refused; the message has the figures.
        """
        warning = self.warning(after)
        worse = sum(each.iops for each in after) > sum(each.iops for each in before) or (
            self.admission(before).admitted
        )
        if warning is not None and worse and not self.admission(after).measured:
            raise InvalidArgumentError(warning, hint="lower a minimum")
        return warning

    def report(self, reservations: Sequence[Reservation]) -> DeviceReport:
        """Reports the device, its capacity, and the requests that wait for it."""
        found = self.admission(reservations)
        facts = None if self._scheduler is None else self._scheduler.read()
        return DeviceReport(
            keeps_minimums=self._scheduler is not None,
            depth=None if self._scheduler is None else self._scheduler.depth,
            model=None if self._model is None else self._model.kind.name.lower(),
            capacity_iops=found.capacity_iops,
            capacity_measured=found.measured,
            reserved_iops=found.reserved_iops,
            admitted=found.admitted,
            waiting=0 if facts is None else facts.waiting,
            below=0 if facts is None else facts.below,
        )


def _set_share(share: plane.Share, settings: Settings) -> None:
    """Applies minimum and weight to a share."""
    weight = DEFAULT_WEIGHT if settings.weight is None else settings.weight
    share.set(reservation=settings.minimum_iops or 0, weight=weight)
