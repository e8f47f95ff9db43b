"""Work on real Ray tasks: results in order, and shards that do not depend on how many tasks made them."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import cutting
from pipelines.config import FilesCorpusConfig
from pipelines.corpus import open_corpus
from pipelines.corpus_writer import write_corpus
from pipelines.errors import UserError
from pipelines.ray_session import connect
from pipelines.tasks import RAY_FROM_BYTES, in_this_process, runner
from tests.pipelines.test_tokenizer import train_bpe


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    """One local cluster for all tests here: starting it takes seconds."""
    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_ADDRESS", raising=False)
    with connect():
        yield
    patch.undo()


def _wait_and_square(longest_s: float, number: int) -> int:
    time.sleep(random.Random(number).random() * longest_s)
    return number**2


def _fill(folder: Path) -> Path:
    """Text in all forms, of some hundred pieces if they are small."""
    folder.mkdir()
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc é\n🙂", k=rng.randint(0, 300))) for _ in range(600)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:300]))
    for number, text in enumerate(texts[300:]):
        (folder / f"{number}.txt").write_text(text)
    return folder


def _bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize("tasks", [1, 2, 5, None])
def test_results_come_in_the_order_of_the_items_whichever_task_is_ready_first(tasks: int | None) -> None:
    with runner(RAY_FROM_BYTES, tasks) as run:
        assert list(run(_wait_and_square, 0.05, range(30))) == [(number, number**2) for number in range(30)]


@pytest.mark.usefixtures("_ray")
def test_items_are_taken_only_as_far_as_results_may_wait() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with runner(0, tasks=3) as run:
        for (number, _), _ in zip(run(_wait_and_square, 0.0, items()), range(50), strict=False):
            assert len(taken) <= number + 1 + 2 * 3


@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_shards_are_the_same_bytes_whatever_makes_them(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 2000)
    config = FilesCorpusConfig(paths=[str(_fill(tmp_path / "texts"))])
    tokenizer = "byte" if kind == "byte" else str(train_bpe(tmp_path / "bpe.json"))
    made = {}
    for tasks in (None, 1, 3):
        folder = tmp_path / f"made by {tasks}"
        folder.mkdir()
        corpus = open_corpus(config)
        with runner(0, tasks) as run:
            assert (run is in_this_process) == (tasks is None)
            write_corpus(folder, config, corpus, tokenizer, None, run, shard_bytes=10_000)
        made[tasks] = _bytes_in(folder)
    assert made[None] == made[1] == made[3]
    assert len(list(cutting.cut(corpus))) > 50


@pytest.mark.usefixtures("_ray")
def test_a_mistake_in_a_late_piece_is_the_users_error_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 200 + "bad\n" + '{"text": "good"}\n' * 200 + "bad\n")
    config = FilesCorpusConfig(paths=[str(tmp_path / "a.jsonl")])
    (tmp_path / "out").mkdir()
    with runner(0, tasks=4) as run, pytest.raises(UserError) as caught:
        write_corpus(tmp_path / "out", config, open_corpus(config), "byte", None, run)
    assert str(caught.value) == f"{tmp_path / 'a.jsonl'}, line 201: is not JSON (Expecting value, column 1)"
