"""A model's config as the config.json of Hugging Face's DeepseekV3, and back. Imports no torch.

Reading is strict: what DeepseekV3 would compute and this model would not (YaRN, quantised weights, tied embeddings ...)
is refused by name, and a missing size is an error, because every writer of this format writes all sizes.
"""

from collections.abc import Mapping
from typing import Any, Final

from moe.config.model import EXPERTS_PER_GROUP_SCORE, MlaConfig, ModelConfig, MoeConfig

MODEL_TYPE: Final = "deepseek_v3"
NOT_IN_WEIGHTS: Final = ("mtp", "init")
"""Sections of the model's config that a folder of weights says nothing about."""

_LATENT_NORM_EPS = 1e-6  # fixed in DeepseekV3's code for the norms of the latents, whatever rms_norm_eps says

# Key of ModelConfig -> key of config.json, where the value is the same.
_SIZES: Final = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size",
    "attention.num_heads": "num_attention_heads",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.qk_nope_head_dim": "qk_nope_head_dim",
    "attention.qk_rope_head_dim": "qk_rope_head_dim",
    "attention.v_head_dim": "v_head_dim",
    "moe.num_experts": "n_routed_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.num_shared_experts": "n_shared_experts",
    "moe.expert_size": "moe_intermediate_size",
    "moe.first_dense_layers": "first_k_dense_replace",
    "moe.num_groups": "n_group",
    "moe.top_groups": "topk_group",
    "moe.normalize_gates": "norm_topk_prob",
    "moe.routed_scaling_factor": "routed_scaling_factor",
}

# Options of model.moe that DeepseekV3 does not have, and what it is.
_MOE_ONLY: Final = {"hash_layers": 0, "bias_domains": 1, "group_score": "biased", "output_norm": False}

# What this model always is; the released DeepSeek-V3 has the last three besides what transformers writes.
_ONLY: Final = {
    "rms_norm_eps": _LATENT_NORM_EPS,
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_interleave": True,
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}


def refuse_inexpressible(config: ModelConfig) -> None:
    """Refuse a model that ``DeepseekV3ForCausalLM`` would compute differently.

    Raises:
        ValueError: names every option that has no counterpart there, and the values that have one.
    """
    moe = config.moe
    problems = []
    if not isinstance(config.attention, MlaConfig):
        problems.append(f"model.attention.kind={config.attention.kind} (only mla)")
    elif config.attention.scale_latents:
        problems.append("model.attention.scale_latents=True (only False)")
    if config.norm_eps != _LATENT_NORM_EPS:
        problems.append(f"model.norm_eps={config.norm_eps} (only {_LATENT_NORM_EPS}, which it fixes for the latents)")
    if config.attention.qk_norm:
        problems.append("model.attention.qk_norm=True (only False)")
    if config.norm_placement != "pre":
        problems.append(f"model.norm_placement={config.norm_placement} (only pre)")
    if config.residual.kind != "plain":
        problems.append(f"model.residual.kind={config.residual.kind} (only plain)")
    if config.activation.kind != "swiglu":
        problems.append(f"model.activation.kind={config.activation.kind} (only swiglu)")
    problems += [
        f"model.moe.{key}={value} (only {only})"
        for key, only in _MOE_ONLY.items()
        if (value := getattr(moe, key)) != only
    ]
    problems += _number_of_experts_problems(moe)
    if moe.num_experts and moe.affinity != "sigmoid":
        problems.append(f"model.moe.affinity={moe.affinity} (only sigmoid)")
    if 0 < moe.num_experts < EXPERTS_PER_GROUP_SCORE:
        problems.append(f"model.moe.num_experts={moe.num_experts} (only 0, or at least {EXPERTS_PER_GROUP_SCORE})")
    if problems:
        raise ValueError(f"Hugging Face's DeepseekV3 cannot express {'; '.join(problems)}")


def _number_of_experts_problems(moe: MoeConfig) -> list[str]:
    """Options that let tokens differ in how many experts they pass."""
    problems = []
    if moe.num_identity_experts:
        problems.append(f"model.moe.num_identity_experts={moe.num_identity_experts} (only 0)")
    if moe.selection.kind != "top_k":
        problems.append(f"model.moe.selection.kind={moe.selection.kind} (only top_k)")
    return problems


def hf_config(config: ModelConfig) -> dict[str, object]:
    """The content of config.json for ``transformers.DeepseekV3Config``; ``config.vocab_size`` must be set.

    It says nothing about special tokens and the longest sequence, which belong to the tokenizer and the data.

    Raises:
        ValueError: the model cannot be expressed, or has no vocabulary size.
    """
    refuse_inexpressible(config)
    if config.vocab_size is None:
        raise ValueError("model.vocab_size must be set before the model is exported")
    moe = config.moe
    # Where every group is chosen, groups decide nothing; one group says the same and may be of any size there.
    groups = (moe.num_groups, moe.top_groups) if moe.top_groups < moe.num_groups else (1, 1)
    tree = config.model_dump(mode="json")
    sizes = {theirs: _at(tree, ours) for ours, theirs in _SIZES.items()}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": MODEL_TYPE,
        **sizes,
        "num_key_value_heads": sizes["num_attention_heads"],
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_interleave": True,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "first_k_dense_replace": moe.first_dense_layers if moe.num_experts else config.num_layers,
        "n_group": groups[0],
        "topk_group": groups[1],
        "num_nextn_predict_layers": 0,
        "initializer_range": config.init.std,
        "tie_word_embeddings": False,
        # Their defaults are ids of DeepSeek's tokenizer; whoever knows this model's tokenizer fills them in.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def model_from_hf(content: Mapping[str, Any]) -> ModelConfig:
    """The inverse of ``hf_config``; also of what others wrote for the same architecture.

    Sections in ``NOT_IN_WEIGHTS`` are left at their defaults. Code that ``auto_map`` names is never looked at.

    Raises:
        ValueError: another architecture, a missing size, or a setting that this model does not have; names the keys.
    """
    if content.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type is {content.get('model_type')!r}; only {MODEL_TYPE} can be read")
    wrong = [f"{key}={content[key]} (only {only})" for key, only in _ONLY.items() if content.get(key, only) != only]
    heads = content.get("num_attention_heads")
    if content.get("num_key_value_heads") not in (None, heads):
        wrong.append(f"num_key_value_heads={content['num_key_value_heads']} (only num_attention_heads, {heads})")
    if content.get("quantization_config") is not None:
        wrong.append("quantization_config (only fp32, bf16 or fp16 weights)")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        wrong.append(f"rope type {rope_type} (only default)")
    if wrong:
        raise ValueError(f"this model does not have {'; '.join(wrong)}")
    if missing := [theirs for theirs in _SIZES.values() if theirs not in content]:
        raise ValueError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    tree: dict[str, Any] = {"attention": {"kind": "mla"}, "moe": {}}
    for ours, theirs in _SIZES.items():
        section, _, key = ours.rpartition(".")
        (tree[section] if section else tree)[key] = content[theirs]
    tree["rope_theta"] = rope.get("rope_theta", content.get("rope_theta", ModelConfig().rope_theta))
    if tree["moe"]["first_dense_layers"] >= tree["num_layers"]:
        tree["moe"]["num_experts"] = 0
    config = ModelConfig.model_validate(tree)
    refuse_inexpressible(config)
    return config


def _at(tree: Mapping[str, Any], dotted: str) -> Any:
    value: Any = tree
    for key in dotted.split("."):
        value = value[key]
    return value
