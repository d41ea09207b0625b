"""Which kind of cgroup parent fits this machine."""

from __future__ import annotations

from ds01spawner.errors import Code, HostError
from .cgroup_files import find_mounts
from .cgroupfs import CgroupfsV1, CgroupfsV2
from .cgroups import CgroupParents
from .systemd import SystemdParents


def open_parents(driver: str, version: int, root: str) -> CgroupParents:
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
