import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipelines.config import DataConfig, FilesCorpusConfig, StdlibCorpusConfig
from pipelines.corpus import open_corpus
from pipelines.errors import UserError
from pipelines.prepare import prepare
from pipelines.shards import open_shards
from pipelines.tokenizer import load_tokenizer
from tests.pipelines.plain_corpus import PlainCorpus, held_out, write_corpus
from tests.pipelines.test_tokenizer import train_bpe


@pytest.fixture(autouse=True)
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "corpora"


@pytest.fixture
def plain(tmp_path: Path) -> PlainCorpus:
    return write_corpus(tmp_path / "texts")


def _prepared_folders(corpora: Path) -> list[str]:
    return sorted(path.name for path in corpora.iterdir() if path.name != "listings")


def _no_progress(done: int, total: int) -> None:
    raise AssertionError("prepared anew")


def test_stdlib_becomes_bytes_that_add_up(corpora: Path) -> None:
    config = StdlibCorpusConfig(include_tests=False)
    manifest = prepare(DataConfig(corpus=config)).manifest
    contents = [Path(file.path).read_bytes() for file in open_corpus(config).files]
    contents = [content for content in contents if content]
    assert manifest.train.documents + manifest.validation.documents == len(contents)
    assert manifest.train.text_bytes == sum(len(content) for content in contents if not held_out(content))
    assert manifest.validation.text_bytes == sum(len(content) for content in contents if held_out(content))
    assert manifest.python == ".".join(map(str, sys.version_info[:3]))
    assert manifest.dtype == "uint16"


def test_corpus_digest_is_over_names_and_contents(plain: PlainCorpus) -> None:
    expected = hashlib.sha256()
    for name in sorted(plain.documents):
        expected.update(name.encode() + b"\0" + hashlib.sha256(plain.documents[name]).digest())
    assert prepare(plain.config()).manifest.corpus_digest == expected.hexdigest()


