"""The arguments of this wing's commands. Imports none of torch, ray and mlflow: a mistake is answered at once."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import CliPositionalArg, CliToggleFlag

from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.loading import load_config, parse_setting


class TrainArguments(BaseModel):
    """Train one model: prepare the text, run the workers, record everything in MLflow.

    Examples:
      steadymoe train
      steadymoe train micro my.yaml --set optimizer.lr=1e-3 --set parallel.workers=2
      steadymoe train --resume latest --set schedule.steps=2000
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    presets: CliPositionalArg[list[str]] = ["tiny"]
    """Presets by name and YAML files (ending in .yaml), stacked: a later one wins."""
    settings: list[str] = Field(default=[], alias="set")
    """Set any key of the config, for example optimizer.lr=1e-3; the value is YAML; repeatable."""
    resume: str | None = None
    """Continue a run, by its id, its name or latest; only schedule.steps and tracking.* may be set."""
    print_config: CliToggleFlag[bool] = False
    """Print the whole config that the arguments expand to, and stop."""

    def config(self) -> RunConfig:
        """The config that presets, files and settings expand to. A resumed run has its own.

        Raises:
            UserError: something in it is wrong; one line a problem.
        """
        return load_config(self.presets, self.settings)

    @model_validator(mode="after")
    def _resume_keeps_the_config_of_the_run(self) -> Self:
        if self.resume is None:
            return self
        if "presets" in self.model_fields_set:
            raise UserError(
                f"--resume takes the config of the run, so no preset may be given; leave out {self.presets[0]}"
            )
        if self.print_config:
            raise UserError("--print-config shows what presets and --set expand to, so it does not go with --resume")
        for setting in self.settings:
            path, _ = parse_setting(setting)
            if path != ("schedule", "steps") and path[0] != "tracking":
                raise UserError(
                    f"{'.'.join(path)}: cannot change when a run is resumed; only schedule.steps and tracking.* can"
                )
        return self


class DeliverArguments(BaseModel):
    """Send MLflow what it could not take while a run was on: the points of its metrics and how it ended.

    Example:
      steadymoe deliver latest
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: CliPositionalArg[str]
    """The run, by its id, its name or latest."""
