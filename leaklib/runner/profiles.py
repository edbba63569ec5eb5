"""Profiles of a study: the same code at two sizes, and the reader's own values on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def choose_plan(
    profile: str, plans: Mapping[str, Mapping[str, Any]], **given: object
) -> dict[str, Any]:
    """The plan of a profile, with the reader's values in place of the profile's.

    Args:
        profile: name of a plan, such as "smoke" or "paper".
        plans: name -> settings; every plan names the same settings.
        **given: values of the reader; an empty one (None, "", 0 or an empty list) leaves the
            plan's.

    Returns:
        A new dict.

    Raises:
        ValueError: unknown profile or setting, or plans that name different settings.

    >>> choose_plan("smoke", {"smoke": {"victims": 4}, "paper": {"victims": 50}}, victims=0)
    {'victims': 4}
    """
    if profile not in plans:
        raise ValueError(f"expected a profile among {', '.join(plans)}, got {profile!r}")
    plan = dict(plans[profile])
    for name, other in plans.items():
        if uneven := sorted(set(other) ^ set(plan)):
            raise ValueError(f"expected plans with equal settings, {name!r} differs in {uneven}")
    if unknown := sorted(set(given) - set(plan)):
        raise ValueError(f"expected settings among {', '.join(plan)}, got {', '.join(unknown)}")
    return plan | {name: value for name, value in given.items() if value not in (None, "", 0, [])}
