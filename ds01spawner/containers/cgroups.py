"""The cgroup parents of this machine: which backend fits, and the names that other rooms use."""

from __future__ import annotations

from ds01spawner.errors import Code, HostError

from .cgroup_files import CgroupFacts, Mounts, find_mounts, read_cgroup, read_limits
from .cgroup_parents import Aggregate, CgroupParent, CgroupParents
from .cgroupfs import CgroupfsV1, CgroupfsV2
from .systemd import SystemdParents

__all__ = [
    "Aggregate",
    "CgroupFacts",
    "CgroupParent",
    "CgroupParents",
    "Mounts",
    "find_mounts",
    "open_cgroups",
    "read_cgroup",
    "read_limits",
]


def open_cgroups(driver: str, version: int, root: str) -> CgroupParents:
    """The backend for what Docker says of itself.

    Args:
        driver: `cgroupfs` or `systemd` (`docker info`, Cgroup Driver). version: 1 or 2 (Cgroup Version).
        root: top of the tree (`Settings.cgroup_root`).

    Raises:
        HostError: Docker limits nothing (`none`, a rootless daemon), or the kernel's trees are not here.
    """
    if driver not in ("cgroupfs", "systemd"):
        raise HostError(
            f"Docker's cgroup driver is {driver!r}: it can limit nobody. Use a daemon that runs as root, with the "
            "systemd or the cgroupfs driver.",
            code=Code.LIMITS_NOT_ENFORCED,
            facts={"cgroup_driver": driver},
        )
    mounts = find_mounts(version)
    if driver == "systemd":
        return SystemdParents(root, mounts)
    return CgroupfsV1(root, mounts) if version == 1 else CgroupfsV2(root, mounts)
