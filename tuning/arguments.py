"""The arguments of this wing's commands. Imports none of torch, ray and mlflow: a mistake is answered at once."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import CliPositionalArg, CliToggleFlag

from pipelines.errors import UserError


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
    budget_minutes: PositiveFloat | None = None
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
        if len(self.study) > 1:
            raise UserError(f"one study at a time; leave out {' '.join(self.study[1:])}")
        if self.resume is not None:
            if self.study:
                raise UserError(
                    f"--resume takes the study as it was begun, so no name may be given; leave out {self.study[0]}"
                )
            if self.print_config:
                raise UserError("--print-config shows what a study expands to, so it does not go with --resume")
            if self.settings:
                raise UserError("--set: a study that goes on keeps its config; start a new one for another")
        elif not self.study and self.model_fields_set - {"study"}:
            raise UserError("no study given; name one, for example: steadymoe study balance")
        return self


class CompareArguments(BaseModel):
    """Compare runs: which settings tell them apart, what those did, and which differences are beyond the seeds' noise.

    Runs that differ in nothing but their seeds are one configuration. The report is a page with pictures that opens
    without a network, kept under STEADYMOE_HOME and in MLflow: losses with their spikes, the final loss over each key,
    parallel coordinates, importance of the keys, MaxVio by layer, loss against stability, and what is not comparable.

    Examples:
      steadymoe compare tiny-1 tiny-2
      steadymoe compare base-s0 base-s1 clip-s0 clip-s1 --out clip.html
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    runs: CliPositionalArg[list[str]]
    """The runs, at least two, each by its id, its name or latest."""
    out: str | None = None
    """Write the page into this file, too."""

    @model_validator(mode="after")
    def _two_runs(self) -> Self:
        if len(self.runs) < 2:
            raise UserError(f"a comparison takes at least two runs, not {self.runs[0]} alone")
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
