"""RunConfig: the whole config tree of a training run. Imports pydantic and nothing heavier."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from moe.config.base import Config
from moe.config.trainer import BatchConfig, TrainerConfig
from pipelines.fault_config import FaultConfig, fault_problem
from pipelines.response_config import LadderResponseConfig, ResponseConfig, response_problem


class StdlibCorpusConfig(Config):
    """The Python standard library's sources of the running interpreter: real text that needs no download."""

    kind: Literal["stdlib"] = "stdlib"
    include_tests: bool = True
    """Whether the library's own test suite (more than half of the bytes where it is installed) belongs to it."""


FileFormat = Literal["auto", "text", "jsonl", "parquet"]


class FilesCorpusConfig(Config):
    """Text files (each is a document), JSON lines (each line is one) and Parquet (each row is one).

    A text file over 1 MiB is divided at line ends into at least some 256 documents, none of them much over 1 MiB.
    Text and JSON lines may be compressed (.gz, .bz2, .xz, .zst).
    """

    kind: Literal["files"] = "files"
    paths: list[str] = Field(min_length=1)
    """Files, folders (searched through) or glob patterns; relative ones start at the working directory."""
    format: FileFormat = "auto"
    """What the files hold; ``auto`` goes by their names (.jsonl, .ndjson, .json with a record in its first line,
    .parquet, .pq; all others are text)."""
    field: str = "text"
    """The field of a JSON line, or the column of a Parquet file, that holds the document."""
    separator: str | None = Field(default=None, min_length=1)
    """Text files hold many documents, divided by this text, for example ``<|endoftext|>`` or two line ends."""

    @model_validator(mode="after")
    def _every_option_has_something_to_act_on(self) -> Self:
        if self.separator is not None and self.format in ("jsonl", "parquet"):
            raise ValueError(f"separator divides text files, so it does not go with format: {self.format}")
        if self.field != "text" and self.format == "text":
            raise ValueError("field names a place in JSON lines or Parquet, so it does not go with format: text")
        return self


class PreparedCorpusConfig(Config):
    """A folder that ``steadymoe prepare`` wrote; it has its own tokenizer."""

    kind: Literal["prepared"] = "prepared"
    path: str
    """The folder; a relative one starts at the working directory (of a submitted job: its copy of the project)."""
    verify: bool = True
    """Whether a run first checks every file's checksum (about 1 s per GB); sizes are checked in any case."""


SourceConfig = Annotated[StdlibCorpusConfig | FilesCorpusConfig, Field(discriminator="kind")]
CorpusConfig = Annotated[StdlibCorpusConfig | FilesCorpusConfig | PreparedCorpusConfig, Field(discriminator="kind")]


