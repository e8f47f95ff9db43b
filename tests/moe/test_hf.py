import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moe.batch import Batch
from moe.config.hf import NOT_IN_WEIGHTS, hf_config, model_from_hf, refuse_inexpressible
from moe.config.model import ModelConfig
from moe.hf import from_hf, rows_from_hf, shapes_in_hf, to_hf
from moe.layers import attention
from moe.layers.router import Router, Routing
from moe.model import Transformer
from tests.moe.build import ALONE, build_model, random_ids, small_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

# transformers fills the shared expert of width 0 that it always builds.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

GROUPS = {"num_groups": 4, "top_groups": 2}
# With every bias below -1 every biased affinity is negative: a mask of 0 instead of -inf would pick barred experts.
NEGATIVE = (-2.0, -1.2)
MIXED = (-0.3, 0.3)

CASES: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "one dense layer": ({}, MIXED),
    "no dense layer": ({"moe": {"first_dense_layers": 0}}, MIXED),
    "two dense layers": ({"moe": {"first_dense_layers": 2}}, MIXED),
    "groups": ({"moe": GROUPS}, MIXED),
    "groups, negative scores": ({"moe": GROUPS}, NEGATIVE),
    "every group chosen, one expert each": ({"moe": {"num_groups": 16, "top_groups": 16}}, MIXED),
    "no shared expert": ({"moe": {"num_shared_experts": 0}}, MIXED),
    "two shared experts": ({"moe": {"num_shared_experts": 2}}, MIXED),
    "compressed queries": ({"attention": {"q_lora_rank": 12}}, MIXED),
    "scaled experts": ({"moe": {"routed_scaling_factor": 2.5}}, MIXED),
    "gates not normalised": ({"moe": {"normalize_gates": False}}, MIXED),
    "value wider than query": ({"attention": {"v_head_dim": 20}}, MIXED),
    "other rotary base": ({"rope_theta": 500.0}, MIXED),
    "multi-token prediction, left behind": ({"mtp": {"depth": 1}}, MIXED),
    "dense model": ({"moe": {"num_experts": 0}}, MIXED),
    "other starting weights": ({"init": {"embedding_std": 1.0, "output_scale": "depth"}}, MIXED),
    "all of deepseek-v3": (
        {"attention": {"q_lora_rank": 12}, "moe": {**GROUPS, "routed_scaling_factor": 2.5}, "mtp": {"depth": 1}},
        NEGATIVE,
    ),
}
BY_CASE = pytest.mark.parametrize(("changes", "bias"), CASES.values(), ids=CASES.keys())


def written(model: Transformer, folder: Path) -> Any:
    """transformers' model, loaded from a folder that holds ours."""
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    save_file(to_hf(model.state_dict(), model.config), folder / "model.safetensors", metadata={"format": "pt"})
    theirs, info = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    return theirs


