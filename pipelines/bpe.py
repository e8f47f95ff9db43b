"""Trains a byte-level BPE tokenizer on a corpus' training documents."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.corpus import Corpus
from pipelines.corpus_writer import Progress
from pipelines.cutting import cut
from pipelines.encoding import placed, training_texts
from pipelines.errors import UserError
from pipelines.tasks import Runner

DOCUMENT_TOKEN = "<|endoftext|>"
"""Ends every document; the name that Hugging Face's models of this kind have for it."""
SAMPLE_BYTES = 2**30
"""About so much text is learnt from at most: counting takes 10 s per 100 MB on two cores."""

# A pair that occurs once in the whole corpus is no regularity.
_LEAST_FREQUENCY = 2


def train_tokenizer(
    corpus: Corpus,
    vocab_size: int,
    path: Path,
    run: Runner,
    progress: Progress | None = None,
    merging: Callable[[], None] | None = None,
) -> None:
    """Learn a vocabulary of exactly ``vocab_size`` and write it to ``path``, a ``tokenizers`` JSON file.

    Held-out documents are not looked at. Of a corpus over `SAMPLE_BYTES`, a part of the documents is used, chosen by
    their content. The same documents give the same file, in whatever order and by however many tasks they are read.

    Args:
        corpus: the corpus.
        vocab_size: the document token, the 256 bytes and the merges.
        path: the new file.
        run: how the corpus is read.
        progress: called with the bytes of source files read.
        merging: called when all are read.

    Raises:
        UserError: the text does not have so many regularities, or a file is wrong.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_LEAST_FREQUENCY,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_texts(corpus, run, progress, merging), trainer)
    found = library.get_vocab_size()
    if found < vocab_size:
        raise UserError(
            f"--train-tokenizer {vocab_size}: the training text of {corpus.places} has only {found} tokens to learn "
            f"(pairs that occur {_LEAST_FREQUENCY} times at least); ask for {found} or fewer, or give more text"
        )
    library.save(str(path))


def write_transformers_config(folder: Path) -> None:
    """What lets ``AutoTokenizer.from_pretrained(folder)`` read a tokenizer of `train_tokenizer`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": DOCUMENT_TOKEN,
        "eos_token": DOCUMENT_TOKEN,
        "pad_token": DOCUMENT_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _texts(corpus: Corpus, run: Runner, progress: Progress | None, merging: Callable[[], None] | None) -> Iterator[str]:
    chosen_below = min(1.0, SAMPLE_BYTES / max(1, corpus.text_bytes_estimate)) * 2**64
    done = 0
    for piece, _, texts in placed(run(training_texts, corpus.reading, cut(corpus))):
        for digest, text in texts.documents:
            # Not the bytes that decide the split, which in all of these documents are large.
            if int.from_bytes(digest[8:16]) < chosen_below:
                yield text
        done += piece.source_bytes
        if progress is not None:
            progress(done, corpus.size_bytes)
    if merging is not None:
        merging()
