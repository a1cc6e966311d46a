# SPDX-License-Identifier: MIT
"""The QoS settings of disks (limits and minimums) and named policies, as data.

Windows Server 2012 R2 has a minimum and a maximum for each disk; 2016 adds named policies. The
settings of a *dedicated* policy apply to each of its disks; those of an *aggregated* policy apply
to all of its disks together (Microsoft's "Storage Quality of Service").
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from vhdx.errors import InvalidArgumentError
from vhdx.plane import DEEPEST, LARGEST_RATE, LARGEST_WEIGHT, Limit, LimitKind

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LARGEST_IOPS", "NORMALISED_UNIT", "Policy", "PolicyKind", "Settings"]

NORMALISED_UNIT = 8192
"""Bytes that count as one I/O; a larger request counts as several, a smaller one as one."""

LARGEST_IOPS = 10**9
_LONGEST_NAME = 256
_SECTOR = 512
_SAVED = {
    "maximum_iops": ("burst_iops", "credit_iops", "credit_rate_iops"),
    "maximum_bandwidth": ("burst_bytes",),
}
"""The burst and credit settings that belong to each maximum."""


class PolicyKind(StrEnum):
    """Whether the settings of a policy apply to each of its disks, or to all of them together."""

    DEDICATED = "dedicated"
    AGGREGATED = "aggregated"


@dataclass(frozen=True)
class Settings:
    """Limits and minimum of a disk or policy; None means not set. IOPS are normalised.

    Attributes:
        minimum_iops: an alert is raised when a disk asks for at least this and gets less. With
            scheduling, the minimum is served first.
        minimum_depth: with scheduling, the minimum is guaranteed for a client that always has this
            many reads or writes in flight. None means 1; such a client may also send flushes.
        weight: with scheduling, its relative share of the device, 1 to 10,000; None means 100.
        maximum_iops, maximum_read_iops, maximum_write_iops: a second, 1 to 10**9.
        maximum_bandwidth, maximum_read_bandwidth, maximum_write_bandwidth: bytes a second.
        burst_iops: I/Os that may pass at once above ``maximum_iops``; with 0 the maximum holds at
            any time.
        credit_iops: I/Os that an idle disk saves beyond the burst.
        credit_rate_iops: the largest rate at which credit is spent, a second; None is no bound.
        burst_bytes: bytes that may pass at once above ``maximum_bandwidth``.
    """

    minimum_iops: int | None = None
    minimum_depth: int | None = None
    weight: int | None = None
    maximum_iops: int | None = None
    maximum_read_iops: int | None = None
    maximum_write_iops: int | None = None
    maximum_bandwidth: int | None = None
    maximum_read_bandwidth: int | None = None
    maximum_write_bandwidth: int | None = None
    burst_iops: int = 0
    credit_iops: int = 0
    credit_rate_iops: int | None = None
    burst_bytes: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            value, none = getattr(self, each.name), each.default
            least, most = (1 if none is None else 0), _most(each.name)
            if value is None and none is None:
                continue
            if type(value) is not int or not least <= value <= most:
                raise InvalidArgumentError(
                    f"{each.name.replace('_', ' ')} is {value!r}",
                    hint=f"choose {least} to {most}" + (", or none" if none is None else ""),
                )
        for maximum, saved in _SAVED.items():
            if getattr(self, maximum) is None and any(getattr(self, name) for name in saved):
                raise InvalidArgumentError(
                    "burst and credit need a maximum", hint=f"set {maximum} as well"
                )
        if self.minimum_iops is not None:
            self.refuse_minimum(self.minimum_iops, f"the minimum of {self.minimum_iops}")
        self.limits()

    def refuse_minimum(self, minimum: int, called: str) -> None:
        """Refuses a minimum that is above what a maximum allows.

        Raises:
            InvalidArgumentError: the minimum is too high; the message names the maximum.
        """
        for name, most_iops in self._most_minimums().items():
            if minimum <= most_iops:
                continue
            said = str(getattr(self, name))
            if said != str(most_iops):
                said += f" bytes a second, which is {most_iops} sectors"
            raise InvalidArgumentError(
                f"{called} is above the {name.replace('_', ' ')} of {said}",
                hint="lower the minimum or raise the maximum",
            )

    def most_minimum(self) -> int:
        """The highest minimum that the maximums allow."""
        return min(self._most_minimums().values(), default=LARGEST_IOPS)

    def _most_minimums(self) -> dict[str, int]:
        """For each maximum, the highest minimum that it allows; a request has at least a sector."""
        found = {}
        for each in fields(self):
            most = getattr(self, each.name)
            if each.name.startswith("maximum_") and most is not None:
                found[each.name] = most if each.name.endswith("iops") else most // _SECTOR
        return found

    def limits(self) -> dict[LimitKind, Limit]:
        """The limits in the form that the data plane takes."""
        wanted = {
            LimitKind.UNITS: self.maximum_iops,
            LimitKind.UNITS_READ: self.maximum_read_iops,
            LimitKind.UNITS_WRITTEN: self.maximum_write_iops,
            LimitKind.BYTES: self.maximum_bandwidth,
            LimitKind.BYTES_READ: self.maximum_read_bandwidth,
            LimitKind.BYTES_WRITTEN: self.maximum_write_bandwidth,
        }
        found = {kind: Limit(rate) for kind, rate in wanted.items() if rate is not None}
        if self.maximum_iops is not None:
            found[LimitKind.UNITS] = Limit(
                self.maximum_iops, self.burst_iops, self.credit_iops, self.credit_rate_iops or 0
            )
        if self.maximum_bandwidth is not None:
            found[LimitKind.BYTES] = Limit(self.maximum_bandwidth, self.burst_bytes)
        return found

    def within(self, other: Settings) -> Settings:
        """Combines both: the lower of each maximum; ``other``'s minimum and weight as defaults."""
        tighter: dict[str, Any] = {
            each.name: min(
                (v for v in (getattr(self, each.name), getattr(other, each.name)) if v is not None),
                default=None,
            )
            for each in fields(self)
            if each.name.startswith("maximum_")
        }
        minimum = other.minimum_iops if self.minimum_iops is None else self.minimum_iops
        if minimum is not None:
            minimum = min([minimum, *Settings(**tighter)._most_minimums().values()]) or None
        saving: dict[str, Any] = {}
        for maximum, saved in _SAVED.items():
            mine, theirs = getattr(self, maximum), getattr(other, maximum)
            base = other if mine is None or (theirs is not None and theirs < mine) else self
            saving |= {name: getattr(base, name) for name in saved}
        weight = other.weight if self.weight is None else self.weight
        mine = self if self.minimum_iops is not None else other
        return Settings(
            minimum_iops=minimum, minimum_depth=mine.minimum_depth, weight=weight, **tighter, **saving
        )

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """A copy with ``changes`` applied.

        Raises:
            InvalidArgumentError: an unknown name, or a value that is out of range.
        """
        known = {each.name: each.default for each in fields(self)}
        for name in changes:
            if name not in known:
                raise InvalidArgumentError(
                    f"there is no setting {name!r}", hint=f"known: {', '.join(sorted(known))}"
                )
        for maximum, saved in _SAVED.items():
            if maximum in changes and changes[maximum] is None:
                # Without its maximum, burst and credit are reset unless `changes` sets them.
                changes = {name: known[name] for name in saved} | dict(changes)
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The settings by name, for JSON."""
        return asdict(self)


def _most(name: str) -> int:
    if name == "weight":
        return LARGEST_WEIGHT
    if name == "minimum_depth":
        return DEEPEST
    return LARGEST_RATE if name.endswith(("bandwidth", "bytes")) else LARGEST_IOPS


@dataclass(frozen=True)
class Policy:
    """A named policy.

    Attributes:
        name: for people; unique in a domain, 1 to 256 characters.
        kind: cannot be changed later.
        settings: for each of its disks, or for all of them together.
        policy_id: identifies the policy to its disks, even if it is deleted and created again.
    """

    name: str
    kind: PolicyKind
    settings: Settings
    policy_id: UUID = field(default_factory=uuid4)

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= _LONGEST_NAME or not self.name.isprintable():
            raise InvalidArgumentError(
                f"{self.name[:80]!r} cannot be the name of a policy",
                hint=f"choose 1 to {_LONGEST_NAME} printable characters",
            )
        if self.policy_id.int == 0:
            raise InvalidArgumentError("a policy's id must not be zero")

    def as_dict(self) -> dict[str, Any]:
        """The policy as a dictionary, for JSON."""
        return {
            "name": self.name,
            "kind": self.kind.value,
            "policy_id": str(self.policy_id),
            "settings": self.settings.as_dict(),
        }

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Policy:
        """The policy from the dictionary that :meth:`as_dict` made.

        Raises:
            InvalidArgumentError: ``found`` is not such a dictionary.
        """
        try:
            return cls(
                str(found["name"]),
                PolicyKind(found["kind"]),
                Settings().changed(dict(found["settings"])),
                UUID(str(found["policy_id"])),
            )
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, InvalidArgumentError):
                raise
            raise InvalidArgumentError(f"a policy is invalid: {error}") from error