class DataConfig(BatchConfig):
    """What text is read, how it becomes tokens, and how much of it at a time."""

    corpus: CorpusConfig = StdlibCorpusConfig()
    tokenizer: str | None = "byte"
    """``byte``, or the path of a Hugging Face ``tokenizers`` JSON file; null (a prepared corpus's own) is the default
    for a prepared corpus, and only there."""
    document_token: str | None = None
    """The tokenizer's token that separates documents; null finds the usual ones (byte has its own)."""
    intra_document_masking: bool = False
    """Tokens attend within their own document only (arXiv 2402.13991), the token that ends it included. The loss counts
    the same tokens either way, so that runs compare and the first token of a document, which follows from nothing, is
    still learnt: generation begins with it."""

    domains: list[Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]] = Field(default=[])
    """Classes of documents, each with an expert bias of its own (``model.moe.bias_domains``): patterns of the names of
    class 1, of class 2 and so on, as ``[["test/*", "*/tests/*"]]``; ``*`` stands for any text, ``/`` included. The
    first class that matches counts; documents that match none are class 0. Names are paths within the corpus (those in
    spike events), for lines and rows with their number."""

    @model_validator(mode="before")
    @classmethod
    def _prepared_corpus_has_its_tokenizer(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "tokenizer" in values:
            return values
        corpus = values.get("corpus")
        kind = corpus.get("kind") if isinstance(corpus, dict) else getattr(corpus, "kind", None)
        return {**values, "tokenizer": None} if kind == "prepared" else values

    @model_validator(mode="after")
    def _text_needs_a_tokenizer(self) -> Self:
        if self.tokenizer is None and self.corpus.kind != "prepared":
            raise ValueError(
                "tokenizer: should be byte or the path of a tokenizers JSON file, for this text is not prepared"
            )
        return self


class ValidationConfig(Config):
    """Loss and load balance on documents that training never reads."""

    every_steps: PositiveInt = 100
    """Optimizer steps between validations; the last step is always validated."""
    at_steps: list[PositiveInt] = Field(default=[])
    """Further optimizer steps after which there is one: a sweep's rungs, for instance."""
    max_tokens: PositiveInt = 262_144
    """At most this many held-out tokens are read, in windows spread evenly over the held-out part."""
    per_token: bool = False
    """Whether the end of training leaves ``tokens.npz`` in the run's folder: of every token that is read its id, the
    loss of predicting the next one (nats) and the real experts that it passes, over all MoE layers."""


class CheckpointConfig(Config):
    """Saved state of training, under the run's folder."""

    every_steps: NonNegativeInt = 200
    """Optimizer steps between checkpoints; 0 saves none on the way."""
    at_end: bool = True
    """Whether the end of training is saved; studies of many short runs go without. A run that is asked to stop saves in
    any case."""
    keep: PositiveInt = 3
    """The newest so many are kept, and the newest good one with them."""
    confirm_steps: PositiveInt = 50
    """A checkpoint is good after so many further steps without an event: a spike may be in it already."""


class RecoveryConfig(Config):
    """What follows the death of a worker, or its silence."""

    max_restarts: NonNegativeInt = 10
    """The workers start again from the newest checkpoint at most so often in one command."""
    stall_timeout_s: Annotated[int, Field(ge=5)] = 300
    """Seconds that a worker waits for another before all start again. Longer than anything that one does while the
    others wait, above all reading and writing a checkpoint."""


class TrackingConfig(Config):
    """Where MLflow records the run."""

    uri: str | None = None
    """MLflow tracking URI; null takes MLFLOW_TRACKING_URI or else the SQLite database under STEADYMOE_HOME."""
    experiment: str = Field(default="steadymoe", min_length=1)
    run_name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the run; null makes one from the preset's name."""
    every_steps: PositiveInt = 1
    """Optimizer steps between recorded points."""
    per_layer: bool = False
    """Record load balance and health figures of every layer as well."""

    @field_validator("uri")
    @classmethod
    def _uri_holds_no_secret(cls, uri: str | None) -> str | None:
        # The config is recorded, in files and in MLflow. To a server a user name alone may be a token.
        secret = r"^https?://[^/]*@|//[^/:]*:[^/]*@"
        if uri is not None and re.search(secret, uri):
            raise ValueError(
                "holds a password, and the config is recorded; leave it out here, and give the whole URI in the "
                "environment as MLFLOW_TRACKING_URI (or the password as MLFLOW_TRACKING_PASSWORD)"
            )
        return uri


class RunConfig(TrainerConfig):
    """One training run."""

    data: DataConfig = DataConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    tracking: TrackingConfig = TrackingConfig()
    response: ResponseConfig = LadderResponseConfig()
    """What is done about spikes."""
    faults: list[FaultConfig] = Field(default=[])
    """What goes wrong on purpose, for studies; one after the other where several hit a step."""

    @model_validator(mode="after")
    def _validation_has_a_sequence_for_every_worker(self) -> "RunConfig":
        least = self.data.sequence_length * self.parallel.workers
        if self.validation.max_tokens < least:
            raise ValueError(
                f"validation.max_tokens ({self.validation.max_tokens}) is less than one sequence for every worker "
                f"(data.sequence_length x parallel.workers = {least})"
            )
        return self

    @model_validator(mode="after")
    def _every_class_of_documents_has_its_bias(self) -> "RunConfig":
        classes, biases = len(self.data.domains) + 1, self.model.moe.bias_domains
        if classes != biases:
            listed = f"data.domains makes {classes} classes of documents" if classes > 1 else "data.domains has none"
            raise ValueError(
                f"model.moe.bias_domains ({biases}) is not the number of classes: {listed} (one per list of patterns, "
                f"and class 0 for all others); set bias_domains to {classes}"
                + (f", or give {biases - 1} list(s) of patterns" if biases > 1 else "")
            )
        return self

    @model_validator(mode="after")
    def _response_can_work(self) -> "RunConfig":
        if (problem := response_problem(self.response, self.stability.anticipation)) is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _faults_have_an_effect(self) -> "RunConfig":
        for number, fault in enumerate(self.faults):
            problem = fault_problem(fault, self)
            if problem is not None:
                raise ValueError(f"faults.{number}.{problem}")
        return self
