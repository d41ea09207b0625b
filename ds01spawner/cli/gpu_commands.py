"""`ds01-admin gpus` and `ds01-admin place`: the box as admission sees it, and what it would answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import yaml
from rich.text import Text

from ds01spawner import admission
from ds01spawner.errors import Alternative, PolicyInvalid, Refusal
from ds01spawner.gpu.held import Held, read_held
from ds01spawner.gpu.inventory import open_inventory
from ds01spawner.gpu.source import InventorySource
from ds01spawner.ledger.store import Ledger
from ds01spawner.model import External, GpuAsk, GpuKind, Inventory, Limits, Request, Snapshot, Unit, Usage
from ds01spawner.policy.load import read_policy
from ds01spawner.policy.resolve import resolve
from ds01spawner.policy.schema import Policy, Profile
from ds01spawner.settings import Settings

from .gpu_picture import Box, show
from .installation import installed_settings, policy_folder, unix_groups
from .output import console, emit, json_option

_INVENTORY = click.option(
    "--inventory", metavar="SOURCE", help="auto, nvml, none or the YAML file of a simulated box; absent: as installed."
)


@click.command()
@_INVENTORY
@json_option
def gpus(inventory: str | None, as_json: bool) -> None:
    """Show every GPU with its MIG layout to scale and the state of each unit.

    Where ds01 is installed, this is the watcher's newest picture with leases and foreign holders. With --inventory,
    or where nothing is installed, the GPUs are read now and only their health is known.
    """
    settings = installed_settings()
    box = _installed_box(settings) if inventory is None and settings is not None else None
    if box is None:
        box = Box(_read_now(inventory or (settings.inventory if settings else "auto")))
    if as_json:
        emit(box.data())
    else:
        show(box, console())


@click.command()
@click.option("--user", required=True, metavar="USER", help="Account that asks.")
@click.option("--gpus", "count", type=click.IntRange(0, 64), default=1, show_default=True, help="Units asked for.")
@click.option("--mig-profile", metavar="NAME", help="NVIDIA's name of the MIG profile, such as 1g.5gb.")
@click.option("--kind", type=click.Choice(["any", "mig", "full"]), help="Default: any, or mig with --mig-profile.")
@click.option("--allow-larger", is_flag=True, help="A larger MIG profile may stand in.")
@_INVENTORY
@click.option(
    "--held",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML or JSON list of containers that exist: name, user, device, state, stopped_s, gpu_hold_s.",
)
@click.option("--config", "folder", type=click.Path(path_type=Path), help="Folder of the policy files.")
@click.option("--group", "groups", multiple=True, metavar="GROUP", help="As if USER were in GROUP. May be repeated.")
@json_option
def place(
    user: str,
    count: int,
    mig_profile: str | None,
    kind: str | None,
    allow_larger: bool,
    inventory: str | None,
    held: Path | None,
    folder: Path | None,
    groups: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say which GPU units USER would get now, or why none.

    The same rules decide as at a start, under the user's own limits; profiles of the form are not looked at.
    Nothing is reserved. The exit code of a refusal is that of its code (12 user_count, 15 no_gpu, …).
    """
    settings = installed_settings()
    policy = _policy(folder or policy_folder(settings))
    now = datetime.now(timezone.utc)
    snapshot, usage = _state(settings, inventory, now)
    unix = (*groups, *(unix_groups(user) if settings and settings.unix_accounts else ()))
    has_mig = snapshot is not None and snapshot.inventory.has_mig

    def limits_of(name: str) -> Limits:
        named = unix if name == user else ()
        return resolve(
            policy,
            name,
            at=now,
            hub_groups=named,
            unix_groups=named,
            member_of=groups if named else (),
            has_mig=has_mig,
        )

    if held is not None and snapshot is not None:
        listed = _read_held(held, snapshot.inventory, lambda name: limits_of(name).group)
        usage = Usage((*usage.holdings, *listed.holdings), usage.own)
        snapshot = Snapshot(snapshot.at, snapshot.inventory, (*snapshot.external, *listed.external))
    chosen = GpuKind(kind) if kind else GpuKind.MIG if mig_profile else GpuKind.ANY
    ask = GpuAsk(count, chosen if count else GpuKind.NONE, mig_profile)
    if mig_profile and chosen is not GpuKind.MIG:
        raise click.UsageError(f"--mig-profile contradicts --kind {chosen.value}")
    units = _granted(ask, allow_larger, limits_of(user), usage, snapshot, now)
    if as_json:
        emit({"user": user, "share": sum(unit.share for unit in units), "units": [_unit_data(unit) for unit in units]})
        return
    for unit in units:
        what = f"{unit.mig_profile} of GPU {unit.gpu_index}" if unit.mig_profile else f"whole {unit.model}"
        row = f"{what:<24} share {unit.share:.3f}  {unit.uuid}"
        console().print(Text.assemble((f"{unit.label:<6}", "bold green"), row))
    if not units:
        console().print("No GPU was asked for, and none is needed.")


