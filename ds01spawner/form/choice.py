"""Which profile and size a request means, among those that are offered. Pure.

Quotas are not looked at here (`admission.check` does that): this is the question "is it on the menu?". A request
may take less than the menu gives, never more.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds01spawner.admission import effective_ask
from ds01spawner.errors import Alternative, Code, Refusal
from ds01spawner.model import Request
from ds01spawner.policy.schema import Profile, ProfileSize

MAX_ALTERNATIVES = 6
"""More would make a sentence that nobody reads."""


def choose(request: Request, profiles: Sequence[Profile]) -> tuple[Profile, ProfileSize]:
    """The profile and size that `request` means.

    Args:
        profiles: what this user is offered (`policy.resolve.offered_profiles`), in file order.

    Raises:
        Refusal: NOT_IN_PROFILE when nothing is offered, when profile or size is not among the offered ones
            (these are then the alternatives), or when the request asks for more than the size gives.
    """
    profile = _profile(request, profiles)
    size = _size(request, profile)
    effective_ask(request.gpu, size)
    _check_smaller(request, profile, size)
    return profile, size


def default_profile(profiles: Sequence[Profile]) -> Profile | None:
    """The one marked as default, else the first."""
    return next((profile for profile in profiles if profile.default), profiles[0] if profiles else None)


def size_key(profile: Profile, size: ProfileSize) -> str:
    """The key of `size` in its profile."""
    return next(key for key, item in profile.sizes.items() if item is size)


def profile_title(profile: Profile) -> str:
    """What people call the profile."""
    return profile.title or profile.name


def _profile(request: Request, profiles: Sequence[Profile]) -> Profile:
    fallback = default_profile(profiles)
    if fallback is None:
        raise Refusal(
            Code.NOT_IN_PROFILE,
            "No profile is offered to you. Ask the admin of this server to offer one to your group.",
        )
    if request.profile is None:
        return fallback
    for profile in profiles:
        if profile.name == request.profile:
            return profile
    raise Refusal(
        Code.NOT_IN_PROFILE,
        f"There is no profile {request.profile!r} for you.",
        facts={"profile": request.profile, "offered": [profile.name for profile in profiles]},
        alternatives=[Alternative(profile_title(p), {"profile": p.name}) for p in profiles[:MAX_ALTERNATIVES]],
    )


def _size(request: Request, profile: Profile) -> ProfileSize:
    if request.size is None:
        return profile.sizes[profile.default_size]
    found = profile.sizes.get(request.size)
    if found is not None:
        return found
    offered = list(profile.sizes.items())[:MAX_ALTERNATIVES]
    raise Refusal(
        Code.NOT_IN_PROFILE,
        f"Profile {profile_title(profile)!r} has no size {request.size!r}.",
        facts={"profile": profile.name, "size": request.size, "offered": list(profile.sizes)},
        alternatives=[Alternative(size.title or key, {"profile": profile.name, "size": key}) for key, size in offered],
    )


def _check_smaller(request: Request, profile: Profile, size: ProfileSize) -> None:
    """Refuse CPU and memory wishes above the size. What the size leaves open is clamped by the limits instead."""
    if request.cpus is not None and size.cpus is not None and request.cpus > size.cpus:
        text = f"gives {size.cpus:g} CPU cores, not {request.cpus:g}"
        raise _beyond(profile, size, text, {"cpus": request.cpus, "offered": size.cpus})
    if request.memory is not None and size.memory is not None and request.memory > size.memory:
        raise _beyond(profile, size, "gives less memory than that", {"memory": request.memory, "offered": size.memory})


def _beyond(profile: Profile, size: ProfileSize, text: str, facts: dict[str, object]) -> Refusal:
    key = size_key(profile, size)
    return Refusal(
        Code.NOT_IN_PROFILE,
        f"{size.title or key} of profile {profile_title(profile)} {text}.",
        facts={"profile": profile.name, "size": key, **facts},
        alternatives=[Alternative(f"{size.title or key} as it is", {"profile": profile.name, "size": key})],
    )
