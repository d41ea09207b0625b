"""What is true of one installation: folders, ports, switches. Policy (who may have what) is not in here.

`ds01spawner.setup(c)` makes one `Settings` from its arguments, writes it to `<state_dir>/settings.json` and
hands the path to every process (`DS01_SETTINGS`), so that Hub, watcher and command line agree.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import SettingsInvalid

SETTINGS_ENV = "DS01_SETTINGS"
DEFAULT_STATE_DIR = Path("/var/lib/ds01")


class Settings(BaseModel):
    """One installation. Every field has a help text; paths are absolute after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config_dir: Path = Field(Path("/etc/ds01"), description="Folder of the policy files.")
    state_dir: Path = Field(DEFAULT_STATE_DIR, description="Root-owned folder of the ledger and generated files.")
    ledger_url: str = Field("", description="SQLAlchemy URL of the ledger; empty: <state_dir>/ledger.sqlite.")
    inventory: str = Field(
        "auto", description="GPU source: auto, nvml, none, or a simulated box (path of a YAML file)."
    )
    workspaces: Path = Field(Path("/srv/ds01/workspaces"), description="Root-owned parent of the workspaces.")
    homes: Path = Field(Path("/srv/ds01/homes"), description="Root-owned parent of the HOME folders.")
    cgroup_root: str = Field("ds01", description="Top of the cgroup tree (/<root> or <root>.slice).")
    network_mode: Literal["bridge", "host"] = Field(
        "bridge", description="host only on machines without a bridge, together with unsafe_no_isolation."
    )
    subnet: str = Field("172.31.240.0/20", description="IPv4 subnet of this installation's Docker network.")
    hub_port: int = Field(8081, ge=1, le=65535, description="Port of the Hub's API on the network's gateway address.")
    service_port: int = Field(8082, ge=1, le=65535, description="Port of the service on the gateway address.")
    uid_range: tuple[int, int] = Field((70000, 99999), description="First and last uid given to Hub users.")
    unix_accounts: bool = Field(False, description="Hub names are Unix accounts of this host.")
    catalogue: Path | None = Field(
        None, description="AIME's ml_images.repo; null: the first of its usual places that exists."
    )
    start_concurrency: int | None = Field(None, ge=1, description="Starts at a time; null: 2.5 per core.")
    unsafe_no_isolation: bool = Field(
        False,
        description="TEST ONLY: start although containers cannot be kept from each other and from the host's ports.",
    )

    @field_validator("config_dir", "state_dir", "workspaces", "homes")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.absolute()

    @field_validator("cgroup_root")
    @classmethod
    def _plain_root(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9_]{1,32}", value):
            raise ValueError("use 1-32 characters of a-z, 0-9 and _ (a hyphen would nest systemd slices)")
        return value

    @field_validator("subnet")
    @classmethod
    def _subnet(cls, value: str) -> str:
        return str(ipaddress.IPv4Network(value))

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        low, high = self.uid_range
        if not 1000 <= low <= high or low <= 65534 <= high:
            raise ValueError("uid_range must start at 1000 or above and must not contain 65534 (nobody)")
        if self.network_mode == "host" and not self.unsafe_no_isolation:
            raise ValueError("network_mode: host needs unsafe_no_isolation: true (it separates nobody from anybody)")
        return self

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the ledger."""
        return self.ledger_url or f"sqlite:///{self.state_dir / 'ledger.sqlite'}"

    @property
    def gateway(self) -> str:
        """The host's address on the installation's Docker network: the first one of the subnet."""
        return str(next(ipaddress.IPv4Network(self.subnet).hosts()))

    @property
    def external_file(self) -> Path:
        """The root-owned list of containers that may see GPUs without holding them."""
        return self.config_dir / "external.yaml"

    def save(self) -> Path:
        """Write `<state_dir>/settings.json` (0640, atomically) and return its path."""
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        path = self.state_dir / "settings.json"
        draft = path.with_suffix(".json.new")
        draft.write_text(self.model_dump_json(indent=2) + "\n")
        draft.chmod(0o640)
        draft.replace(path)
        return path


def load_settings(path: str | Path | None = None) -> Settings:
    """Read the settings written by `Settings.save`.

    Args:
        path: the file; default: `$DS01_SETTINGS`, then /var/lib/ds01/settings.json.

    Raises:
        SettingsInvalid: the file is missing, unreadable or wrong.
    """
    chosen = Path(path or os.environ.get(SETTINGS_ENV) or DEFAULT_STATE_DIR / "settings.json")
    try:
        return Settings.model_validate_json(chosen.read_text())
    except OSError as error:
        raise SettingsInvalid(
            f"No settings at {chosen}: {error.strerror}. Start the Hub once, or set {SETTINGS_ENV}."
        ) from error
    except ValidationError as error:
        raise SettingsInvalid(f"{chosen} is not valid: {error}") from error
