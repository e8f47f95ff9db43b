"""The comparison of runs: which configurations there are, what each came to, and which differences are beyond noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Literal

from pipelines.errors import UserError
from pipelines.flatten import Scalar
from pipelines.run_folder import RunFolder
from tuning.comparison.keys import short_names, shown, varying_keys
from tuning.comparison.runs import ComparedRun, read_run
from tuning.statistics import Interval, interval

LEAST_SEEDS = 2
"""Of a difference, before anything can be said of its noise."""


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but their seeds."""

    number: int
    """Its rank, from 1: by the mean validation loss; those with diverged runs after those without."""
    values: Mapping[str, Scalar]
    """Of the keys that vary; a key that its config does not have is missing."""
    name: str
    """Its rank and its values, in short."""
    runs: tuple[ComparedRun, ...]
    losses: Mapping[int, float]
    """Validation loss in nats per token by seed, of the runs that finished; matched by tokens."""
    max_vios: Mapping[int, float]
    """MaxVio over the validation set by seed, of the same runs."""

    @property
    def seeds(self) -> list[int]:
        """Rising; of all runs."""
        return sorted({run.seed for run in self.runs})

    @property
    def diverged(self) -> int:
        """Runs that did."""
        return sum(run.state == "diverged" for run in self.runs)

    @property
    def loss(self) -> Interval | None:
        """Over the seeds that finished; None if none did."""
        return interval(list(self.losses.values())) if self.losses else None

    @property
    def max_vio(self) -> Interval | None:
        """Over the seeds that finished; None without experts, or if none did."""
        return interval(list(self.max_vios.values())) if self.max_vios else None

    @property
    def training_seconds(self) -> float | None:
        """The mean over the runs that finished; None if none did."""
        found = [run.training_seconds for run in self.runs if run.state == "finished"]
        return fmean(seconds for seconds in found if seconds is not None) if any(found) else None


Verdict = Literal["reference", "better", "within noise", "worse", "cannot tell", "no loss"]


@dataclass(frozen=True)
class Difference:
    """How a configuration's loss lies to that of the one that all are compared with."""

    verdict: Verdict
    words: str
    paired: Interval | None = None
    """Over the seeds that both have; None if they are too few."""


