# SPDX-License-Identifier: MIT
"""Computes the reservations of a set of disks, and finds conflicts with their policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vhdx.errors import InvalidArgumentError
from vhdx.qos.policy import Policy, PolicyKind, Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from uuid import UUID

__all__ = [
    "DesiredQos",
    "Reservation",
    "contradictions",
    "effective_settings",
    "reservations",
    "shared_policy",
]


class Reservation(NamedTuple):
    """A minimum that is to be kept.

    Attributes:
        iops: normalised.
        depth: requests that its client must always have in flight.
    """

    iops: int
    depth: int


class DesiredQos(NamedTuple):
    """The settings and the policy of a disk.

    Attributes:
        settings: the disk's own settings.
        policy_id: the id of its policy, which may not exist; None if it has no policy.
    """

    settings: Settings
    policy_id: UUID | None


def effective_settings(desired: DesiredQos, policies: Mapping[UUID, Policy]) -> Settings:
    """The disk's own settings, combined with those of its dedicated policy if it has one."""
    policy = None if desired.policy_id is None else policies.get(desired.policy_id)
    if policy is None or policy.kind is PolicyKind.AGGREGATED:
        return desired.settings
    return desired.settings.within(policy.settings)


def shared_policy(
    settings: Settings, policy_id: UUID | None, policies: Mapping[UUID, Policy]
) -> Policy | None:
    """The aggregated policy whose minimum and weight a disk shares.

    A disk with a minimum of its own shares none.
    """
    policy = None if policy_id is None else policies.get(policy_id)
    if policy is None or policy.kind is not PolicyKind.AGGREGATED or settings.minimum_iops:
        return None
    return policy


def _reservation(settings: Settings) -> Reservation:
    return Reservation(settings.minimum_iops or 0, settings.minimum_depth or 1)


def reservations(desired: Iterable[DesiredQos], policies: Mapping[UUID, Policy]) -> list[Reservation]:
    """The minimums of disks, and of aggregated policies that have disks."""
    found, shared = [], {}
    for each in desired:
        settings = effective_settings(each, policies)
        found.append(_reservation(settings))
        policy = shared_policy(settings, each.policy_id, policies)
        if policy is not None:
            shared[policy.policy_id] = policy
    found += [_reservation(policy.settings) for policy in shared.values()]
    return [each for each in found if each.iops]


def contradictions(
    desired: Iterable[DesiredQos], policies: Mapping[UUID, Policy]
) -> dict[UUID, tuple[int, InvalidArgumentError]]:
    """Finds aggregated policies whose disks have minimums that exceed the policy's maximums in sum.

    Returns:
        For each such policy, the excess in IOPS and the error that describes it.
    """
    sums: dict[UUID, int] = {}
    for settings, policy_id in desired:
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
