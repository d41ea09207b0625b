"""One tree of errors and refusals: a code, a sentence for a person, facts for a program.

Everything that can be told to a user is a `Ds01Error`. A `Refusal` is a "no" that the rules gave; every
other class says that something is broken or misconfigured. The HTTP status, the exit code of the command
line and the metric label all derive from the code, so that no two doors tell a different story.

This module imports nothing of the project: it stands at the bottom of the one-way imports.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any


class Code(str, Enum):
    """Why something was not done. The value is the word used in JSON, audit rows and metric labels."""

    # Refusals, in the order in which admission checks them.
    FULL_NOT_ALLOWED = "full_not_allowed"
    CONTAINER_CAP = "container_cap"
    USER_COUNT = "user_count"
    USER_QUOTA = "user_quota"
    GROUP_QUOTA = "group_quota"
    NO_GPU = "no_gpu"
    # Refusals without a place in that order.
    NOT_IN_PROFILE = "not_in_profile"
    IMAGE_NOT_ALLOWED = "image_not_allowed"
    IMAGE_MISSING = "image_missing"
    TOO_MANY_SERVERS = "too_many_servers"
    NOT_ALLOWED = "not_allowed"
    BAD_REQUEST = "bad_request"
    BAD_NAME = "bad_name"
    NAME_TAKEN = "name_taken"
    BUSY = "busy"
    DISK_FULL = "disk_full"
    # Something is broken: fail closed.
    INVENTORY_STALE = "inventory_stale"
    POLICY_INVALID = "policy_invalid"
    SETTINGS_INVALID = "settings_invalid"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    LIMITS_NOT_ENFORCED = "limits_not_enforced"
    NETWORK_NOT_ENFORCED = "network_not_enforced"
    STORAGE_REFUSED = "storage_refused"
    LEDGER_UNAVAILABLE = "ledger_unavailable"
    DEVICE_MISMATCH = "device_mismatch"
    INTERNAL = "internal"


# (HTTP status, exit code) by code. Exit codes 0..2 keep their usual meaning (ok, error, usage).
_STATUS: Mapping[Code, tuple[int, int]] = {
    Code.FULL_NOT_ALLOWED: (403, 10),
    Code.CONTAINER_CAP: (403, 11),
    Code.USER_COUNT: (409, 12),
    Code.USER_QUOTA: (409, 13),
    Code.GROUP_QUOTA: (409, 14),
    Code.NO_GPU: (409, 15),
    Code.NOT_IN_PROFILE: (403, 16),
    Code.IMAGE_NOT_ALLOWED: (403, 17),
    Code.IMAGE_MISSING: (409, 18),
    Code.TOO_MANY_SERVERS: (409, 19),
    Code.NOT_ALLOWED: (403, 20),
    Code.BAD_REQUEST: (400, 21),
    Code.BAD_NAME: (400, 22),
    Code.NAME_TAKEN: (409, 23),
    Code.BUSY: (409, 24),
    Code.DISK_FULL: (507, 25),
    Code.INVENTORY_STALE: (503, 30),
    Code.POLICY_INVALID: (503, 31),
    Code.SETTINGS_INVALID: (500, 32),
    Code.ENGINE_UNAVAILABLE: (503, 33),
    Code.LIMITS_NOT_ENFORCED: (503, 34),
    Code.NETWORK_NOT_ENFORCED: (503, 35),
    Code.STORAGE_REFUSED: (503, 36),
    Code.LEDGER_UNAVAILABLE: (503, 37),
    Code.DEVICE_MISMATCH: (503, 38),
    Code.INTERNAL: (500, 1),
}


@dataclass(frozen=True)
class Alternative:
    """Something that would be granted now instead.

    Attributes:
        text: a sentence for a person ("Small GPU, 5 GB: 3 free now").
        options: the `user_options` that would ask for it; a page turns them into a pre-filled form.
    """

    text: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Ds01Error(Exception):
    """Base of everything this project raises on purpose.

    Args:
        message: one or two sentences for a person: what is wrong and what to do next.
        code: overrides the class's code.
        facts: base-unit values for programs (bytes, seconds, cores); JSON-serialisable.
    """

    code: Code = Code.INTERNAL

    def __init__(self, message: str, *, code: Code | None = None, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.facts: dict[str, Any] = dict(facts or {})
        if code is not None:
            self.code = code

    @property
    def http_status(self) -> int:
        """HTTP status of an answer that carries this error."""
        return _STATUS[self.code][0]

    @property
    def exit_code(self) -> int:
        """Exit code of a command that ends with this error."""
        return _STATUS[self.code][1]

    def as_dict(self) -> dict[str, Any]:
        """The machine-readable form, the same on REST, in `--json` output and in audit rows."""
        return {"code": self.code.value, "message": self.message, "facts": self.facts}


class Refusal(Ds01Error):
    """A typed "no" of the rules: nothing is broken, the request may not run (now)."""

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        facts: Mapping[str, Any] | None = None,
        alternatives: Sequence[Alternative] = (),
    ) -> None:
        super().__init__(message, code=code, facts=facts)
        self.alternatives = tuple(alternatives)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {
            "alternatives": [{"text": a.text, "options": dict(a.options)} for a in self.alternatives]
        }

    def sentence(self) -> str:
        """Message and alternatives in plain text, for places that show one string only (the spawn page)."""
        if not self.alternatives:
            return self.message
        return f"{self.message} You could instead take: {'; '.join(a.text for a in self.alternatives)}."


@dataclass(frozen=True)
class Problem:
    """One finding in a policy file.

    Attributes:
        file: path as the admin wrote it; line and column count from 1 (None where there is no place).
        message: what is wrong. hint: the remedy or a did-you-mean, possibly empty.
        warning: True when the file is still accepted.
    """

    file: str
    message: str
    line: int | None = None
    column: int | None = None
    hint: str = ""
    warning: bool = False

    def __str__(self) -> str:
        place = self.file
        if self.line is not None:
            place += f":{self.line}"
            if self.column is not None:
                place += f":{self.column}"
        kind = "warning" if self.warning else "error"
        return f"{place}: {kind}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class PolicyInvalid(Ds01Error):
    """The policy files do not parse or validate; `problems` says where."""

    code = Code.POLICY_INVALID

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        errors = [p for p in self.problems if not p.warning]
        first = str(errors[0]) if errors else "unknown problem"
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        folder = f" {shlex.quote(str(PurePath(errors[0].file).parent))}" if errors else ""
        super().__init__(
            f"The policy is not valid: {first}{more}. Run `ds01-admin config check{folder}` to see all.",
            facts={"problems": [str(p) for p in self.problems]},
        )


class SettingsInvalid(Ds01Error):
    """The installation's settings contradict themselves or the machine."""

    code = Code.SETTINGS_INVALID


class InventoryError(Ds01Error):
    """The GPUs cannot be read (NVML missing or failing, a simulation file wrong)."""

    code = Code.INVENTORY_STALE


class EngineError(Ds01Error):
    """Docker does not answer or refused what it should have done."""

    code = Code.ENGINE_UNAVAILABLE


class HostError(Ds01Error):
    """The host would not let a limit, folder or rule be set; starting anyway would break a promise."""

    code = Code.LIMITS_NOT_ENFORCED


class LedgerError(Ds01Error):
    """The ledger cannot be read or written."""

    code = Code.LEDGER_UNAVAILABLE


class Busy(Ds01Error):
    """Another hand holds the operation row of this allocation (design, point 11)."""

    code = Code.BUSY


class UnitTaken(Ds01Error):
    """The database refused a second live lease on a unit. Reaching this means that a check above was wrong."""

    code = Code.NO_GPU
