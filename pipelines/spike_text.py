"""The text of the batch that a spike event happened at, from the token shards that the run has read."""

from dataclasses import dataclass

from pipelines.checkpoint_manifest import CheckpointError, read_manifest, whole_checkpoints
from pipelines.config import DataConfig
from pipelines.data import TokenDataset
from pipelines.errors import UserError
from pipelines.prepare import find_prepared, tokenizer_of
from pipelines.run_folder import RunFolder
from pipelines.shards import DocumentSpan
from pipelines.spike_event import SpikeEvent


@dataclass(frozen=True)
class SampleText:
    """One sample of a batch."""

    sample: int
    documents: list[DocumentSpan]
    """Which pieces of which documents it holds, in order."""
    text: str
    """Its inputs and targets, document tokens by their name."""


def batch_text(folder: RunFolder, event: SpikeEvent, data: DataConfig) -> list[SampleText]:
    """The samples of an event's batch in their order; a fault that was injected into the batch is not in it.

    Args:
        folder: the run.
        event: whose batch.
        data: of the run's config.

    Raises:
        UserError: the text is not there any more, or is another one than the run has read.
    """
    if not event.samples:
        return []
    shards = find_prepared(data)
    digest = _digest(folder)
    if digest not in (None, shards.manifest.corpus_digest):
        raise UserError(f"data.corpus: {shards.folder} is another text than the run has read")
    dataset, tokenizer = TokenDataset(shards.train, data.sequence_length), tokenizer_of(data)
    texts = []
    for sample in event.samples:
        documents = dataset.documents(sample) if sample < len(dataset) else []
        if not documents or not {span.name for span in documents} <= set(event.documents):
            raise UserError(f"data.corpus: {shards.folder} has another text in sample {sample} than the run has read")
        ids_L = dataset.read([sample])[0].numpy()
        texts.append(SampleText(sample, documents, tokenizer.decode(ids_L)))
    return texts


def _digest(folder: RunFolder) -> str | None:
    """Of the corpus that the run has read; its checkpoints know it. None without any."""
    for path in whole_checkpoints(folder.checkpoints).values():
        try:
            return str(read_manifest(path).metadata["corpus_digest"])
        except (CheckpointError, KeyError):
            continue
    return None
