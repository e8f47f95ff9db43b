"""The arguments of the commands that look at runs. Imports none of torch, ray and mlflow."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from pydantic_settings import CliPositionalArg, CliToggleFlag

from pipelines.errors import UserError


class RunsArguments(BaseModel):
    """List the runs, the newest first, with what tells a stable one from others.

    Examples:
      steadymoe runs
      steadymoe runs --limit 50 --all
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    limit: PositiveInt = 20
    """So many of them."""
    trials: CliToggleFlag[bool] = Field(default=False, alias="all")
    """Those that a study has made, too."""


class SpikesArguments(BaseModel):
    """List what went wrong in a run: spikes, what was done about them, and what became of it; or show one of them.

    Of one there are the layers, the gradient by groups of parameters, the text of its batch, and a picture of the steps
    around it.

    Examples:
      steadymoe spikes latest
      steadymoe spikes latest 2
      steadymoe spikes tiny-1 loss-000123 --full
      steadymoe spikes latest --json
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: CliPositionalArg[str]
    """The run, by its id, its name or latest."""
    event: CliPositionalArg[list[str]] = []
    """An event, by its number in the list or its id; without one, the list."""
    full: CliToggleFlag[bool] = False
    """Show the whole text of every sample."""
    as_json: CliToggleFlag[bool] = Field(default=False, alias="json")
    """Print all that is recorded as JSON, for scripts."""

    @model_validator(mode="after")
    def _one_event(self) -> Self:
        if len(self.event) > 1:
            raise UserError(f"one event at a time; leave out {' '.join(self.event[1:])}")
        if self.full and not self.event:
            raise UserError("--full shows the text of one event's batch, so it needs an event: its number, or its id")
        if self.full and self.as_json:
            raise UserError("--json prints what is recorded, and the text is not, so --full does not go with it")
        return self
