"""How training ended, as the workers tell the driver."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["finished", "stopped", "diverged", "refused", "failed"]
"""``refused``: what the user gave cannot be used; ``failed``: workers failed for good."""


@dataclass(frozen=True)
class Ending:
    """How a run's loop ended; the same on every rank."""

    outcome: Outcome
    step: int
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Inverse of ``Ending(**content)``."""
        return asdict(self)
