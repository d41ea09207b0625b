"""jupyterhub_config.py of the demo. A real server's is ../jupyterhub_config.py; the line that counts is the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.accounts import DemoAuthenticator
from deploy.instance import DEMO_ENV, Plan
from ds01spawner import setup

if TYPE_CHECKING:

    def get_config() -> Any:
        """Provided by traitlets while it reads this file."""


c = get_config()
plan = Plan.load(Path(os.environ[DEMO_ENV]))
state = plan.state

settings = setup(c, **plan.settings)

c.JupyterHub.bind_url = f"http://127.0.0.1:{plan.port}"
c.JupyterHub.db_url = f"sqlite:///{settings.state_dir / 'jupyterhub.sqlite'}"  # where only root may look
c.JupyterHub.cookie_secret_file = str(state / "cookie_secret")
c.ConfigurableHTTPProxy.api_url = f"http://127.0.0.1:{plan.proxy_api_port}"
c.ConfigurableHTTPProxy.pid_file = str(state / "proxy.pid")

c.JupyterHub.authenticator_class = DemoAuthenticator
c.DemoAuthenticator.passwords = plan.passwords
c.Authenticator.admin_users = {"admin"}
