"""One run as a comparison sees it, from what is in its folder: MLflow may not have everything yet."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

import numpy as np

from moe.schedule import Timeline
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.flatten import Scalar, flatten
from pipelines.history import History
from pipelines.loading import load_config
from pipelines.run_folder import RunFolder, RunInfo, read_json
from pipelines.run_lock import is_in_use
from pipelines.spike_event import SpikeEvent, read_events, steps_lost
from pipelines.spike_words import KINDS

State = Literal["finished", "stopped", "running", "diverged"]

DATASET = "dataset"
"""Stands for the keys that say where the text lies: a digest of its content."""

# They name a run, or say where something lies, and change nothing in it.
_NAMES = ("seed", "tracking.")
_PLACES = ("data.corpus.path", "data.corpus.paths")
_DIGITS_OF_A_DIGEST = 8
_END_SHARE = 0.05
# A run has diverged if one of these was not finite when it was last measured: `History.diverged`.
_MEASURED = ("train/loss", "train/grad_norm", "val/loss")


@dataclass(frozen=True)
class ComparedRun:
    """What a run was, and what became of it."""

    folder: RunFolder
    info: RunInfo
    config: RunConfig
    settings: Mapping[str, Scalar]
    """All of its config but seed, names and places, by dotted keys."""
    dataset: str | None
    """Digest of its text; None if the folder does not know it."""
    history: History
    events: tuple[SpikeEvent, ...]
    state: State
    words: str
    """The same for people, with the step and the reason."""

    @property
    def seed(self) -> int:
        """Of its starting weights and of its order of the data."""
        return self.config.seed

    @cached_property
    def timeline(self) -> Timeline:
        """Of its schedule."""
        return Timeline(self.config)

    @property
    def tokens(self) -> int:
        """Training tokens that it has done."""
        return self.timeline.tokens_before(self.history.last_step)

    @property
    def budget(self) -> int:
        """Training tokens of its whole schedule."""
        return self.timeline.tokens_before(self.config.steps)

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Training tokens and finite values of a metric, over its whole course."""
        series = self.history.series.get(metric)
        if series is None:
            return [], []
        return [self.timeline.tokens_before(step) for step in series.steps], series.values

    def at(self, metric: str, tokens: int) -> float | None:
        """A metric after so many tokens, along a line between its neighbours; None where it was not measured on."""
        places, values = self.curve(metric)
        if not places or not places[0] <= tokens <= places[-1]:
            return None
        return float(np.interp(tokens, places, values))

    def measured_at(self, metric: str, tokens: int) -> bool:
        """Whether the metric has a point of its own there."""
        return tokens in self.curve(metric)[0]

    def events_by(self, tokens: int) -> list[SpikeEvent]:
        """Spike events up to so many tokens; of a run that was ended for them all."""
        return [
            event
            for event in self.events
            if event.is_training and (self.state == "diverged" or self.timeline.tokens_before(event.step) <= tokens)
        ]

    def spikes_by(self, tokens: int) -> int:
        """How many they are."""
        return len(self.events_by(tokens))

    def steps_lost_by(self, tokens: int) -> int:
        """Steps that they have cost."""
        return steps_lost(self.events_by(tokens))

    @property
    def untrained_loss(self) -> float | None:
        """Training loss of the first step, in nats per token: what a diverged run is worth (arXiv 2309.14322)."""
        series = self.history.series.get("train/loss")
        return series.values[0] if series is not None and series.values else None

    @property
    def training_seconds(self) -> float | None:
        """What its steps took, without validations and pauses, by the steps whose speed was recorded."""
        series = self.history.series.get("train/tokens_per_second")
        speeds = [speed for speed in series.values if speed > 0] if series is not None else []
        return self.tokens * fmean(1 / speed for speed in speeds) if speeds else None


def read_run(folder: RunFolder) -> ComparedRun:
    """A run from its folder.

    Raises:
        UserError: its config is of another version of this project, or it has not done a step.
    """
    info = folder.info
    try:
        config = load_config([str(folder.config)], [])
    except UserError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"run {info.name}: its config is not one of this version ({first}); leave it out") from error
    history, events = History.read(folder.spool), tuple(read_events(folder.events))
    if history.first_step is None:
        raise UserError(f"run {info.name}: has not done a step yet; leave it out")
    dataset = read_json(folder.dataset).get("digest")
    state, words = _state(folder, config, history, events)
    settings = _settings(config, dataset)
    return ComparedRun(folder, info, config, settings, dataset, history, events, state, words)


def _settings(config: RunConfig, dataset: str | None) -> dict[str, Scalar]:
    settings = {key: value for key, value in flatten(config).items() if not key.startswith(_NAMES)}
    if dataset is not None:
        # The same text may lie somewhere else, and another one in the same place.
        settings = {key: value for key, value in settings.items() if key not in _PLACES}
        settings[DATASET] = dataset[:_DIGITS_OF_A_DIGEST]
    return settings


def _state(folder: RunFolder, config: RunConfig, history: History, events: tuple[SpikeEvent, ...]) -> tuple[State, str]:
    ending = read_json(folder.ending)
    if (reason := _divergence(ending, history, events)) is not None:
        return "diverged", f"diverged: {reason}"
    where = f"step {history.last_step:,} of {config.steps:,}"
    if history.last_step >= config.steps:
        return ("diverged", f"diverged: {reason}") if (reason := _went_up(history)) else ("finished", "finished")
    if not ending and is_in_use(folder):
        return "running", f"running, at {where}"
    return "stopped", f"ended at {where}"


def _divergence(ending: Mapping[str, Any], history: History, events: tuple[SpikeEvent, ...]) -> str | None:
    """Why it counts as diverged, whether it went on or not; None if it does not."""
    aborted = next((event for event in events if event.action == "abort"), None)
    if aborted is not None:
        return f"ended by the stability policy at step {aborted.step:,}: {KINDS[aborted.kind]}"
    if history.diverged:
        lost = [name for name in _MEASURED if math.isnan(history.shown(name) or 0.0)]
        return f"{' and '.join(lost)} not finite at step {history.last_step:,}"
    found = ending.get("tags", {}).get("diverged") == "true" or any(
        name.endswith("/diverged") and value > 0 for name, value in ending.get("metrics", {}).items()
    )
    return f"by its own measures, at step {history.last_step:,}" if found else None


def _went_up(history: History) -> str | None:
    """Whether the loss at the end lies above that before training, in words."""
    losses = history.series["train/loss"].values
    end = fmean(losses[-math.ceil(_END_SHARE * len(losses)) :])
    return f"the training loss is {end:.3f}, and was {losses[0]:.3f} before training" if end > losses[0] else None


def smoothed(values: list[float], share: float) -> list[float]:
    """Mean over the last so large a share of all values, at each of them: nothing is seen before it happens."""
    window = max(1, round(share * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return [float(value) for value in (sums[ends] - sums[starts]) / (ends - starts)]


def thinned(places: list[int], values: list[float], points: int) -> tuple[list[int], list[float]]:
    """At most some ``points`` of a curve: of each stretch the first, and always the last."""
    if len(places) <= points:
        return places, values
    edges = np.linspace(0, len(places) - 1, points).round().astype(int)
    kept = sorted({int(edge) for edge in edges})
    assert all(a < b for a, b in pairwise(kept))
    return [places[i] for i in kept], [values[i] for i in kept]
