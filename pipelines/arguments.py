"""The arguments of this wing's commands. Imports none of torch, ray and mlflow: a mistake is answered at once."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator
from pydantic_settings import CliPositionalArg, CliToggleFlag

from pipelines.config import FileFormat, FilesCorpusConfig, RunConfig
from pipelines.errors import UserError
from pipelines.loading import load_config, parse_setting
from pipelines.paths import absolute

LEAST_VOCABULARY = 257
"""Of a byte-level BPE: every byte, and the token that ends a document."""


class TrainArguments(BaseModel):
    """Train one model: prepare the text, run the workers, record everything in MLflow.

    Examples:
      steadymoe train
      steadymoe train micro my.yaml --set optimizer.lr=1e-3 --set parallel.workers=2
      steadymoe train --resume latest --set schedule.steps=2000
      steadymoe train tiny --init-from weights --set optimizer.lr=1e-3
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    presets: CliPositionalArg[list[str]] = ["tiny"]
    """Presets by name and YAML files (ending in .yaml), stacked: a later one wins."""
    settings: list[str] = Field(default=[], alias="set")
    """Set any key of the config, for example optimizer.lr=1e-3; the value is YAML; repeatable."""
    resume: str | None = None
    """Continue a run, by its id, its name or latest; only schedule.steps and tracking.* may be set."""
    init_from: str | None = None
    """Start from the weights in a Hugging Face folder (safetensors, model_type deepseek_v3), with a new optimizer. The
    model's shape is the folder's: presets give way to it, and model keys in files and --set must agree with it."""
    print_config: CliToggleFlag[bool] = False
    """Print the whole config that the arguments expand to, and stop."""

    def config(self) -> RunConfig:
        """The config that presets, files and settings expand to. A resumed run has its own.

        Raises:
            UserError: something in it is wrong; one line a problem.
        """
        return load_config(self.presets, self.settings, self.weights)

    @property
    def weights(self) -> Path | None:
        """Folder of the weights to start from."""
        return Path(self.init_from).expanduser().absolute() if self.init_from is not None else None

    @model_validator(mode="after")
    def _resume_keeps_the_config_of_the_run(self) -> Self:
        if self.resume is None:
            return self
        if self.init_from is not None:
            raise UserError("--init-from starts a new run, so it does not go with --resume; a run keeps its own")
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
    """The run, study, sweep or replay, by its id, its name or latest."""


class PrepareArguments(BaseModel):
    """Turn text into a folder of token shards to train on: text files, JSON lines, Parquet; in parallel on Ray.

    A text file, a JSON line or a Parquet row is a document. A text file over 1 MiB is divided at line ends, into 256
    documents or more, or by --separator. About one document in 20, chosen by its content, is held out for validation.
    Text and JSON lines may be compressed (.gz, .bz2, .xz, .zst). In folders, hidden files and files without text are
    left out. Less than 64 MiB of text is prepared without Ray, which takes 5 s to start; RAY_ADDRESS names a cluster.

    Examples:
      steadymoe prepare notes/ --out prepared/notes
      steadymoe prepare 'c4/*.json.gz' --out prepared/c4 --train-tokenizer 8192
      steadymoe prepare wiki.parquet --field content --out prepared/wiki --tokenizer tokenizer.json
      steadymoe prepare stories.txt --separator '<|endoftext|>' --out prepared/stories
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    inputs: CliPositionalArg[list[str]]
    """Files, folders (searched through) and quoted glob patterns."""
    out: str
    """The new folder; it must be empty or not there yet."""
    format: FileFormat = "auto"
    """What the files hold; auto goes by their names."""
    field: str | None = None
    """The field of a JSON line, or the column of a Parquet file, that holds the document; text if not given."""
    separator: str | None = None
    """Divides text files into documents; \\n stands for a line end and \\t for a tab."""
    tokenizer: str | None = None
    """A Hugging Face tokenizers JSON file. Without this and --train-tokenizer a token is a byte."""
    document_token: str | None = None
    """The token of --tokenizer that ends a document; the usual ones are found."""
    train_tokenizer: int | None = None
    """Train a byte-level BPE with so many tokens on the documents that are not held out."""
    tasks: int | None = None
    """Work on Ray, with so many tasks at a time; without it, with one for every CPU."""

    def source(self) -> FilesCorpusConfig:
        """The corpus, by absolute paths."""
        separator = None
        if self.separator is not None:
            separator = self.separator.replace("\\n", "\n").replace("\\t", "\t")
        paths = [absolute(path) for path in self.inputs]
        return FilesCorpusConfig(paths=paths, format=self.format, field=self.field or "text", separator=separator)

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if not self.inputs:
            raise UserError("no INPUT given; name files, folders or patterns")
        if self.tokenizer is not None and self.train_tokenizer is not None:
            raise UserError("--tokenizer and --train-tokenizer: give one of them, or none for bytes")
        if self.document_token is not None and self.tokenizer is None:
            raise UserError("--document-token names a token of --tokenizer, which is not given")
        if self.train_tokenizer is not None and self.train_tokenizer < LEAST_VOCABULARY:
            raise UserError(
                f"--train-tokenizer {self.train_tokenizer}: should be {LEAST_VOCABULARY} at least (256 bytes and the "
                "document token), for example 8192"
            )
        if self.tasks is not None and self.tasks < 1:
            raise UserError(f"--tasks {self.tasks}: should be 1 at least")
        if self.separator is not None and self.format in ("jsonl", "parquet"):
            raise UserError(f"--separator divides text files, so it does not go with --format {self.format}")
        if self.separator == "":
            raise UserError("--separator: should not be empty")
        if self.field is not None and self.format == "text":
            raise UserError("--field names a place in JSON lines or Parquet, so it does not go with --format text")
        return self


class ExportArguments(BaseModel):
    """Write a run's model as a Hugging Face folder, which transformers loads without any code of this project.

    Example:
      steadymoe export latest --to weights --dtype bf16
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: CliPositionalArg[str]
    """The run, by its id, its name or latest."""
    to: str
    """The folder to write; it must not exist yet, or be empty."""
    step: NonNegativeInt | None = None
    """The checkpoint after so many steps; without it the newest valid one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the weights; expert biases stay fp32."""
