"""The arguments of this wing's commands. Imports none of torch, ray and mlflow: a mistake is answered at once."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import CliToggleFlag

from pipelines.errors import UserError

Port = Annotated[int, Field(ge=0, le=65535)]


class UpArguments(BaseModel):
    """Start a Ray head and an MLflow server on this machine, for it alone; what runs already is left as it is.

    Examples:
      steadymoe up
      steadymoe up --dashboard-port 0 --mlflow-port 0
      eval "$(steadymoe up --exports)"
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dashboard_port: Port = 8265
    """Where Ray's dashboard listens, which takes jobs as well; 0 takes any free port."""
    mlflow_port: Port = 5000
    """Where the MLflow server listens; 0 takes any free port."""
    exports: CliToggleFlag[bool] = False
    """Print nothing but the lines that let this shell's Ray client, drivers and MLflow find what runs."""

    @property
    def asked_dashboard_port(self) -> int | None:
        """The port that the user named; None for the default."""
        return self.dashboard_port if "dashboard_port" in self.model_fields_set else None

    @property
    def asked_mlflow_port(self) -> int | None:
        """The port that the user named; None for the default."""
        return self.mlflow_port if "mlflow_port" in self.model_fields_set else None


class StatusArguments(BaseModel):
    """Show what `steadymoe up` started, and the jobs on it.

    Example:
      steadymoe status
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DownArguments(BaseModel):
    """End what `steadymoe up` started: the jobs first, which save, then Ray and MLflow.

    While processes use Ray that are no jobs, it names them and ends nothing.

    Example:
      steadymoe down
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SubmitArguments(BaseModel):
    """Run a command as a Ray job, on the head of `steadymoe up` or another, and show its output until it ends.

    The command stands after two dashes; its exit code is that of this command. Ctrl-C offers to stop the job.

    Examples:
      steadymoe submit -- train tiny
      steadymoe submit -- study balance --budget-minutes 30
      steadymoe submit -- replay latest 1
      steadymoe submit --detach -- train micro my.yaml --set optimizer.lr=1e-3
      steadymoe submit --watch raysubmit_3VZcHAk6ztpHSPZJ
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    address: str | None = None
    """Ray's dashboard; otherwise RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the head of `steadymoe up`."""
    detach: CliToggleFlag[bool] = False
    """Return as soon as the job is submitted."""
    watch: str | None = None
    """Submit nothing, but show this job from its beginning until it ends."""

    @model_validator(mode="after")
    def _watching_is_not_detaching(self) -> "SubmitArguments":
        if self.watch and self.detach:
            raise UserError("--watch and --detach exclude each other")
        return self
