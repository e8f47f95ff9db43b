"""Presets, files and --set become one validated config, or one clear line for every problem."""

import copy
from pathlib import Path

import pytest

from pipelines.config import FilesCorpusConfig, RunConfig
from pipelines.errors import UserError
from pipelines.loading import Tree, dump_config, load_config, preset_names


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def complaint(layers: list[str], settings: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(layers, settings or [])
    return str(caught.value)


def test_no_layer_gives_the_defaults() -> None:
    assert load_config([]) == RunConfig()


def test_a_later_layer_wins_key_by_key(tmp_path: Path) -> None:
    below = write(tmp_path, "below.yaml", "model: {num_layers: 3, moe: {num_experts: 8, top_k: 3}}\nseed: 1\n")
    above = write(tmp_path, "above.yaml", "model: {moe: {top_k: 4}}\nseed: 2\n")
    config = load_config([below, above], ["seed=3"])
    assert (config.model.num_layers, config.model.moe.num_experts, config.model.moe.top_k) == (3, 8, 4)
    assert config.seed == 3
    assert load_config([above, below]).model.moe.top_k == 3


def test_a_new_kind_takes_nothing_over_from_the_kind_it_replaces(tmp_path: Path) -> None:
    below = write(tmp_path, "below.yaml", "data: {corpus: {kind: stdlib, include_tests: false}}\n")
    above = write(tmp_path, "above.yaml", "data: {corpus: {kind: files, paths: [a.txt]}}\n")
    assert load_config([below, above]).data.corpus == FilesCorpusConfig(paths=["a.txt"])


def test_keys_of_the_default_kind_are_dropped_with_it(tmp_path: Path) -> None:
    below = write(tmp_path, "below.yaml", "stability: {clip: {max_norm: 0.5}}\n")
    above = write(tmp_path, "above.yaml", "stability: {clip: {kind: none}}\n")
    assert load_config([below]).stability.clip.model_dump() == {"kind": "global", "max_norm": 0.5}
    assert load_config([below, above]).stability.clip.kind == "none"


def test_the_same_kind_again_keeps_the_keys_below_it(tmp_path: Path) -> None:
    below = write(tmp_path, "below.yaml", "stability: {clip: {kind: global, max_norm: 0.5}}\n")
    above = write(tmp_path, "above.yaml", "stability: {clip: {kind: global}}\n")
    assert load_config([below, above]).stability.clip.model_dump() == {"kind": "global", "max_norm": 0.5}


def test_a_list_replaces_the_list_below_it(tmp_path: Path) -> None:
    below = write(tmp_path, "below.yaml", "data: {corpus: {kind: files, paths: [a, b]}}\n")
    config = load_config([below], ["data.corpus.paths=[c]"])
    assert config.data.corpus == FilesCorpusConfig(paths=["c"])


@pytest.mark.parametrize("reverse", [False, True])
def test_settings_are_one_layer_whatever_their_order(tmp_path: Path, reverse: bool) -> None:
    below = write(tmp_path, "below.yaml", "stability: {clip: {kind: none}}\n")
    settings = ["stability.clip.kind=global", "stability.clip.max_norm=0.25"]
    config = load_config([below], settings[::-1] if reverse else settings)
    assert config.stability.clip.model_dump() == {"kind": "global", "max_norm": 0.25}


def test_named_layers_lie_between_files_and_settings_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, "below.yaml", "seed: 1\nmodel: {num_layers: 3, moe: {num_experts: 8, top_k: 3}}\n")
    trees: dict[str, Tree] = {"first": {"seed": 2, "model": {"moe": {"top_k": 4}}}, "second": {"seed": 3}}
    assert (config := load_config([path], trees=trees)).seed == 3
    assert (config.model.num_layers, config.model.moe.num_experts, config.model.moe.top_k) == (3, 8, 4)
    assert load_config([path], ["seed=4"], trees=trees).seed == 4
    assert load_config([path], trees=dict(reversed(trees.items()))).seed == 2


def test_a_named_layer_of_another_kind_takes_nothing_over_and_stays_what_it_was() -> None:
    trees: dict[str, Tree] = {
        "first": {"stability": {"clip": {"kind": "zclip", "z_threshold": 3.0}}},
        "second": {"stability": {"clip": {"kind": "zclip", "decay": 0.5}}},
        "third": {"stability": {"clip": {"kind": "global"}}},
    }
    before = copy.deepcopy(trees)
    assert load_config(["micro"], trees=trees).stability.clip.model_dump() == {"kind": "global", "max_norm": 1.0}
    assert trees == before


