"""How far a pull has come: Docker reports per layer, people want one figure. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DOWNLOADED = ("Download complete", "Verifying Checksum", "Pull complete", "Extracting")
_PRESENT = "Already exists"


@dataclass(frozen=True)
class PullProgress:
    """Bytes fetched and expected over all layers known so far (the total grows while layers are being found)."""

    done: int
    total: int
    layers_done: int
    layers: int


class PullMeter:
    """Sums the events of one pull."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int]] = {}
        self._unpacked: set[str] = set()
        self._last: PullProgress | None = None

    def feed(self, event: Mapping[str, Any]) -> PullProgress | None:
        """The sum after `event`, or None if it changed nothing."""
        layer, status = event.get("id"), str(event.get("status") or "")
        if not layer or status.startswith("Pulling from"):
            return None
        done, total = self._layers.get(layer, (0, 0))
        detail = event.get("progressDetail") or {}
        if status == "Downloading":
            # A registry that does not tell the size gives no total: what has come is then all that is known.
            done = max(done, int(detail.get("current") or 0))
            total = max(total, int(detail.get("total") or 0), done)
        elif status in _DOWNLOADED:
            total = max(total, int(detail.get("total") or 0)) if status == "Extracting" and not total else total
            done = total
        if status in ("Pull complete", _PRESENT):
            self._unpacked.add(layer)
        self._layers[layer] = (done, total)
        progress = PullProgress(
            done=sum(pair[0] for pair in self._layers.values()),
            total=sum(pair[1] for pair in self._layers.values()),
            layers_done=len(self._unpacked),
            layers=len(self._layers),
        )
        if progress == self._last:
            return None
        self._last = progress
        return progress
