# SPDX-License-Identifier: MIT
"""Changes of what is wanted of disks, as they come over a control socket."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vhdx.errors import ExistsError, InvalidArgumentError, NotFoundError
from vhdx.qos import Policy, PolicyKind, Settings

if TYPE_CHECKING:
    from vhdx.qos import Domain

__all__ = ["change_qos"]


def change_qos(domain: Domain, body: Any) -> Any:
    """Does one change: a JSON object with "change", and what goes with it.

    "disk": name, settings (those that change; null takes one away), policy (name, id, or "" for
    none). "policy": name, kind (when it is new), settings, and policy_id to bring one back.
    "remove_policy": name.

    Raises:
        InvalidArgumentError, NotFoundError, ExistsError: nothing is changed.
    """
    if not isinstance(body, dict) or not isinstance(body.get("settings", {}), dict):
        raise InvalidArgumentError("a change is a JSON object with settings in an object")
    what, name, settings = body.get("change"), body.get("name"), body.get("settings", {})
    if not isinstance(name, str):
        raise InvalidArgumentError("name is missing")
    if what == "disk":
        policy = body.get("policy")
        if policy is not None and not isinstance(policy, str):
            raise InvalidArgumentError("policy must be a name")
        return {"warning": domain.set_disk(name, settings, policy)}
    if what == "policy":
        return _set_policy(domain, name, settings, body.get("kind"), body.get("policy_id"))
    if what == "remove_policy":
        return {"disks": domain.remove_policy(name)}
    raise InvalidArgumentError(f"there is no change {what!r}")


def _refuse_known(domain: Domain, policy_id: str) -> None:
    try:
        known = domain.policy(policy_id)
    except NotFoundError:
        return
    raise ExistsError(f"policy {known.name!r} has this id", hint="change it by its name")


def _set_policy(
    domain: Domain, name: str, settings: dict[str, Any], kind: Any, policy_id: Any
) -> dict[str, Any]:
    def change(old: Policy | None) -> Policy:
        if old is None:
            try:
                chosen = PolicyKind.DEDICATED if kind is None else PolicyKind(kind)
                identity = {} if policy_id is None else {"policy_id": UUID(str(policy_id))}
                if policy_id is not None:
                    _refuse_known(domain, str(identity["policy_id"]))
            except ValueError as error:
                raise InvalidArgumentError(f"it can be no policy: {error}") from error
            return Policy(name, chosen, Settings().changed(settings), **identity)
        if kind not in (None, old.kind.value):  # it may be anything, a list too
            raise InvalidArgumentError(
                f"policy {name!r} is {old.kind}, and that cannot change", hint="make another policy"
            )
        return replace(old, settings=old.settings.changed(settings))

    policy, warning = domain.change_policy(name, change)
    return policy.as_dict() | {"warning": warning}