def test_known_corpus_is_opened_without_reading_it(plain: PlainCorpus) -> None:
    first = prepare(plain.config())
    path = plain.folder / next(iter(plain.documents))
    stat = path.stat()
    path.write_bytes(b"?" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = prepare(plain.config(), _no_progress)
    assert (again.folder, again.manifest) == (first.folder, first.manifest)


def test_touched_corpus_is_read_but_keeps_its_shards(plain: PlainCorpus, corpora: Path) -> None:
    first = prepare(plain.config())
    os.utime(plain.folder / next(iter(plain.documents)))
    assert prepare(plain.config()).folder == first.folder
    assert _prepared_folders(corpora) == [first.folder.name]
    prepare(plain.config(), _no_progress)


def test_corpus_that_moved_as_a_whole_keeps_its_shards(plain: PlainCorpus, tmp_path: Path) -> None:
    first = prepare(plain.config())
    moved = PlainCorpus(plain.folder.rename(tmp_path / "elsewhere"), plain.documents)
    assert prepare(moved.config()).folder == first.folder


def test_changed_text_or_tokenizer_gets_shards_of_its_own(plain: PlainCorpus, tmp_path: Path) -> None:
    bpe = str(train_bpe(tmp_path / "bpe.json"))
    folders = [prepare(plain.config()).folder, prepare(plain.config(tokenizer=bpe)).folder]
    folders.append(prepare(plain.config(tokenizer=bpe, document_token="def")).folder)
    (plain.folder / "new.txt").write_text("one more")
    folders.append(prepare(plain.config()).folder)
    assert len(set(folders)) == 4


def test_deleted_shards_are_prepared_again(plain: PlainCorpus) -> None:
    first = prepare(plain.config())
    for path in first.folder.iterdir():
        path.unlink()
    first.folder.rmdir()
    assert prepare(plain.config()).manifest == first.manifest
    open_shards(first.folder, verify=True)


def test_damaged_shards_are_refused_with_the_way_out(plain: PlainCorpus) -> None:
    folder = prepare(plain.config()).folder
    (folder / "train-00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match=rf"train-00000\.bin has 0 bytes .*; delete {folder}"):
        prepare(plain.config())


def test_progress_rises_to_the_corpus_size(plain: PlainCorpus) -> None:
    for number in range(3):
        (plain.folder / f"large{number}.txt").write_text("x" * 1_100_000)
    calls: list[tuple[int, int]] = []
    prepare(plain.config(), lambda done, total: calls.append((done, total)))
    total = 3 * 1_100_000 + sum(map(len, plain.documents.values()))
    assert {total} == {called for _, called in calls}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[0][0] < calls[-1][0] == total


def test_interrupted_preparation_leaves_nothing(plain: PlainCorpus, corpora: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(plain.config(), interrupt)
    assert _prepared_folders(corpora) == []
    open_shards(prepare(plain.config()).folder, verify=True)


def test_preparation_that_is_overtaken_takes_the_other_ones_shards(plain: PlainCorpus, corpora: Path) -> None:
    overtaken = False

    def overtake(done: int, total: int) -> None:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            prepare(plain.config())

    shards = prepare(plain.config(), overtake)
    assert overtaken
    assert _prepared_folders(corpora) == [shards.folder.name]
    open_shards(shards.folder, verify=True)


def test_processes_that_prepare_at_once_end_with_the_same_good_shards(tmp_path: Path, corpora: Path) -> None:
    plain = write_corpus(tmp_path / "many", documents=400, longest=4000)
    start = tmp_path / "start"
    program = f"""
import pathlib, time
from pipelines.config import DataConfig
from pipelines.prepare import prepare
print("ready", flush=True)
while not pathlib.Path({str(start)!r}).exists():
    time.sleep(0.001)
print(prepare(DataConfig.model_validate_json({plain.config().model_dump_json()!r})).folder)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        start.touch()
        outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert outputs[0] == outputs[1] == str(corpora / _prepared_folders(corpora)[0])
    assert len(_prepared_folders(corpora)) == 1
    shards = open_shards(Path(outputs[0]), verify=True)
    assert shards.train.read(0, len(shards.train)).tolist() == [token for _, token in plain.train()]


def test_held_out_document_that_changes_meanwhile_is_refused(plain: PlainCorpus) -> None:
    name = next(name for name, content in plain.documents.items() if held_out(content))

    def change(done: int, total: int) -> None:
        (plain.folder / name).write_text("changed")

    with pytest.raises(UserError, match=rf"{name} changed while the corpus was prepared"):
        prepare(plain.config(), change)


def test_text_tokenizer_is_recorded_and_gives_the_text_back(plain: PlainCorpus, tmp_path: Path) -> None:
    path = train_bpe(tmp_path / "bpe.json")
    shards = prepare(plain.config(tokenizer=str(path)))
    recorded = shards.manifest.tokenizer
    assert (recorded.name, recorded.sha256) == ("bpe.json", hashlib.sha256(path.read_bytes()).hexdigest())
    library = Tokenizer.from_file(str(path))
    assert (recorded.vocab_size, recorded.document_token) == (library.get_vocab_size(), "<|endoftext|>")
    tokenizer = load_tokenizer(str(path), None)
    for stream, expected in ((shards.train, plain.train()), (shards.validation, plain.validation())):
        pieces = tokenizer.decode(stream.read(0, len(stream))).split("<|endoftext|>")
        # Texts were cut anywhere, so some end within a character and were read as Latin-1.
        names = list(dict.fromkeys(name for name, _ in expected))
        assert pieces[-1] == ""
        for name, piece in zip(names, pieces[:-1], strict=True):
            content = plain.documents[name]
            assert piece.encode() == content or piece.encode("latin-1") == content


def test_all_bytes_of_held_out_text_are_accounted_for_by_a_text_tokenizer(plain: PlainCorpus, tmp_path: Path) -> None:
    shards = prepare(plain.config(tokenizer=str(train_bpe(tmp_path / "bpe.json"))))
    stream = shards.validation
    assert stream.text_bytes(0, len(stream)) == stream.manifest.text_bytes
    at = 0
    for span in stream.documents(0, len(stream)):
        assert stream.text_bytes(at, at + span.end) == len(plain.documents[span.name])
        at += span.end


def test_vocabulary_beyond_two_bytes_is_stored_in_four(plain: PlainCorpus, tmp_path: Path) -> None:
    vocabulary = {f"w{number}": number for number in range(70_000)} | {"</s>": 70_000}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="w69999"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "large.json"))
    (plain.folder / "large.txt").write_text("w68000 w3 w69000")
    shards = prepare(plain.config(tokenizer=str(tmp_path / "large.json")))
    assert shards.manifest.dtype == "uint32"
    assert shards.train.read(0, len(shards.train)).dtype == np.uint32
    tokens = shards.train.read(0, len(shards.train)).tolist()
    assert tokens[-4:] == [68_000, 3, 69_000, 70_000]


def test_corpus_without_text_is_refused(tmp_path: Path, corpora: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"data\.corpus: .*empty\.txt: no file there holds any text"):
        prepare(DataConfig(corpus=FilesCorpusConfig(paths=[str(tmp_path / "empty.txt")])))
    assert _prepared_folders(corpora) == []


def test_corpus_with_nothing_held_out_is_refused(tmp_path: Path) -> None:
    text = next(f"text {number}" for number in range(100) if not held_out(f"text {number}".encode()))
    (tmp_path / "one.txt").write_text(text)
    with pytest.raises(UserError, match=r"data\.corpus: .*: none of the 1 documents falls to validation"):
        prepare(DataConfig(corpus=FilesCorpusConfig(paths=[str(tmp_path)])))


def test_shards_never_wait_for_torch(tmp_path: Path) -> None:
    """Preparing with bytes loads neither torch nor a tokenizer library, so that start-up is not held up."""
    plain = write_corpus(tmp_path / "texts")
    program = f"""
import sys
from pipelines.config import DataConfig
from pipelines.prepare import prepare
prepare(DataConfig.model_validate_json({plain.config().model_dump_json()!r}))
print(sorted({{"torch", "ray", "mlflow", "tokenizers"}} & set(sys.modules)))
"""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert output.stdout == "[]\n"
