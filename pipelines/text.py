"""The text of a run before it starts: made into token shards, shown to the user, and the config fitted to it."""

from contextlib import ExitStack

from rich.console import Console

from moe.config.model import ModelConfig
from pipelines.byte_progress import ByteProgress
from pipelines.config import DataConfig, RunConfig
from pipelines.data import refuse_short_text
from pipelines.errors import UserError
from pipelines.prepare import absolute_paths, prepare
from pipelines.shards import Manifest, Shards
from pipelines.tracking import DatasetInfo


def prepare_shown(data: DataConfig, console: Console) -> Shards:
    """The token shards; a corpus that is not known yet is made into them with its progress shown."""
    with ExitStack() as stack:
        shown: list[ByteProgress] = []

        def show(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(ByteProgress(console, total)))
                shown[0].phase("preparing text")
            shown[0].update(done, total)

        shards = prepare(data, show)
    manifest = shards.manifest
    console.print(
        f"text: {manifest.train.documents:,} documents, {manifest.train.tokens / 1e6:.1f} M tokens to train on, "
        f"{manifest.validation.documents:,} and {manifest.validation.tokens / 1e6:.1f} M held out",
        highlight=False,
        soft_wrap=True,
    )
    return shards


def fit_to_text(config: RunConfig, shards: Shards) -> RunConfig:
    """The config with the tokenizer's vocabulary, and with paths that hold in any working directory.

    Raises:
        UserError: the vocabulary is too small for the text, or the text too short for the config.
    """
    model = _fit_vocabulary(config.model, shards.manifest)
    config = config.model_copy(update={"model": model, "data": absolute_paths(config.data)})
    refuse_short_text(config, shards)
    return config


def _fit_vocabulary(model: ModelConfig, manifest: Manifest) -> ModelConfig:
    """The model's config with its vocabulary set to the tokenizer's, or checked against it."""
    needed = manifest.tokenizer.vocab_size
    if model.vocab_size is None:
        return model.model_copy(update={"vocab_size": needed})
    if model.vocab_size < needed:
        raise UserError(
            f"model.vocab_size ({model.vocab_size}) is smaller than the vocabulary of the tokenizer "
            f"{manifest.tokenizer.name} ({needed}); leave it out to take the tokenizer's"
        )
    return model


def dataset_info(shards: Shards) -> DatasetInfo:
    """What MLflow records of the text."""
    manifest = shards.manifest
    splits = {"train": manifest.train, "validation": manifest.validation}
    counts = {
        f"{name}_{what}": getattr(split, what)
        for name, split in splits.items()
        for what in ("documents", "tokens", "text_bytes")
    }
    return DatasetInfo(
        name=manifest.corpus.kind,
        digest=manifest.corpus_digest,
        source=str(shards.folder),
        profile={**counts, "tokenizer": manifest.tokenizer.name, "python": manifest.python},
    )
