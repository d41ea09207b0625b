"""A JupyterHub with ds01spawner on a real server. Start: `jupyterhub -f jupyterhub_config.py`, as root.

Everything about who may have what is in the policy (`config/`, copied to /etc/ds01); everything about this
installation is an argument of `setup` (docs/admin.md lists them). Any trait may be set again after it; what the policy
decides (images, limits, mounts, network) has no effect here, and the Hub's log says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds01spawner import setup

if TYPE_CHECKING:

    def get_config() -> Any:
        """Provided by traitlets while it reads this file."""


c = get_config()

setup(
    c,
    config_dir="/etc/ds01",
    state_dir="/var/lib/ds01",
    workspaces="/srv/ds01/workspaces",
    homes="/srv/ds01/homes",
    unix_accounts=True,  # with PAM, below: Hub names are accounts of this host. Decide before the first start
    # catalogue="/etc/ds01/images.repo",  # your own list of images, in the form of AIME's ml_images.repo
)

# Who somebody is: any authenticator of JupyterHub. Who may log in also needs a group of the policy.
c.JupyterHub.authenticator_class = "pam"
c.Authenticator.admin_users = {"admin"}  # with PAM: an account of this host

# The page; put TLS in front of it.
c.JupyterHub.bind_url = "http://127.0.0.1:8000"
c.JupyterHub.db_url = "sqlite:////var/lib/ds01/jupyterhub.sqlite"
c.JupyterHub.cookie_secret_file = "/var/lib/ds01/jupyterhub_cookie_secret"  # noqa: S105 - a path