def test_the_named_layer_of_a_wrong_value_is_told() -> None:
    with pytest.raises(UserError) as caught:
        load_config(["micro"], trees={"arms.a": {"optimizer": {"lr": "x"}}, "arms.b": {"seed": 1}})
    assert str(caught.value) == "optimizer.lr: should be a valid number, got the text 'x' (set by arms.a)"


def test_an_exponent_without_a_dot_is_a_number_in_files_and_settings(tmp_path: Path) -> None:
    path = write(tmp_path, "lr.yaml", "optimizer: {lr: 1e-3}\nmodel: {rope_theta: 5E5}\n")
    config = load_config([path], ["optimizer.eps=1e-6"])
    assert (config.optimizer.lr, config.optimizer.eps, config.model.rope_theta) == (1e-3, 1e-6, 5e5)


@pytest.mark.parametrize("text", ["42", "1e-3", "no"])
def test_quoted_text_stays_text(text: str) -> None:
    assert load_config([], [f'tracking.run_name="{text}"']).tracking.run_name == text


def test_a_setting_may_hold_an_equals_sign_and_a_comma() -> None:
    config = load_config([], ["tracking.run_name=lr=1,2"])
    assert config.tracking.run_name == "lr=1,2"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_dumping(name: str, tmp_path: Path) -> None:
    config = load_config([name])
    path = write(tmp_path, "dumped.yaml", dump_config(config))
    assert load_config([path]) == config
    assert dump_config(load_config([path])) == dump_config(config)


SMALL_MODELS = ("micro", "tiny", "small")


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_the_plain_recipe_leaves_a_model_without_any_technique(model: str) -> None:
    config = load_config([model, "recipes/plain"])
    assert config.stability.model_dump() == {
        "balance": {"kind": "none"},
        "balance_loss": {"kind": "none"},
        "router_z_loss": {"coefficient": 0.0},
        "lm_z_loss": {"coefficient": 0.0},
        "clip": {"kind": "none"},
        "qk_clip": {"kind": "none"},
        "anticipation": {"kind": "none"},
    }
    assert config.precision.fp8.kind == "none"
    below = load_config([model])
    assert (config.schedule, config.data, config.parallel) == (below.schedule, below.data, below.parallel)


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_the_plain_recipe_takes_back_what_was_switched_on_below_it(model: str, tmp_path: Path) -> None:
    techniques = "model: {norm_placement: sandwich, moe: {output_norm: true}, init: {embedding_std: 1.0}}\n"
    techniques += "optimizer: {update_clip: rms}\nprecision: {fp8: {kind: deepseek_v3}}\n"
    techniques += "stability: {qk_clip: {kind: max_logit}, anticipation: {kind: always}}\n"
    path = write(tmp_path, "mine.yaml", techniques)
    plain = load_config([model, "recipes/plain"])
    assert load_config([model, path, "recipes/plain"]) == plain
    both = load_config([model, "recipes/recommended", "recipes/plain"])
    assert (both.model, both.stability) == (plain.model, plain.stability)


@pytest.mark.parametrize("model", [*SMALL_MODELS, "dense-tiny", "deepseek-v3", "deepseek-moe-16b"])
def test_the_recommended_recipe_switches_its_techniques_on(model: str) -> None:
    config, below = load_config([model, "recipes/recommended"]), load_config([model])
    assert config.model.attention.qk_norm
    assert (config.model.moe.affinity, config.model.moe.normalize_gates) == ("sigmoid", True)
    assert config.model.activation.model_dump() == {"kind": "swiglu_clamp", "limit": 10.0}
    assert config.stability.balance.model_dump(exclude={"schedule"}) == {"kind": "sign", "bias_update_rate": 1e-3}
    assert config.stability.balance_loss.model_dump() == {"kind": "sequence", "coefficient": 1e-4}
    assert (config.stability.router_z_loss.coefficient, config.stability.lm_z_loss.coefficient) == (0.0, 1e-4)
    assert config.stability.clip.model_dump() == {"kind": "global", "max_norm": 1.0}
    assert (config.optimizer.beta2, config.optimizer.eps, config.optimizer.weight_decay) == (0.95, 1e-16, 0.1)
    assert (config.optimizer.lr, config.schedule, config.data) == (below.optimizer.lr, below.schedule, below.data)


