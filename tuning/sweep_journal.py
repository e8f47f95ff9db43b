"""What a sweep has done so far, in a file that a killed driver leaves whole: trials begun, at rungs, ended.

Imports no torch.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipelines.json_lines import append_json
from tuning.space_config import Values

Phase = Literal["search", "final"]
TrialOutcome = Literal["finished", "pruned", "diverged", "failed"]


@dataclass(frozen=True)
class Begun:
    """A trial was handed out."""

    name: str
    number: int
    """Of its configuration, from 0."""
    seed: int
    values: Values
    phase: Phase
    folder: str
    """Of its run."""


@dataclass(frozen=True)
class Rung:
    """A trial at a rung."""

    name: str
    step: int
    loss: float
    """Validation loss, nats per token; finite."""
    goes_on: bool


@dataclass(frozen=True)
class Exploit:
    """A trial goes on from another's state, with other values."""

    name: str
    donor: str
    step: int
    values: Values


@dataclass(frozen=True)
class Ended:
    """A trial is over."""

    name: str
    outcome: TrialOutcome
    step: int
    seconds: float
    """Of the command that ended it."""
    measures: Mapping[str, float]
    """By `tuning.measure_names`; all finite."""
    reason: str | None = None
    resumed: bool = False
    """Whether an earlier command had begun it: its seconds are not those of all its steps."""


@dataclass(frozen=True)
class Again:
    """A trial that had failed is taken up again."""

    name: str


Line = Begun | Rung | Exploit | Ended | Again
_KINDS: dict[str, type[Line]] = {"begun": Begun, "rung": Rung, "exploit": Exploit, "ended": Ended, "again": Again}
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True)
class TrialState:
    """All that is known of a trial."""

    begun: Begun
    rungs: tuple[Rung, ...] = ()
    exploits: tuple[Exploit, ...] = ()
    ended: Ended | None = None

    @property
    def values(self) -> Values:
        """Its point of the space; with population based training, the last one."""
        return self.exploits[-1].values if self.exploits else self.begun.values

    @property
    def step(self) -> int:
        """The last step that is known of it."""
        return self.ended.step if self.ended else self.rungs[-1].step if self.rungs else 0


@dataclass
class SweepJournal:
    """The file, and what it says."""

    path: Path
    trials: dict[str, TrialState] = field(default_factory=dict)
    """By name, as they were begun."""
    rungs: list[Rung] = field(default_factory=list)
    """Of all trials, as they came to them."""

    @classmethod
    def read(cls, path: Path) -> "SweepJournal":
        """That of a sweep, or a new one. A line that a kill cut short is left out."""
        journal = cls(path)
        for line in _lines(path):
            journal._take(line)
        return journal

    def add(self, line: Line) -> None:
        """Write something down."""
        append_json(self.path, {"is": _NAMES[type(line)], **asdict(line)})
        self._take(line)

    def _take(self, line: Line) -> None:
        match line:
            case Begun(name=name):
                # Another mapping: whoever shows the sweep goes through the old one meanwhile, in a thread of its own.
                self.trials = {**self.trials, name: TrialState(line)}
            case Rung(name=name):
                known = self.trials[name]
                # Once a rung: a trial that is begun again from an earlier checkpoint passes it a second time.
                if all(rung.step != line.step for rung in known.rungs):
                    self.trials[name] = replace(known, rungs=(*known.rungs, line))
                    self.rungs.append(line)
            case Exploit(name=name):
                known = self.trials[name]
                self.trials[name] = replace(known, exploits=(*known.exploits, line))
            case Ended(name=name):
                self.trials[name] = replace(self.trials[name], ended=line)
            case Again(name=name):
                self.trials[name] = replace(self.trials[name], ended=None)


def _lines(path: Path) -> Iterator[Line]:
    try:
        # Bytes: a kill may cut a character in two, and text has line ends of which JSON knows nothing.
        texts = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for text in texts:
        try:
            content = json.loads(text)
        except ValueError:
            continue
        yield _KINDS[content.pop("is")](**content)
