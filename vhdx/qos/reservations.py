# SPDX-License-Identifier: MIT
"""What disks want together: the sum of their minimums, and where that contradicts their policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vhdx.errors import InvalidArgumentError
from vhdx.qos.policy import Policy, PolicyKind, Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from uuid import UUID

__all__ = [
    "Reservation",
    "Wish",
    "contradictions",
    "group_of",
    "reservations",
    "together_with_policy",
]


class Reservation(NamedTuple):
    """A minimum that is to be kept.

    Attributes:
        iops: normalised.
        depth: requests that its client always has under way.
    """

    iops: int
    depth: int


class Wish(NamedTuple):
    """What is wanted of a disk.

    Attributes:
        settings: its own.
        policy_id: of its policy, which may not exist; None is none.
    """

    settings: Settings
    policy_id: UUID | None


def together_with_policy(
    settings: Settings, policy_id: UUID | None, policies: Mapping[UUID, Policy]
) -> Settings:
    """Settings of a disk, and of its policy where that is dedicated, the tighter of each."""
    policy = None if policy_id is None else policies.get(policy_id)
    if policy is None or policy.kind is PolicyKind.AGGREGATED:
        return settings
    return settings.within(policy.settings)


def group_of(
    wanted: Settings, policy_id: UUID | None, policies: Mapping[UUID, Policy]
) -> Policy | None:
    """The aggregated policy whose minimum and weight a disk shares; one of its own comes before."""
    policy = None if policy_id is None else policies.get(policy_id)
    if policy is None or policy.kind is not PolicyKind.AGGREGATED or wanted.minimum_iops:
        return None
    return policy


def _reservation(settings: Settings) -> Reservation:
    return Reservation(settings.minimum_iops or 0, settings.minimum_depth or 1)


def reservations(wishes: Iterable[Wish], policies: Mapping[UUID, Policy]) -> list[Reservation]:
    """Of disks, and of aggregated policies that have disks."""
    found, groups = [], {}
    for settings, policy_id in wishes:
        wanted = together_with_policy(settings, policy_id, policies)
        found.append(_reservation(wanted))
        policy = group_of(wanted, policy_id, policies)
        if policy is not None:
            groups[policy.policy_id] = policy
    found += [_reservation(policy.settings) for policy in groups.values()]
    return [each for each in found if each.iops]


def contradictions(
    wishes: Iterable[Wish], policies: Mapping[UUID, Policy]
) -> dict[UUID, tuple[int, InvalidArgumentError]]:
    """Disks of an aggregated policy cannot have minimums above what it lets pass in all.

    Returns:
        By policy how much they are above it, and the error that says so.
    """
    sums: dict[UUID, int] = {}
    for settings, policy_id in wishes:
        if policy_id is not None:
            sums[policy_id] = sums.get(policy_id, 0) + (settings.minimum_iops or 0)
    found = {}
    for policy_id, total in sums.items():
        policy = policies.get(policy_id)
        if policy is None or policy.kind is not PolicyKind.AGGREGATED:
            continue
        called = f"a minimum of {total} for the disks of policy {policy.name!r} together"
        try:
            policy.settings.refuse_minimum(total, called)
        except InvalidArgumentError as error:
            found[policy_id] = total - policy.settings.most_minimum(), error
    return found
