"""DockerSpawner's settings that have no effect here, and where their matter is decided instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_LIMITS = "resource-limits.yaml and the sizes of profiles.yaml decide"
_IMAGES = "the profiles of profiles.yaml name images"
_MOUNTS = "`mounts:` in resource-limits.yaml and profiles.yaml decide"
_NETWORK = "every container is on the installation's own network (`setup(c, subnet=…)`)"
_KEEP = "a stopped container is kept until its server is deleted (`container_hold_after_stop_h`)"
_NAME = "containers are named by AIME's convention"
_ENGINE = "the engine is found by DOCKER_HOST and its companions in the Hub's environment"

INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("mem_limit", "cpu_limit", "mem_guarantee", "cpu_guarantee"), _LIMITS),
    **dict.fromkeys(("image", "container_image", "allowed_images", "image_whitelist"), _IMAGES),
    **dict.fromkeys(("volumes", "read_only_volumes", "mounts", "format_volume_name"), _MOUNTS),
    **dict.fromkeys(("network_name", "use_internal_ip", "use_internal_hostname", "host_ip", "links"), _NETWORK),
    **dict.fromkeys(("container_ip", "container_port", "hub_ip_connect"), _NETWORK),
    **dict.fromkeys(("remove", "remove_containers"), _KEEP),
    **dict.fromkeys(("name_template", "container_name_template", "prefix", "container_prefix", "escape"), _NAME),
    **dict.fromkeys(("client_kwargs", "tls_config", "use_docker_client_env"), _ENGINE),
    **dict.fromkeys(("tls", "tls_verify", "tls_ca", "tls_cert", "tls_key", "tls_assert_hostname"), _ENGINE),
    "post_start_cmd": "put what every server needs into the image, or name a `command:` in the profile",
}
"""By trait: what decides instead. `pull_policy`, `environment`, `cmd`, `args`, `default_url`, `notebook_dir`, timeouts,
hooks, `extra_host_config` and `extra_create_kwargs` (as far as they weaken nothing) have their effect."""


def overruled(config: Mapping[str, Any], sections: Iterable[str]) -> Iterator[str]:
    """A sentence for every setting of the configuration that has no effect.

    Args:
        config: traitlets' configuration. sections: names of the spawner's class and its parents.
    """
    for section in sections:
        for name in sorted(config.get(section) or ()):
            if name in INSTEAD:
                yield f"c.{section}.{name} has no effect with ds01spawner: {INSTEAD[name]}."


def exposed(config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every switch of the Hub's own that leaves people open to each other.

    Args:
        config: traitlets' configuration.
    """
    if not (config.get("JupyterHub") or {}).get("subdomain_host"):
        yield (
            "c.JupyterHub.subdomain_host is not set: all servers share the Hub's origin, so whoever opens a page of "
            "somebody else's server while logged in gives its owner everything they may do, admins included "
            "(docs/security.md, Browsers)."
        )
