# SPDX-License-Identifier: MIT
"""Carries out QoS changes that are requested over a control socket."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

from vhdx.control import api
from vhdx.errors import ExistsError, InvalidArgumentError, NotFoundError
from vhdx.qos import Policy, PolicyKind, Settings

if TYPE_CHECKING:
    from vhdx.qos import Domain

__all__ = ["change_qos"]


def change_qos(
    domain: Domain, change: api.ChangeDisk | api.ChangePolicy | api.RemovePolicy
) -> api.DiskChanged | api.PolicyChanged | api.PolicyRemoved:
    """Makes one change.

    Raises:
        InvalidArgumentError, NotFoundError, ExistsError: the change is refused and has no effect.
    """
    if isinstance(change, api.ChangeDisk):
        return api.DiskChanged(domain.set_disk(change.name, change.settings, change.policy))
    if isinstance(change, api.RemovePolicy):
        return api.PolicyRemoved(domain.remove_policy(change.name))
    policy, warning = domain.change_policy(change.name, lambda old: _changed(domain, change, old))
    return api.PolicyChanged(str(policy.policy_id), warning)


def _changed(domain: Domain, change: api.ChangePolicy, old: Policy | None) -> Policy:
    """The policy after the change."""
    if old is None:
        return _new(domain, change)
    if change.kind not in (None, old.kind.value):
        raise InvalidArgumentError(
            f"policy {change.name!r} is {old.kind}, and that cannot change",
            hint="make another policy",
        )
    return replace(old, settings=old.settings.changed(change.settings))


def _new(domain: Domain, change: api.ChangePolicy) -> Policy:
    try:
        kind = PolicyKind.DEDICATED if change.kind is None else PolicyKind(change.kind)
        identity = {} if change.policy_id is None else {"policy_id": UUID(change.policy_id)}
    except ValueError as error:
        raise InvalidArgumentError(f"the policy is invalid: {error}") from error
    for policy_id in identity.values():
        _refuse_known(domain, policy_id)
    return Policy(change.name, kind, Settings().changed(change.settings), **identity)


def _refuse_known(domain: Domain, policy_id: UUID) -> None:
    try:
        known = domain.policy(str(policy_id))
    except NotFoundError:
        return
    raise ExistsError(f"policy {known.name!r} has this id", hint="change it by its name")