def _granted(
    ask: GpuAsk, allow_larger: bool, limits: Limits, usage: Usage, snapshot: Snapshot | None, now: datetime
) -> tuple[Unit, ...]:
    """Admission's answer for a profile that offers every wish; its alternatives name that profile nowhere."""
    offer = {"title": "a server", "gpu": {"count": 64, "kind": "any", "allow_larger": allow_larger}}
    profile = Profile.model_validate({"name": "any", "image": "any", "sizes": {"any": offer}})
    size, request = profile.sizes["any"], Request(gpu=ask, door="admin")
    try:
        return admission.check(request, profile, size, "any", limits, usage, snapshot, now).units
    except Refusal as refusal:
        instead = [
            Alternative(a.text, {key: value for key, value in a.options.items() if key not in ("profile", "size")})
            for a in refusal.alternatives
        ]
        raise Refusal(refusal.code, refusal.message, facts=refusal.facts, alternatives=instead) from None


def _unit_data(unit: Unit) -> dict[str, Any]:
    return {
        "uuid": unit.uuid,
        "label": unit.label,
        "mig_profile": unit.mig_profile,
        "model": unit.model,
        "memory_bytes": unit.memory_bytes,
        "share": unit.share,
        "gpu_uuid": unit.gpu_uuid,
    }


# --------------------------------------------------------------------------- what is known


def _policy(folder: Path) -> Policy:
    loaded = read_policy(folder)
    if loaded.policy is None:
        raise PolicyInvalid(loaded.problems)
    return loaded.policy


def _ledger(settings: Settings | None) -> Ledger | None:
    """The installation's ledger; None where there is none yet (looking must not make one)."""
    if settings is None or (not settings.ledger_url and not (settings.state_dir / "ledger.sqlite").exists()):
        return None
    return Ledger.open(settings.url)


def _installed_box(settings: Settings) -> Box | None:
    """The box as the watcher saw it last, with what the ledger knows of its units; None where nobody watches yet."""
    ledger = _ledger(settings)
    if ledger is None:
        return None
    with ledger:
        snapshot = ledger.read_snapshot()
        if snapshot is None:
            return None
        leased = {
            lease.unit_uuid: f"{allocation.user}/{allocation.server_name or 'main'} ({lease.state.value})"
            for allocation in ledger.allocations()
            for lease in allocation.leases
        }
    return Box(snapshot, leased, datetime.now(timezone.utc))


def _state(settings: Settings | None, inventory: str | None, now: datetime) -> tuple[Snapshot | None, Usage]:
    """What a start would see: the installation's snapshot and leases, or a box that is read now and empty."""
    ledger = _ledger(settings) if inventory is None else None
    if ledger is None:
        return _read_now(inventory or (settings.inventory if settings else "auto"), now), Usage()
    with ledger:
        return ledger.read_snapshot(), ledger.usage()


def _read_now(setting: str, now: datetime | None = None) -> Snapshot:
    """The GPUs read in this process. Whoever uses one counts as a stranger: only the watcher can tell."""
    with open_inventory(setting) as source:
        box = source.read()
        return Snapshot(now or datetime.now(timezone.utc), box, _strangers(source))


def _strangers(source: InventorySource) -> tuple[External, ...]:
    processes = (External(p.unit_uuid, "process", f"pid {p.pid}", "uses the GPU now") for p in source.processes())
    return (*source.external(), *processes)


def _read_held(path: Path, box: Inventory, group_of: Any) -> Held:
    """The list in a file.

    Raises:
        click.BadParameter: it is no list of containers.
    """
    try:
        entries = yaml.safe_load(path.read_text())
        if isinstance(entries, Mapping):
            entries = entries.get("held")
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise ValueError("it must be a list of containers")
        return read_held(entries, box, group_of)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise click.BadParameter(f"{path}: {error}", param_hint="--held") from error