def test_another_optimizer_keeps_the_rate_and_decay_of_the_one_it_replaces(tmp_path: Path) -> None:
    muon = load_config(["tiny"], ["optimizer.kind=muon"]).optimizer
    assert (muon.kind, muon.lr) == ("muon", load_config(["tiny"]).optimizer.lr)
    path = write(tmp_path, "mine.yaml", "optimizer: {kind: muon, lr: 0.5}\n")
    assert load_config(["tiny", path]).optimizer.lr == 0.5
    slow = load_config([path], ["optimizer.kind=adamw", "optimizer.weight_decay=0.0"]).optimizer
    assert (slow.kind, slow.lr, slow.weight_decay) == ("adamw", 0.5, 0.0)


def test_a_recipe_that_a_models_stages_contradict_is_refused() -> None:
    found = complaint(["deepseek-v3", "recipes/plain"])
    assert found.startswith("schedule.stages.3.bias_update_rate has nothing to act on: stability.balance.kind is none")


def test_text_that_looks_like_something_else_survives_dumping(tmp_path: Path) -> None:
    for text in ["1e-3", "null", "true", " ", "010", "a: b", "ü# x", "2024-01-01"]:
        config = RunConfig.model_validate({"tracking": {"run_name": text}})
        assert load_config([write(tmp_path, "dumped.yaml", dump_config(config))]) == config


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        # unknown keys
        ("stability.clip.max_nrm=1", "stability.clip.max_nrm: unknown key; did you mean stability.clip.max_norm?"),
        ("trakcing.uri=x", "trakcing: unknown key; did you mean tracking?"),
        ("lr=1e-3", "lr: unknown key; did you mean optimizer.lr?"),
        ("stability.max_norm=1", "stability.max_norm: unknown key; did you mean stability.clip.max_norm?"),
        ("xyzzy=1", "xyzzy: unknown key; possible here: seed, model,"),
        # kinds
        ("stability.clip.kind=globl", "stability.clip.kind: 'globl' is no kind of clip; did you mean global?"),
        (
            "stability.clip.kind=qqq",
            "stability.clip.kind: 'qqq' is no kind of clip; "
            "possible: none, global, group, zclip, adagc, spam, stable_spam",
        ),
        ("data.corpus.paths=[a]", "data.corpus.paths: belongs to kind files, but data.corpus.kind is stdlib"),
        ("data.corpus.kind=files", "data.corpus.paths: is required here"),
        ("stability.clip=global", "stability.clip: should be a mapping of keys, got the text 'global'"),
        # types and ranges
        ("model.num_layers=four", "model.num_layers: should be a valid integer"),
        ("model.num_layers=2.5", "model.num_layers: should be a valid integer"),
        ("model.num_layers=yes", "model.num_layers: should be a valid integer"),
        ('model.num_layers="4"', "model.num_layers: should be a valid integer, got the text '4'"),
        ("schedule.steps=1e3", "schedule.steps: should be a valid integer, got 1000.0"),
        ("optimizer.lr=true", "optimizer.lr: should be a valid number, got true"),
        ("tracking.per_layer=1", "tracking.per_layer: should be a valid boolean, got 1"),
        ('tracking.run_name=""', "tracking.run_name: should have at least 1 character"),
        ("model.num_layers=0", "model.num_layers: should be greater than 0, got 0"),
        ("model.num_layers.deep=3", "model.num_layers: should be a valid integer, got a mapping"),
        ("optimizer.lr=.nan", "optimizer.lr: should be a finite number, got nan"),
        ("optimizer.lr=.inf", "optimizer.lr: should be a finite number, got inf"),
        ("optimizer.lr=1e999", "optimizer.lr: should be a finite number, got inf"),
        ("optimizer.lr=-1e-3", "optimizer.lr: should be greater than 0, got -0.001"),
        ("model.moe.affinity=sigmod", "model.moe.affinity: should be 'sigmoid', 'softmax' or 'sqrt_softplus', got"),
        ("tracking.run_name=42", "tracking.run_name: should be text, got 42; quote it"),
        ("model=3", "model: should be a mapping of keys, got 3"),
        ("model=", "model: should be a mapping of keys, got nothing"),
        ("data.corpus={kind: files, paths: [a, 1]}", "data.corpus.paths.1: should be text, got 1"),
        # rules over several keys
        ("model.moe.num_groups=3", "model.moe: num_experts (8) is not divisible by num_groups (3)"),
        ("model.moe={num_groups: 4, top_k: 3}", "model.moe: top_k (3) is more than the 1 chosen groups hold"),
        ("parallel.workers=3", "data.global_batch_size (16) is not divisible by parallel.workers (3)"),
        ("schedule.warmup_steps=201", "schedule: warmup_steps (201) is larger than steps (200)"),
        # items of a list
        ("faults={kind: corrupted_batches}", "faults: should be a list, got a mapping"),
        ("faults=[corrupted_batches]", "faults.0: should be a mapping of keys, got the text 'corrupted_batches'"),
        (
            "faults=[{kind: corrupt_batch, share: 1}]",
            "faults.0.kind: 'corrupt_batch' is no kind of faults; did you mean corrupted_batch?",
        ),
        ("faults=[{share: 1}]", "faults.0.kind: is required here; possible: corrupted_batches, corrupted_batch, "),
        ("faults=[{kind: corrupted_batches}]", "faults.0.share: is required here"),
        ("faults=[{kind: corrupted_batches, share: 0}]", "faults.0.share: should be greater than 0, got 0"),
        (
            "faults=[{kind: corrupted_batches, share: 1}, {kind: corrupted_batches, share: 2}]",
            "faults.1.share: should be less than or equal to 1, got 2",
        ),
        (
            "faults=[{kind: corrupted_batches, share: 1, shaer: 1}]",
            "faults.0.shaer: unknown key; did you mean faults.0.share?",
        ),
        (
            "faults=[{kind: corrupted_batches, share: 1, content: shuffled_tokens, ngram_tokens: 3}]",
            "faults.0.ngram_tokens: has no effect, since content is shuffled_tokens; leave it out",
        ),
        (
            "faults=[{kind: corrupted_batches, share: 1, ngram_tokens: 33}]",
            "faults.0.ngram_tokens (33) does not fit twice into a sequence of 64",
        ),
        (
            "faults=[{kind: corrupted_batches, share: 1}, {kind: corrupted_batches, share: 1, from_step: 201}]",
            "faults.1.from_step (201) is after the last of the schedule's 200 optimizer steps",
        ),
        # not a setting at all
        ("seed", "--set seed: should be key=value, for example --set optimizer.lr=3e-4"),
        ("=1", "--set =1: should be key=value"),
        ("model..moe=1", "--set model..moe=1: should be key=value"),
        ("data.corpus.paths=[*.txt]", "--set data.corpus.paths, line 1: not valid YAML"),
        ("model.moe={top_k: 1, top_k: 2}", "--set model.moe, line 1: top_k is given twice"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_key(setting: str, line: str) -> None:
    found = complaint(["micro"], [setting])
    assert found.startswith(line)
    assert "\n" not in found


def test_every_problem_has_its_line() -> None:
    lines = complaint([], ["seed=-1", "optimizer.lr=x", "model.layers=3"]).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["model.layers", "optimizer.lr", "seed"]


def test_the_layer_and_line_of_a_wrong_value_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", "seed: 1\nmodel:\n  moe:\n    top_k: none\n")
    assert complaint(["micro", path]).endswith(f"(set by {path}, line 4)")
    assert complaint([path], ["model.moe.top_k=many"]).endswith("(set by --set)")


def test_joined_keys_in_a_file_are_explained(tmp_path: Path) -> None:
    assert "nest keys" in complaint([write(tmp_path, "flat.yaml", "optimizer.lr: 0.1\n")])


def test_an_unknown_preset_is_refused_with_the_list() -> None:
    found = complaint(["mikro"])
    assert found.startswith("unknown preset 'mikro'; did you mean micro?")
    assert all(name in found for name in preset_names())


def test_a_file_without_its_ending_is_explained(tmp_path: Path) -> None:
    found = complaint([write(tmp_path, "mine.yml", "seed: 1\n")])
    assert "a file's name should end in .yaml" in found


@pytest.mark.parametrize("name", ["../presets/micro", "recipes", "micro/", ""])
def test_a_preset_is_only_what_is_listed(name: str) -> None:
    assert complaint([name]).startswith(f"unknown preset {name!r}")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert complaint([missing]) == f"{missing}: cannot be read: No such file or directory"
    (tmp_path / "folder.yaml").mkdir()
    assert complaint([str(tmp_path / "folder.yaml")]).endswith("cannot be read: Is a directory")
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    assert "is not UTF-8 text" in complaint([str(tmp_path / "binary.yaml")])