@dataclass(frozen=True)
class Comparison:
    """All of it."""

    title: str
    runs: tuple[ComparedRun, ...]
    configurations: tuple[Configuration, ...]
    """In the order of their ranks."""
    keys: tuple[str, ...]
    """Those that vary."""
    tokens: int
    """Training tokens at which losses and MaxVio are compared: as many as all finished runs have validated after."""
    reference: Configuration | None
    """The one that all are compared with; None if no run has finished."""

    @cached_property
    def number_of(self) -> dict[str, int]:
        """Rank of the configuration of each run, by the run's id."""
        return {run.info.id: each.number for each in self.configurations for run in each.runs}

    @cached_property
    def short(self) -> dict[str, str]:
        """Short names of the keys that vary."""
        return short_names(self.keys)

    @property
    def finished(self) -> list[ComparedRun]:
        """The runs that did."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def diverged(self) -> list[ComparedRun]:
        """The runs that did."""
        return [run for run in self.runs if run.state == "diverged"]

    @property
    def cut_short(self) -> list[ComparedRun]:
        """The runs that neither finished nor diverged."""
        return [run for run in self.runs if run.state in ("stopped", "running")]

    def loss(self, run: ComparedRun) -> float | None:
        """Validation loss of a finished run in nats per token, matched by tokens; None of any other."""
        return run.at("val/loss", self.tokens) if run.state == "finished" else None

    def max_vio(self, run: ComparedRun) -> float | None:
        """MaxVio of a finished run over the validation set, matched by tokens; None of any other, and of no experts."""
        return run.at("moe/max_vio_global", self.tokens) if run.state == "finished" else None

    @property
    def last_loss(self) -> float:
        """What a diverged run counts where a number is needed: no less than any finished one, nor than no training."""
        known = [self.loss(run) for run in self.runs] + [run.untrained_loss for run in self.diverged]
        return max((loss for loss in known if loss is not None), default=0.0)

    def difference(self, configuration: Configuration) -> Difference:
        """Of its losses to those of the reference, paired by seed."""
        reference = self.reference
        if reference is None or not configuration.losses:
            lost = configuration.diverged
            finished = any(run.state == "finished" for run in configuration.runs)
            otherwise = "not validated by then" if finished else "not trained to the end"
            words = f"{lost} of {len(configuration.runs)} diverged" if lost else otherwise
            return Difference("no loss", words)
        if configuration is reference:
            return Difference("reference", "the reference")
        common = sorted(configuration.losses.keys() & reference.losses.keys())
        if len(common) < LEAST_SEEDS:
            has = "one seed" if len(common) == 1 else "no seed"
            mean = fmean(configuration.losses.values()) - fmean(reference.losses.values())
            return Difference("cannot tell", f"{mean:+.4f}, {has} in common: cannot tell")
        paired = interval([configuration.losses[seed] - reference.losses[seed] for seed in common])
        verdict: Verdict = (
            "within noise" if paired.low <= 0 <= paired.high else "better" if paired.mean < 0 else "worse"
        )
        figures = f"{paired.mean:+.4f} ± {(paired.high - paired.low) / 2:.4f}, {len(common)} seeds"
        return Difference(verdict, f"{figures}: {verdict}", paired)


def compare_runs(folders: Sequence[RunFolder], title: str, reference: RunFolder | None = None) -> Comparison:
    """Compare runs by what is in their folders.

    Args:
        folders: at least two runs, in any order; one that is named twice counts once.
        title: in words.
        reference: a run of the configuration that all others are compared with; without it, or if none of its runs has
            finished, that of the least mean loss among those with the most seeds, because the least of many single runs
            is luck in part.

    Raises:
        UserError: there are too few, or one cannot be read.
    """
    unique = list({folder.path: folder for folder in folders}.values())
    if len(unique) < 2:
        raise UserError("a comparison takes at least two runs; name others, as `steadymoe runs` lists them")
    runs = tuple(read_run(folder) for folder in unique)
    keys = tuple(varying_keys([run.settings for run in runs]))
    tokens = matched_tokens(runs)
    configurations = tuple(_ranked(_grouped(runs, keys, tokens), keys))
    wanted = reference.path if reference is not None else None
    named = [each for each in configurations if each.losses and any(run.folder.path == wanted for run in each.runs)]
    chosen = named[0] if named else _best(configurations)
    return Comparison(title, runs, configurations, keys, tokens, chosen)


def matched_tokens(runs: Sequence[ComparedRun]) -> int:
    """The most training tokens after which every finished run has validated (if none has finished, any run)."""
    finished = [run for run in runs if run.state == "finished"]
    ends = [places[-1] for run in finished or runs if (places := run.curve("val/loss")[0])]
    if not ends:
        return max(run.tokens for run in runs)
    return min(ends) if finished else max(ends)


def _grouped(runs: Sequence[ComparedRun], keys: Sequence[str], tokens: int) -> list[Configuration]:
    groups: dict[tuple[tuple[str, Scalar], ...], list[ComparedRun]] = {}
    for run in runs:
        # All settings and not the keys alone: those that say the same as another one are not among these.
        groups.setdefault(tuple(run.settings.items()), []).append(run)
    found = []
    for group in groups.values():
        values = {key: group[0].settings[key] for key in keys if key in group[0].settings}
        finished = [run for run in group if run.state == "finished"]
        losses = by_seed(finished, lambda run: run.at("val/loss", tokens))
        max_vios = by_seed(finished, lambda run: run.at("moe/max_vio_global", tokens))
        ordered = tuple(sorted(group, key=lambda run: (run.seed, run.info.created)))
        found.append(Configuration(0, values, "", ordered, losses, max_vios))
    return found


def by_seed(runs: Sequence[ComparedRun], measure: Callable[[ComparedRun], float | None]) -> dict[int, float]:
    """Means over runs of the same seed, rising by seed; a run without the measure is left out."""
    found: dict[int, list[float]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if (value := measure(run)) is not None:
            found.setdefault(run.seed, []).append(value)
    return {seed: fmean(values) for seed, values in found.items()}


def _ranked(configurations: Sequence[Configuration], keys: Sequence[str]) -> list[Configuration]:
    """Those that finished, those of which some runs diverged, those that were not trained to the end, the diverged."""

    def rank(each: Configuration) -> tuple[int, float, float]:
        share = each.diverged / len(each.runs)
        if each.losses:
            return (1 if share else 0, share, fmean(each.losses.values()))
        lasts = [loss for run in each.runs if (loss := run.history.last("val/loss")) is not None]
        return (3 if share else 2, share, fmean(lasts) if lasts else math.inf)

    short = short_names(keys)
    ranked = []
    for number, each in enumerate(sorted(configurations, key=rank), 1):
        words = ", ".join(f"{short[key]} {shown(value)}" for key, value in each.values.items())
        name = f"#{number} {words}" if words else f"#{number}"
        ranked.append(Configuration(number, each.values, name, each.runs, each.losses, each.max_vios))
    return ranked


def _best(configurations: Sequence[Configuration]) -> Configuration | None:
    """The first of those with the most seeds, in the best class that there is: see `_ranked`."""
    with_losses = [each for each in configurations if each.losses]
    calm = [each for each in with_losses if not each.diverged] or with_losses
    most = max((len(each.losses) for each in calm), default=0)
    return next((each for each in calm if len(each.losses) == most), None)