def our_logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every position of ``ids``; the positions that only serve as targets are made up."""
    ahead = F.pad(ids, (0, 1 + model.config.mtp.depth))
    logits: torch.Tensor = model(Batch(ahead)).logits
    return logits


def their_gradients(theirs: Any) -> dict[str, torch.Tensor]:
    """Gradients by on-disk name; in memory the experts of a layer are two tensors."""
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in theirs.named_parameters():
        for expert, part in enumerate(parameter.grad) if ".experts." in name else ():
            prefix = name.rpartition(".")[0] + f".{expert}"
            if name.endswith("gate_up_proj"):
                gradients[f"{prefix}.gate_proj.weight"], gradients[f"{prefix}.up_proj.weight"] = part.chunk(2)
            else:
                gradients[f"{prefix}.down_proj.weight"] = part
        if ".experts." not in name:
            gradients[name] = parameter.grad
    return gradients


@BY_CASE
def test_transformers_computes_the_same_logits_and_gradients(
    changes: dict[str, Any], bias: tuple[float, float], tmp_path: Path
) -> None:
    config = small_config(**changes)
    ours = build_model(config, bias=bias)
    theirs = written(ours, tmp_path)
    ids = random_ids(3, 24)
    targets = random_ids(3, 24, seed=2)

    logits = {"ours": our_logits(ours, ids), "theirs": theirs(ids).logits}
    for values in logits.values():
        F.cross_entropy(values.flatten(0, 1), targets.flatten()).backward()

    assert logits["ours"].std() > 0.1
    assert (logits["ours"] - logits["theirs"]).abs().max() <= 1e-4
    state = {name: torch.zeros_like(tensor) for name, tensor in ours.state_dict().items()}
    state |= {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = their_gradients(theirs)
    found = {name: tensor for name, tensor in to_hf(state, config).items() if "correction_bias" not in name}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def _bias_in_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Routing] = Router.forward

    def forward(self: Router, *args: Any) -> Routing:
        routing = right(self, *args)
        gates = (routing.affinity_TE + self.expert_bias_E).gather(1, routing.ids_TK)
        return replace(routing, gates_TK=gates / gates.sum(dim=-1, keepdim=True) * self.config.routed_scaling_factor)

    monkeypatch.setattr(Router, "forward", forward)


def _zero_for_barred_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.masked_fill
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda self, mask, value: right(self, mask, max(value, 0.0)))


def _rotary_halves_instead_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        return torch.cat(torch.view_as_real(torch.complex(*x.chunk(2, dim=-1)) * turns).unbind(-1), dim=-1)

    monkeypatch.setattr(attention, "rotate", rotate)


@pytest.mark.parametrize("plant", [_bias_in_the_gate, _zero_for_barred_groups, _rotary_halves_instead_of_pairs])
def test_a_planted_mistake_breaks_the_parity(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = build_model(small_config(moe=GROUPS), bias=NEGATIVE)
    theirs = written(ours, tmp_path)
    ids = random_ids(3, 24)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (our_logits(ours, ids) - expected).abs().max() <= 1e-4
        plant(monkeypatch)
        assert (our_logits(ours, ids) - expected).abs().max() > 1e-2


@BY_CASE
def test_there_and_back_is_exact(changes: dict[str, Any], bias: tuple[float, float]) -> None:
    config = small_config(**changes)
    state = build_model(config, bias=bias).state_dict()
    back = from_hf(to_hf(state, config), config)
    assert back.keys() == {name for name in state if not name.startswith("mtp.")}
    assert all(torch.equal(back[name], state[name]) for name in back)


def shape_of(config: ModelConfig) -> dict[str, Any]:
    """What weights tell of a model, with what decides nothing made alike."""
    shape = config.model_dump(exclude=set(NOT_IN_WEIGHTS))
    moe = shape["moe"]
    if moe["num_experts"] == 0:
        moe["first_dense_layers"] = None
    if moe["num_groups"] == moe["top_groups"]:
        moe["num_groups"] = moe["top_groups"] = 1
    return shape


@BY_CASE
def test_config_json_gives_the_model_back_whoever_wrote_it(
    changes: dict[str, Any], bias: tuple[float, float], tmp_path: Path
) -> None:
    config = small_config(**changes)
    content = hf_config(config)
    assert shape_of(model_from_hf(content)) == shape_of(config)
    raw = {name: value for name, value in content.items() if name not in ("architectures", "model_type")}
    transformers.DeepseekV3Config(**raw).save_pretrained(tmp_path)
    assert shape_of(model_from_hf(json.loads((tmp_path / "config.json").read_text()))) == shape_of(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only deepseek_v3 can be read"),
        ({"model_type": None}, "model_type is None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 40}}, r"rope type yarn \(only default\)"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, r"rope type yarn \(only default\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings=True \(only False\)"),
        ({"hidden_act": "gelu"}, r"hidden_act=gelu \(only silu\)"),
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps=1e-05 \(only 1e-06\)"),
        ({"rope_interleave": False}, r"rope_interleave=False \(only True\)"),
        ({"scoring_func": "softmax", "moe_layer_freq": 2}, r"scoring_func=softmax .*; moe_layer_freq=2 \(only 1\)"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads=1 \(only num_attention_heads, 2\)"),
        ({"kv_lora_rank": "absent", "n_group": "absent"}, "kv_lora_rank, n_group are missing"),
    ],
)
def test_a_model_that_this_one_cannot_be_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    content = {key: value for key, value in (hf_config(small_config()) | change).items() if value != "absent"}
    with pytest.raises(ValueError, match=named):
        model_from_hf(content)


def test_the_keys_of_the_released_config_are_understood() -> None:
    """deepseek-ai/DeepSeek-V3 writes these besides the sizes, and the rotary base outside of any mapping."""
    released = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "seq_aux": True,
    }
    auto = {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}
    content = hf_config(small_config()) | released | auto | {"rope_theta": 5e5, "num_nextn_predict_layers": 1}
    del content["rope_parameters"], content["rope_interleave"]
    assert model_from_hf(content) == small_config(rope_theta=5e5)


class Watched(dict[str, torch.Tensor]):
    """Remembers which tensors are looked up."""

    def __init__(self, content: dict[str, torch.Tensor]) -> None:
        super().__init__(content)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return super().__getitem__(name)


def test_a_rank_reads_of_the_experts_only_its_own() -> None:
    config = small_config()
    state = build_model(config).state_dict()
    theirs = Watched(to_hf(state, config))
    rows = {name: slice(0, len(tensor)) for name, tensor in state.items()}
    rows |= {name: slice(4, 8) for name in state if ".experts." in name} | {"norm.weight": slice(3, 20)}
    for name, tensor in rows_from_hf(theirs, config, rows):
        assert torch.equal(tensor, state[name][rows.pop(name)]), name
    assert rows == {}
    experts = {int(name.split(".experts.")[1].split(".")[0]) for name in theirs.read if ".experts." in name}
    assert experts == {4, 5, 6, 7}
    assert len(theirs.read) == len(set(theirs.read))


@BY_CASE
def test_shapes_are_those_of_the_tensors(changes: dict[str, Any], bias: tuple[float, float]) -> None:
    config = small_config(**changes)
    expected = to_hf(build_model(config, bias=bias).state_dict(), config)
    assert shapes_in_hf(config) == {name: tuple(tensor.shape) for name, tensor in expected.items()}


@pytest.mark.parametrize("shared", [0, 1])
def test_a_checkpoint_saved_by_transformers_is_read(shared: int, tmp_path: Path) -> None:
    config = small_config(attention={"q_lora_rank": 12}, moe={**GROUPS, "num_shared_experts": shared})
    torch.manual_seed(0)
    raw = {name: value for name, value in hf_config(config).items() if name not in ("architectures", "model_type")}
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**raw | {"initializer_range": 0.1}))
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")

    ours = Transformer(config, ALONE)
    ours.load_state_dict(from_hf(saved, config))
    again = to_hf(ours.state_dict(), config)

    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    ids = random_ids(2, 16)
    with torch.no_grad():
        assert (our_logits(ours, ids) - theirs(ids).logits).abs().max() <= 1e-4


def test_dtypes_survive() -> None:
    config = small_config()
    state = build_model(config).state_dict()
    cast = {name: t if name.endswith("expert_bias_E") else t.bfloat16() for name, t in state.items()}
    for name, tensor in to_hf(cast, config).items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention": {"kind": "mha"}}, r"model\.attention\.kind=mha \(only mla\)"),
        ({"moe": {"affinity": "softmax"}}, r"model\.moe\.affinity=softmax \(only sigmoid\)"),
        ({"norm_eps": 1e-5}, r"model\.norm_eps=1e-05"),
        ({"norm_placement": "sandwich"}, r"model\.norm_placement=sandwich \(only pre\)"),
        ({"norm_placement": "reordered"}, r"model\.norm_placement=reordered \(only pre\)"),
        ({"attention": {"qk_norm": True}}, r"model\.attention\.qk_norm=True \(only False\)"),
        ({"attention": {"scale_latents": True}}, r"model\.attention\.scale_latents=True \(only False\)"),
        ({"attention": {"kind": "mha", "qk_norm": True}}, r"kind=mha \(only mla\); model\.attention\.qk_norm=True"),
        ({"residual": {"kind": "hyper"}}, r"model\.residual\.kind=hyper \(only plain\)"),
        ({"residual": {"kind": "mhc"}}, r"model\.residual\.kind=mhc \(only plain\)"),
        ({"activation": {"kind": "swiglu_clamp"}}, r"model\.activation\.kind=swiglu_clamp \(only swiglu\)"),
        ({"activation": {"kind": "situ_glu"}}, r"model\.activation\.kind=situ_glu \(only swiglu\)"),
        ({"moe": {"hash_layers": 1}}, r"model\.moe\.hash_layers=1 \(only 0\)"),
        ({"moe": {"bias_domains": 2}}, r"model\.moe\.bias_domains=2 \(only 1\)"),
        (
            {"moe": {"num_groups": 4, "top_groups": 2, "group_score": "unbiased"}},
            r"model\.moe\.group_score=unbiased \(only biased\)",
        ),
        ({"moe": {"output_norm": True}}, r"model\.moe\.output_norm=True \(only False\)"),
        ({"moe": {"num_identity_experts": 4}}, r"model\.moe\.num_identity_experts=4 \(only 0\)"),
        ({"moe": {"selection": {"kind": "threshold"}}}, r"model\.moe\.selection\.kind=threshold \(only top_k\)"),
        ({"moe": {"num_experts": 1, "top_k": 1}}, r"model\.moe\.num_experts=1 "),
        ({"attention": {"kind": "mha"}, "moe": {"affinity": "softmax"}}, "kind=mha.*; .*affinity=softmax"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    config = small_config(**changes)
    state = build_model(config).state_dict()
    refusals: list[Callable[[ModelConfig], object]] = [
        refuse_inexpressible,
        hf_config,
        lambda c: to_hf(state, c),
        lambda c: from_hf({}, c),
    ]
    for refusal in refusals:
        with pytest.raises(ValueError, match=named):
            refusal(config)


def test_softmax_does_not_matter_where_there_is_no_router() -> None:
    refuse_inexpressible(small_config(moe={"num_experts": 0, "affinity": "softmax"}))


def test_a_missing_or_unknown_tensor_is_refused_by_name() -> None:
    config = small_config()
    state = build_model(config).state_dict()
    theirs = to_hf(state, config)
    with pytest.raises(ValueError, match=r"lacks tensors \(1\): head\.weight"):
        to_hf({name: t for name, t in state.items() if name != "head.weight"}, config)
    with pytest.raises(ValueError, match=r"has unknown tensors \(1\): layers\.7\.norm\.weight"):
        to_hf(state | {"layers.7.norm.weight": state["norm.weight"]}, config)
    with pytest.raises(ValueError, match=r"lacks tensors \(1\): lm_head\.weight"):
        from_hf({name: t for name, t in theirs.items() if name != "lm_head.weight"}, config)
    with pytest.raises(
        ValueError, match=r"has unknown tensors \(1\): model\.layers\.1\.mlp\.experts\.16\.up_proj\.weight"
    ):
        from_hf(theirs | {"model.layers.1.mlp.experts.16.up_proj.weight": torch.zeros(1)}, config)


def test_a_vocabulary_size_is_needed() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        hf_config(small_config(vocab_size=None))
