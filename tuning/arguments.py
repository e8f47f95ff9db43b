"""The arguments of this wing's commands. Imports none of torch, ray and mlflow: a mistake is answered at once."""

from typing import Annotated, Any, Self

from pydantic import (
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_settings import CliPositionalArg, CliToggleFlag

from pipelines.errors import UserError

# Infinitely many are no budget; a command without the option has the file's own.
Minutes = Annotated[PositiveFloat, AllowInfNan(False)]


class StudyArguments(BaseModel):
    """Run the arms of a claim over paired seeds, and say what came out: a table, a verdict per claim, a picture.

    A block is one seed through every arm. Blocks are run, as many trials at a time as the cluster holds, until the
    budget has no room for another one. Everything is in MLflow, under one parent run.

    Examples:
      steadymoe study
      steadymoe study balance
      steadymoe study clip --budget-minutes 20 --findings docs/findings.md
      steadymoe study my_study.yaml --blocks 3 --set schedule.steps=200
      steadymoe study --resume balance-1
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    study: CliPositionalArg[list[str]] = []
    """A study by name, or a YAML file (ending in .yaml); without one, a list of the studies that there are."""
    settings: list[str] = Field(default=[], alias="set")
    """Set any key of all runs' configs, under what the arms set; the value is YAML; repeatable."""
    budget_minutes: Minutes | None = None
    """No block is begun that would not end within so many minutes, except the first; otherwise the study's own."""
    blocks: PositiveInt | None = None
    """At most so many blocks, each with a seed of its own; otherwise the study's own."""
    resume: str | None = None
    """Go on with a study, by its id, its name or latest: no finished trial is run again."""
    findings: str | None = None
    """A Markdown file in which the study's section is written, or written anew; the picture goes beside it."""
    print_config: CliToggleFlag[bool] = False
    """Print the whole study, and stop."""

    @property
    def changed(self) -> dict[str, float | int]:
        """Keys of the study that the user has given in place of its own."""
        given = {"budget_minutes": self.budget_minutes, "blocks": self.blocks}
        return {key: value for key, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _one_study(self) -> Self:
        _refuse_several("study", self.study)
        if self.resume is not None:
            _refuse_beside_resume("study", self.study, self.print_config, self.settings)
        elif not self.study and self.model_fields_set - {"study"}:
            raise UserError("no study given; name one, for example: steadymoe study balance")
        return self


class SweepArguments(BaseModel):
    """Search a space of any config keys for what keeps training stable at the least loss, with Ray Tune.

    A configuration is a point of the space; a trial is one with a seed, and a training run like any other. Everything
    is in MLflow, under one parent run. The best configuration ends up in best.yaml, ready to be trained.

    Examples:
      steadymoe sweep
      steadymoe sweep stability
      steadymoe sweep lr-sensitivity --set schedule.steps=500 --budget-minutes 30
      steadymoe sweep my_sweep.yaml --trials 40
      steadymoe sweep --resume stability-1
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sweep: CliPositionalArg[list[str]] = []
    """A sweep by name, or a YAML file (ending in .yaml); without one, a list of the sweeps that there are."""
    settings: list[str] = Field(default=[], alias="set")
    """Set any key of all runs' configs, under what the space sets; the value is YAML; repeatable."""
    trials: PositiveInt | None = None
    """At most so many trials in the search; otherwise the sweep's own budget."""
    budget_minutes: Minutes | None = None
    """No trial is begun that would not end within so many minutes; otherwise the sweep's own budget."""
    resume: str | None = None
    """Go on with a sweep, by its id, its name or latest: no finished trial is run again."""
    nested: CliToggleFlag[bool] = False
    """Make each trial a Ray Train run of its own, for long ones; some ten seconds each."""
    print_config: CliToggleFlag[bool] = False
    """Print the whole sweep, and stop."""

    @property
    def changed(self) -> dict[str, Any]:
        """Keys of the sweep that the user has given in place of its own."""
        given = {"minutes": self.budget_minutes, "trials": self.trials}
        budget = {key: value for key, value in given.items() if value is not None}
        return {**({"budget": budget} if budget else {}), **({"nested": True} if self.nested else {})}

    @model_validator(mode="after")
    def _one_sweep(self) -> Self:
        _refuse_several("sweep", self.sweep)
        if self.resume is not None:
            _refuse_beside_resume("sweep", self.sweep, self.print_config, self.settings)
            if self.nested:
                raise UserError("--nested: a sweep that goes on keeps the kind of its trials; leave it out")
        elif not self.sweep and self.model_fields_set - {"sweep"}:
            raise UserError("no sweep given; name one, for example: steadymoe sweep stability")
        return self


def _refuse_several(what: str, names: list[str]) -> None:
    if len(names) > 1:
        raise UserError(f"one {what} at a time; leave out {' '.join(names[1:])}")


def _refuse_beside_resume(what: str, names: list[str], print_config: bool, settings: list[str]) -> None:
    if names:
        raise UserError(f"--resume takes the {what} as it was begun, so no name may be given; leave out {names[0]}")
    if print_config:
        raise UserError(f"--print-config shows what a {what} expands to, so it does not go with --resume")
    if any(setting.partition("=")[0].strip() != "tracking.uri" for setting in settings):
        raise UserError(
            f"--set: a {what} that goes on keeps its config, but for tracking.uri; start a new one for another"
        )


class CompareArguments(BaseModel):
    """Compare runs: which settings tell them apart, what those did, and which differences are beyond the seeds' noise.

    Runs that differ in nothing but their seeds are one configuration. The report is a page with pictures that opens
    without a network, kept under STEADYMOE_HOME and in MLflow: losses with their spikes, the final loss over each key,
    parallel coordinates, importance of the keys, MaxVio by layer, loss against stability, and what is not comparable.

    Examples:
      steadymoe compare tiny-1 tiny-2
      steadymoe compare base-s0 base-s1 clip-s0 clip-s1 --out clip.html
      steadymoe compare --sweep latest
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    runs: CliPositionalArg[list[str]] = []
    """The runs, at least two, each by its id, its name or latest."""
    sweep: str | None = None
    """Instead of runs the trials of a sweep, by its id, its name or latest; the report becomes the sweep's own."""
    out: str | None = None
    """Write the page into this file, too."""

    @model_validator(mode="after")
    def _two_runs(self) -> Self:
        if self.sweep is not None and self.runs:
            raise UserError(f"--sweep compares the trials of a sweep; leave out {' '.join(self.runs)}")
        if self.sweep is None and len(self.runs) < 2:
            alone = f"not {self.runs[0]} alone" if self.runs else "or a sweep: steadymoe compare --sweep latest"
            raise UserError(f"a comparison takes at least two runs, {alone}")
        return self


class ReplayArguments(BaseModel):
    """Run a spike again, from a checkpoint before it, under treatments side by side: which avoid it, at what cost?

    The first treatment changes nothing, and must be what the run did, bit for bit; if it is not, the command says what
    is known to be different. Others: skip-samples, tight-clip, zclip, swiglu-clamp, anticipate, half-lr, fresh-moments,
    fp32. Everything is in MLflow, under one parent run: the trials, a table and a picture.

    Examples:
      steadymoe replay latest 1
      steadymoe replay tiny-1 loss-000123 --with half-lr --with tight-clip --after 50
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: CliPositionalArg[str]
    """The run, by its id, its name or latest."""
    event: CliPositionalArg[str]
    """The event, by its number in the list of `steadymoe spikes RUN` or its id."""
    treatments: list[str] = Field(default=[], alias="with")
    """A treatment beside that which changes nothing; repeatable; without it, all that can act here."""
    after: NonNegativeInt = 20
    """So many steps beyond the event are run."""
    settings: list[str] = Field(default=[], alias="set")
    """Set a key of the run's config for all treatments; the value is YAML; repeatable."""
