"""What a comparison takes a run for, by its folder alone."""

import pytest

from pipelines.errors import UserError
from pipelines.run_folder import write_whole
from pipelines.spool import TRAIN, SpoolWriter
from tests.pipelines.spiky import outcome, record, spike
from tests.tuning.comparison.made import DIGEST, STEPS, TOKENS_PER_STEP, UNTRAINED, VALIDATE_EVERY, Made
from tuning.comparison.runs import DATASET, read_run, smoothed, thinned


def test_a_run_that_did_all_its_steps_has_finished() -> None:
    run = Made("a", loss=3.0).read()
    assert (run.state, run.words) == ("finished", "finished")
    assert (run.tokens, run.budget) == (STEPS * TOKENS_PER_STEP, STEPS * TOKENS_PER_STEP)
    assert run.untrained_loss == UNTRAINED
    assert run.training_seconds == pytest.approx(STEPS * TOKENS_PER_STEP / 1000)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Made("a", lost_at=7), "diverged: train/loss not finite at step 7"),
        (Made("a", loss=6.0), "diverged: the training loss is 6.000, and was 5.500 before training"),
        (
            Made("a", done=9, ending={"status": "FINISHED", "tags": {"diverged": "true"}, "metrics": {}}),
            "diverged: by its own measures, at step 9",
        ),
        (
            Made("a", done=9, ending={"status": "FINISHED", "tags": {}, "metrics": {"study/diverged": 1.0}}),
            "diverged: by its own measures, at step 9",
        ),
    ],
)
def test_a_diverged_run_is_told_in_words(made: Made, words: str) -> None:
    run = made.read()
    assert (run.state, run.words) == ("diverged", words)


def test_a_run_that_the_policy_has_ended_has_diverged() -> None:
    folder = Made("a", done=9).write()
    record(folder, spike(9, kind="grad_norm", action="abort"), outcome("aborted", 9))
    assert read_run(folder).words == "diverged: ended by the stability policy at step 9: gradient norm spike"


def test_a_loss_that_was_taken_back_is_no_divergence() -> None:
    folder = Made("a", lost_at=7).write()
    with SpoolWriter(folder.spool) as writer:
        writer.rewind(6)
        for step in range(7, STEPS + 1):
            writer.write(TRAIN, step, {"train/loss": 3.0, "train/grad_norm": 1.0})
    assert read_run(folder).state == "finished"


def test_a_run_cut_short_is_not_finished() -> None:
    assert (Made("a", done=8).read().state, Made("a", done=8).read().words) == (
        "stopped",
        f"ended at step 8 of {STEPS}",
    )


def test_seed_names_and_places_are_no_settings() -> None:
    one, other = Made("a", seed=0).read(), Made("b", ("data.corpus.paths=[/elsewhere]",), seed=1).read()
    assert one.settings == other.settings
    assert one.settings[DATASET] == DIGEST[:8]
    assert "optimizer.lr" in one.settings


def test_without_a_digest_the_places_are_settings() -> None:
    one = Made("a", dataset=None).read().settings
    other = Made("b", ("data.corpus.paths=[/elsewhere]",), dataset=None).read().settings
    differing = {key for key, value in one.items() if other[key] != value}
    assert differing == {"data.corpus.paths"}


def test_a_metric_between_two_points_lies_on_the_line_between_them() -> None:
    run = Made("a", loss=3.6).read()
    at = [VALIDATE_EVERY * TOKENS_PER_STEP, 2 * VALIDATE_EVERY * TOKENS_PER_STEP]
    ends = [run.at("val/loss", tokens) for tokens in at]
    assert ends == pytest.approx([UNTRAINED - 0.1 * 4, UNTRAINED - 0.1 * 9])
    assert run.at("val/loss", sum(at) // 2) == pytest.approx(UNTRAINED - 0.1 * 6.5)
    assert run.at("val/loss", STEPS * TOKENS_PER_STEP + 1) is None
    assert run.at("val/loss", 1) is None
    assert run.at("no/such", at[0]) is None


def test_spikes_count_up_to_the_tokens_that_are_compared() -> None:
    run = Made("a", spikes=(4, 16)).read()
    half = STEPS // 2 * TOKENS_PER_STEP
    assert (run.spikes_by(half), run.steps_lost_by(half)) == (1, 6)
    assert (run.spikes_by(2 * half), run.steps_lost_by(2 * half)) == (2, 12)
    assert Made("b", spikes=(4, 16), lost_at=17).read().spikes_by(half) == 2


def test_what_cannot_be_compared_is_said() -> None:
    folder = Made("a").write()
    write_whole(folder.config, "optimizer: {lrr: 1}\n")
    with pytest.raises(UserError, match="run a: its config is not one of this version"):
        read_run(folder)
    with pytest.raises(UserError, match="run b: has not done a step yet"):
        Made("b", done=0).read()


def test_smoothing_looks_back_alone() -> None:
    assert smoothed([4.0, 2.0, 6.0, 8.0], 0.5) == [4.0, 3.0, 4.0, 7.0]
    assert smoothed([4.0], 0.03) == [4.0]


def test_a_thinned_curve_keeps_its_ends() -> None:
    places, values = thinned(list(range(1000)), [float(v) for v in range(1000)], 7)
    assert (len(places), places[0], places[-1]) == (7, 0, 999)
    assert values == [float(place) for place in places]
    assert thinned([1, 2], [3.0, 4.0], 7) == ([1, 2], [3.0, 4.0])
