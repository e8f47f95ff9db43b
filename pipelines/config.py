"""RunConfig: the whole config tree of a training run. Imports pydantic and nothing heavier."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from moe.config.base import Config
from moe.config.trainer import BatchConfig, TrainerConfig


class StdlibCorpusConfig(Config):
    """The Python standard library's sources of the running interpreter: real text that needs no download."""

    kind: Literal["stdlib"] = "stdlib"
    include_tests: bool = True
    """Whether the library's own test suite (more than half of the bytes where it is installed) belongs to it."""


class FilesCorpusConfig(Config):
    """Text files; each file is a document."""

    kind: Literal["files"] = "files"
    paths: list[str] = Field(min_length=1)
    """Files, folders (searched through) or glob patterns."""


CorpusConfig = Annotated[StdlibCorpusConfig | FilesCorpusConfig, Field(discriminator="kind")]


class DataConfig(BatchConfig):
    """What text is read, how it becomes tokens, and how much of it at a time."""

    corpus: CorpusConfig = StdlibCorpusConfig()
    tokenizer: str = "byte"
    """``byte``, or the path of a Hugging Face ``tokenizers`` JSON file."""
    document_token: str | None = None
    """The tokenizer's token that separates documents; null finds the usual ones (byte has its own)."""


class ValidationConfig(Config):
    """Loss and load balance on documents that training never reads."""

    every_steps: PositiveInt = 100
    """Optimizer steps between validations; the last step is always validated."""
    max_tokens: PositiveInt = 262_144
    """At most this many held-out tokens are read, in windows spread evenly over the held-out part."""


class CheckpointConfig(Config):
    """Saved state of training, under the run's folder."""

    every_steps: NonNegativeInt = 200
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    keep: PositiveInt = 3
    """The newest so many are kept."""


class TrackingConfig(Config):
    """Where MLflow records the run."""

    uri: str | None = None
    """MLflow tracking URI; null takes MLFLOW_TRACKING_URI or else the SQLite database under STEADYMOE_HOME."""
    experiment: str = "steadymoe"
    run_name: str | None = None
    """Name of the run; null makes one from the preset's name."""
    every_steps: PositiveInt = 1
    """Optimizer steps between recorded points."""
    per_layer: bool = False
    """Record routing detail of every layer as well."""


class RunConfig(TrainerConfig):
    """One training run."""

    data: DataConfig = DataConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _validation_has_a_sequence_for_every_worker(self) -> "RunConfig":
        least = self.data.sequence_length * self.parallel.workers
        if self.validation.max_tokens < least:
            raise ValueError(
                f"validation.max_tokens ({self.validation.max_tokens}) is less than one sequence for every worker "
                f"(data.sequence_length x parallel.workers = {least})"
            )
        return self
