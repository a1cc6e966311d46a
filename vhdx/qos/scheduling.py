# SPDX-License-Identifier: MIT
"""Turns of the disks of a server at the device that they share, and what it can carry.

With scheduling, minimums are kept and not only watched: a disk, or an aggregated policy, has a share
of the device, and dmclock gives it its minimum first. That can be kept only where the sum of minimums
is less than what the device does; a tenth is left for what nobody has reserved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vhdx import plane
from vhdx.errors import InvalidArgumentError
from vhdx.qos.admission import USABLE, Load, Verdict, best_depth, most_below, most_together

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from vhdx.qos.policy import Settings
    from vhdx.qos.reservations import Reservation

__all__ = ["Admission", "Scheduling", "Turns"]

DEFAULT_WEIGHT = 100
_OVERHEAD = 20e-6  # seconds: between the end of one piece and the next one
_BACKGROUND_IOPS = 16
_LEAST_CONTENDED_NS = 1_000_000_000
_REMEMBERED = 60  # samples of contended time


@dataclass(frozen=True)
class Scheduling:
    """How the disks of a server share their device.

    Attributes:
        keep_minimums: dmclock chooses whose turn it is; else minimums are watched only, as in Windows
            Server 2012 R2.
        depth: requests that are let through at a time, 1 to 256. A request waits for those before
            it, so a deep one gives a hard disk more to choose from, and minimums more to wait for.
        capacity_iops: normalised IOPS that the device does; what the model does, or is seen, when
            None.
        model: the disks are as slow as such a device.
    """

    keep_minimums: bool = False
    depth: int = 8
    capacity_iops: int | None = None
    model: plane.ModelKind | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= plane.DEEPEST:
            raise InvalidArgumentError(
                f"{self.depth} requests at a time", hint=f"choose 1 to {plane.DEEPEST}"
            )
        if self.capacity_iops is not None and self.capacity_iops < 1:
            raise InvalidArgumentError(
                f"a capacity of {self.capacity_iops} IOPS", hint="choose 1 or more"
            )


@dataclass(frozen=True)
class Admission:
    """Whether the device can carry what is reserved.

    Attributes:
        capacity_iops: of the device, normalised; None while it is not known.
        measured: it was seen, and not given or modelled.
        reserved_iops: the sum of minimums.
        admitted: it is at most nine tenths of the capacity, as far as that is known.
    """

    capacity_iops: float | None
    measured: bool
    reserved_iops: int
    admitted: bool
    verdict: Verdict | None = None


class Place(NamedTuple):
    """Of a disk on the shared device.

    Attributes:
        device: what its flows go to.
        share: its own; None where there is no scheduler.
        base: where it begins on the device that is modelled, bytes.
    """

    device: plane.Device
    share: plane.Share | None
    base: int


class Turns:
    """The scheduler, the model and the shares of one server.

    Who calls it holds the lock of the domain, but for :meth:`pace`, and for what only asks: samples
    are replaced as a whole.
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
        self._groups: dict[UUID, plane.Share] = {}
        self._last = (0, 0)
        self._seen: list[tuple[int, int]] = []
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

    @property
    def keeps_minimums(self) -> bool:
        """Whether there is a scheduler."""
        return self._scheduler is not None

    def attach(self, device: plane.Device, twin: Place | None = None) -> Place:
        """Puts a disk on the shared device, or opens its ``twin`` a second time there."""
        if twin is None:
            share = None if self._scheduler is None else plane.Share(self._scheduler)
            twin = Place(device, share, self._base)
            self._base += device.size
        if self._model is not None:
            device = plane.Delay(device, self._model, self._pool, base=twin.base, clock=self._clock)
        if twin.share is not None:
            device = plane.Scheduled(device, twin.share)
        return twin._replace(device=device)

    def share_of(self, policy_id: UUID, settings: Settings) -> plane.Share | None:
        """The share of an aggregated policy, as its settings want it now."""
        if self._scheduler is None:
            return None
        share = self._groups.get(policy_id)
        if share is None:  # kept for good: requests may wait in it
            share = self._groups[policy_id] = plane.Share(self._scheduler)
        set_share(share, settings)
        return share

    def pace(self, size: int) -> None:
        """Waits until work in the background may do ``size`` bytes; at once where no order is kept.

        It has a small reservation, so that it goes on, and where the capacity was given or is a
        model's at most half of it. Only the beginning is paced: what it does then takes no place of
        the depth.
        """
        if self._scheduler is None or self._background is None:
            return
        for done in range(0, size, self._scheduler.piece):
            with self._background.slot(min(self._scheduler.piece, size - done)):
                pass

    def close(self) -> None:
        """Nobody waits for a turn any more."""
        if self._scheduler is not None:
            self._scheduler.stop()

    # ---- what the device can carry ----

    def late(self, share: plane.Share | None) -> float:
        """Seconds by which a deadline is missed; infinite where none are kept."""
        return float("inf") if share is None else share.read().late_ns / 1e9

    def group(self, policy_id: UUID) -> plane.Share | None:
        """The share of an aggregated policy, if it has one."""
        return self._groups.get(policy_id)

    def sample(self) -> None:
        """Looks how much was done while somebody had to wait."""
        if self._scheduler is None:
            return
        facts = self._scheduler.read()
        ns = facts.contended_ns - self._last[0]
        if ns >= _LEAST_CONTENDED_NS:
            self._seen = [*self._seen[1 - _REMEMBERED :], (ns, facts.contended_units - self._last[1])]
            self._last = facts.contended_ns, facts.contended_units

    def adapt(self, reservations: Sequence[Reservation]) -> None:
        """Lets as many through at a time as these allow."""
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
        if capacity is None and self._seen:
            capacity, measured = min(u * 1e9 / n for n, u in self._seen), True
        return Admission(
            capacity, measured, reserved, capacity is None or reserved <= USABLE * capacity
        )

    def warning(self, reservations: Sequence[Reservation]) -> str | None:
        """What to say where these minimums cannot be kept; None where they can."""
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
        """Refuses a change of the sum of minimums that a known capacity cannot carry.

        Returns:
            What to say where it is done although the capacity, as it was seen, cannot carry it.

        Raises:
            InvalidArgumentError: with the figures.
        """
        said = self.warning(after)
        worse = sum(each.iops for each in after) > sum(each.iops for each in before) or (
            self.admission(before).admitted
        )
        if said is not None and worse and not self.admission(after).measured:
            raise InvalidArgumentError(said, hint="lower a minimum")
        return said

    def describe(self, reservations: Sequence[Reservation]) -> dict[str, Any]:
        """For JSON."""
        found = self.admission(reservations)
        facts = None if self._scheduler is None else self._scheduler.read()
        return {
            "keeps_minimums": self.keeps_minimums,
            "depth": None if self._scheduler is None else self._scheduler.depth,
            "model": None if self._model is None else self._model.kind.name.lower(),
            "capacity_iops": found.capacity_iops,
            "capacity_measured": found.measured,
            "reserved_iops": found.reserved_iops,
            "admitted": found.admitted,
            "waiting": 0 if facts is None else facts.waiting,
            "below": 0 if facts is None else facts.below,
        }


def set_share(share: plane.Share, settings: Settings) -> None:
    """Gives a share what settings want."""
    weight = DEFAULT_WEIGHT if settings.weight is None else settings.weight
    share.set(reservation=settings.minimum_iops or 0, weight=weight)
