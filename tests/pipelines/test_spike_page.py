"""One event for people: its words, the text of its batch as the run has read it, and its picture."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from pipelines.checkpoint_manifest import Manifest, write_manifest
from pipelines.config import DataConfig, RunConfig
from pipelines.errors import UserError
from pipelines.home import corpora_dir, runs_dir
from pipelines.loading import dump_config
from pipelines.prepare import prepare
from pipelines.run_folder import RunFolder, RunInfo, write_whole
from pipelines.spike_event import SpikeEvent
from pipelines.spike_figure import draw_event
from pipelines.spike_page import print_event
from pipelines.spike_text import batch_text
from pipelines.spool import TRAIN, SpoolWriter
from tests.pipelines.plain_corpus import PlainCorpus, write_corpus
from tests.pipelines.small_run import small_config
from tests.pipelines.spiky import outcome, spike

LENGTH = 128


@pytest.fixture
def corpus(home: Path) -> PlainCorpus:
    """Texts that the run has read, prepared."""
    written = write_corpus(home / "texts")
    prepare(written.config(sequence_length=LENGTH))
    return written


def config_of(corpus: PlainCorpus) -> RunConfig:
    source = f"data.corpus={{kind: files, paths: [{corpus.folder}]}}"
    return small_config(source, f"data.sequence_length={LENGTH}")


def data_of(corpus: PlainCorpus) -> DataConfig:
    return config_of(corpus).data


@pytest.fixture
def folder(corpus: PlainCorpus) -> RunFolder:
    """A run on them that went back once."""
    folder = RunFolder(runs_dir() / "abc")
    folder.write_info(RunInfo("abc", "tiny-1", "steadymoe", "7", "2026-05-01T10:00:00+00:00", "http://127.0.0.1:1"))
    write_whole(folder.config, dump_config(config_of(corpus)))
    with SpoolWriter(folder.spool) as writer:
        for step in range(1, 101):
            writer.write(TRAIN, step, {"train/loss": 5 / step + 40 * (step == 100), "train/grad_norm": 1.0})
        writer.rewind(94)
        for step in range(95, 151):
            writer.write(TRAIN, step, {"train/loss": 5 / step, "train/grad_norm": 1.0})
    return folder


def event(corpus: PlainCorpus, *samples: int) -> SpikeEvent:
    """A spike whose batch was these samples."""
    names = {name for sample in samples for name, _ in pieces(corpus, sample)}
    return spike(100, samples=samples, documents=sorted(names)).model_copy(
        update={"outcome": outcome("recovered", 150)}
    )


def pieces(corpus: PlainCorpus, sample: int) -> list[tuple[str, int]]:
    """(document, token) of a sample, inputs and targets."""
    return corpus.train()[sample * LENGTH : (sample + 1) * LENGTH + 1]


def text_of(corpus: PlainCorpus, sample: int) -> str:
    tokens = [token for _, token in pieces(corpus, sample)]
    content = b"".join(b"<|document|>" if token == 256 else bytes([token]) for token in tokens)
    return content.decode("utf-8", "replace")


def printed(folder: RunFolder, shown: SpikeEvent, full: bool = False) -> str:
    output = io.StringIO()
    print_event(folder, 1, shown, full, Console(file=output, width=120))
    return output.getvalue()


def test_the_text_is_that_of_the_batch_in_its_order(folder: RunFolder, corpus: PlainCorpus) -> None:
    data = small_config(f"data.corpus={{kind: files, paths: [{corpus.folder}]}}", f"data.sequence_length={LENGTH}").data
    texts = batch_text(folder, event(corpus, 7, 0, 3), data)
    assert [text.sample for text in texts] == [7, 0, 3]
    for text in texts:
        assert text.text == text_of(corpus, text.sample)
        assert [span.name for span in text.documents] == list(
            dict.fromkeys(name for name, _ in pieces(corpus, text.sample))
        )


def test_the_page_says_what_happened_and_what_became_of_it(folder: RunFolder, corpus: PlainCorpus) -> None:
    lines = printed(folder, event(corpus, 7, 0)).splitlines()
    assert lines[0] == "Event 1 of run tiny-1: loss-000100"
    facts = dict(line.split(maxsplit=1) for line in lines[1:9])
    assert facts["what"] == "step 100: loss spike, 9.125 where 3.25 was to be expected, score 41.0"
    assert facts["when"].endswith(", after 405,504 tokens")
    assert facts["threshold"] == "an event from a score of 12 on"
    assert facts["onset"] == "conspicuous since step 99"
    assert facts["answer"] == "training went back to step 94, and leaves the samples since the onset out"
    assert facts["outcome"] == "recovered at step 150; 6 steps lost in 2.5 s"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["1", "0.500", "2", "0.01", "", "120", "3.5"],
        ["2", "0.250", "0", "0.02", "1.5", "", ""],
        ["dense", "2.5"],
        ["experts", "40"],
        ["router", "not finite"],
    ]
    assert lines[-1] == f"Picture  {folder.figures / 'spike-loss-000100.png'}"


def test_a_batch_is_shown_in_part_and_in_full_if_asked_for(folder: RunFolder, corpus: PlainCorpus) -> None:
    shown = event(corpus, *range(12))
    part = printed(folder, shown)
    for sample in range(8):
        assert f"    {text_of(corpus, sample).replace(chr(10), '⏎')}\n" in part
    assert "sample 8:" not in part
    assert "  and 4 more samples; --full shows everything\n" in part
    full = printed(folder, shown, full=True)
    for sample in range(12):
        lines = "".join(f"    | {line}\n" for line in text_of(corpus, sample).split("\n"))
        assert lines in full
    assert "--full" not in full


def test_commands_to_a_terminal_in_a_text_are_shown_and_not_sent(folder: RunFolder, corpus: PlainCorpus) -> None:
    for name in corpus.documents:
        (corpus.folder / name).write_bytes(b"\x1b[2J\x07 [bold]x[/bold] \xc2\x9b" * 20 + name.encode())
    prepare(corpus.config(sequence_length=LENGTH))
    shown = spike(100, samples=(0,), documents=list(corpus.documents))
    for full in (False, True):
        text = printed(folder, shown, full)
        assert r"\x1b[2J\x07 [bold]x[/bold] \x9b" in text
        assert {c for c in text if not c.isprintable()} == {"\n"}


@pytest.mark.parametrize("change", ["deleted", "changed", "shorter", "another digest", "gone"])
def test_text_that_is_not_there_any_more_is_not_made_up(folder: RunFolder, corpus: PlainCorpus, change: str) -> None:
    shown = event(corpus, 7, 0)
    name = shown.documents[0]
    if change == "deleted":
        (corpus.folder / name).unlink()
        reason = "has no token shards of this text; it has changed since, or they were deleted"
    elif change == "changed":
        # And prepared again, by another run.
        (corpus.folder / name).rename(corpus.folder / "a" / "000-earlier.txt")
        prepare(corpus.config(sequence_length=LENGTH))
        reason = "has another text in sample 0 than the run has read"
    elif change == "shorter":
        shown = shown.model_copy(update={"samples": (10**6,)})
        reason = "has another text in sample 1000000 than the run has read"
    elif change == "another digest":
        # Of the same documents, as far as their names tell; the checkpoints of the run know better.
        metadata = {"corpus_digest": "0" * 64}
        checkpoint = folder.checkpoints / "step-00000050"
        checkpoint.mkdir(parents=True)
        write_manifest(checkpoint, Manifest(step=50, timeline=0, metadata=metadata, scalars={}, tensors={}, files={}))
        reason = "is another text than the run has read"
    else:
        for path in corpora_dir().glob("*/manifest.json"):
            path.unlink()
        reason = "holds no prepared corpus"
    made = {path.name for path in corpora_dir().iterdir()}
    with pytest.raises(UserError, match=reason):
        batch_text(folder, shown, data_of(corpus))
    assert {path.name for path in corpora_dir().iterdir()} == made


def test_the_page_names_the_documents_whose_text_is_gone(folder: RunFolder, corpus: PlainCorpus) -> None:
    shown = event(corpus, 7, 0)
    (corpus.folder / shown.documents[0]).unlink()
    text = printed(folder, shown)
    assert "  its text cannot be shown: data.corpus: " in text
    assert all(f"  {document}\n" in text for document in shown.documents)
    assert "Picture  " in text


def test_an_event_of_operations_has_a_page_without_a_batch(folder: RunFolder) -> None:
    bare = {**dict.fromkeys(("value", "baseline", "score", "threshold", "onset", "rewound_to", "tokens_seen"))}
    empty: dict[str, object] = {"layers": (), "samples": (), "documents": (), "grad_norms": {}}
    died = spike(50, id="worker_death-000050", kind="worker_death", action="restart_workers", **bare, **empty)
    lines = printed(folder, died).splitlines()
    assert [line.split()[0] for line in lines] == ["Event", "what", "when", "answer", "outcome", "detail", "Picture"]
    assert lines[4].endswith("not known yet what becomes of it")


def test_the_picture_shows_what_was_taken_back_apart(folder: RunFolder, corpus: PlainCorpus) -> None:
    path = draw_event(folder, event(corpus, 7, 0))
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1600, 1200)
    assert is_orange_in(path)
    # Of a run that has recorded nothing there is nothing to show.
    folder.spool.unlink()
    assert not is_orange_in(draw_event(folder, event(corpus, 7, 0)))


def is_orange_in(picture: Path) -> bool:
    """Whether anything has the colour of what was taken back."""
    difference = np.abs(imread(picture)[..., :3] - np.array([0xE0, 0x7B, 0x39]) / 255)
    return bool((difference.max(axis=-1) < 0.02).any())


def test_a_folder_that_takes_no_picture_is_named(folder: RunFolder, corpus: PlainCorpus) -> None:
    folder.figures.write_text("")
    with pytest.raises(UserError, match=r"spike-loss-000100\.png cannot be written: File exists"):
        draw_event(folder, event(corpus, 7, 0))
