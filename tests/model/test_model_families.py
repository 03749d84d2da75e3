"""Every family: transformers' class and ours compute the same logits, in both directions of conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaxelm.errors import ModelError
from megaxelm.model.config import config_from_recipe, num_parameters
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import check_export, load_pretrained, save_pretrained
from megaxelm.recipe import ModelConfig

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 16.0}
SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 96}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 6, "vocab_size": 256}),
    "llama-gqa-tied-odd-vocab": ("Llama", {"num_key_value_heads": 2, "vocab_size": 301, "tie_word_embeddings": True}),
    "llama-biases-head-size": (
        "Llama",
        {"num_key_value_heads": 3, "vocab_size": 131, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama-linear-rope": ("Llama", {"vocab_size": 130, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "llama3-rope": ("Llama", {"vocab_size": 130, "num_key_value_heads": 1, "head_dim": 32, "rope_parameters": LLAMA3}),
    "qwen3-yarn-rope": ("Qwen3", {"vocab_size": 130, "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": YARN}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "vocab_size": 257, "sliding_window": None}),
    "mistral-window": ("Mistral", {"num_key_value_heads": 2, "vocab_size": 257, "sliding_window": 7, "head_dim": 20}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5}),
    "qwen2-tied-window": (
        "Qwen2",
        {
            "num_key_value_heads": 6,
            "vocab_size": 384,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
        },
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "vocab_size": 300, "head_dim": 16}),
    "qwen3-bias-tied": (
        "Qwen3",
        {"num_key_value_heads": 6, "vocab_size": 299, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, "vocab_size": 257, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-tied-window-one-expert-a-token": (
        "Mixtral",
        {
            "num_key_value_heads": 6,
            "vocab_size": 131,
            "head_dim": 16,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "sliding_window": 7,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 2,
            "vocab_size": 300,
            "head_dim": 16,
            "moe_intermediate_size": 40,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "xglm": ("XGLM", {"vocab_size": 301}),
    "xglm-tanh-unscaled-untied": (
        "XGLM",
        {"vocab_size": 256, "scale_embedding": False, "activation_function": "gelu_new", "tie_word_embeddings": False},
    ),
    # A padding id above the offset zeroes the vector of a position that is used.
    "xglm-late-padding-id": ("XGLM", {"vocab_size": 140, "pad_token_id": 9}),
}
XGLM_SIZES = {"d_model": 48, "ffn_dim": 80, "num_layers": 3, "attention_heads": 6, "max_position_embeddings": 96}
LENGTHS = [40, 1, 17, 96, 5]


def foreign_model(case: str) -> Any:
    name, options = CASES[case]
    torch.manual_seed(len(case))
    sizes = XGLM_SIZES if name == "XGLM" else SMALL
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        getattr(transformers, f"{name}Config")(**{**sizes, **options}), attn_implementation="eager"
    )
    for parameter in model.parameters():
        # Biases start at zero and norms at one: a lost one would not show.
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3 if parameter.ndim == 1 else 0.15)
    return model.eval()


def packed(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return tokens, torch.cat([torch.arange(n) for n in LENGTHS]), torch.tensor([0, *LENGTHS]).cumsum(0)


@torch.no_grad()
def foreign_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(document[None]).logits[0] for document in tokens.split(LENGTHS)])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_agree_with_transformers_both_ways(case: str, tmp_path: Path) -> None:
    theirs = foreign_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    tokens, positions, cu_seqlens = packed(ours.config.vocab_size)
    expected = foreign_logits(theirs, tokens)
    logits = ours.logits(ours(tokens, positions, cu_seqlens))
    assert logits.shape == expected.shape
    assert expected.std() > 0.1, "logits too small for the bound to mean something"
    assert (logits - expected).abs().max() < 1e-4

    save_pretrained(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    assert (foreign_logits(again, tokens) - expected).abs().max() < 1e-4
    assert num_parameters(ours.config) == again.num_parameters()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "xglm"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_recipes_model_exports_and_reloads(family: str, tied: bool, tmp_path: Path) -> None:
    model = ModelConfig(
        family=family, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=40, max_positions=64, tie_embeddings=tied
    )  # type: ignore[arg-type]
    config = config_from_recipe(model, vocab_size=333, bos=1, eos=2, pad=3)
    decoder = Decoder(config)
    decoder.initialise(0)
    save_pretrained(decoder, tmp_path)
    assert check_export(tmp_path, decoder, [[1, 5, 9, 332, 2], [1] + [7] * 30]) < 1e-6
    reloaded = load_pretrained(tmp_path).config
    assert {name: reloaded.extra[name] for name in config.extra} == config.extra
    assert (reloaded.vocab_size, reloaded.tie_embeddings, reloaded.sliding_window) == (333, tied, None)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 3)


def test_rope_theta_in_the_old_place_is_read() -> None:
    from megaxelm.model.families import get_family

    raw = {"model_type": "llama", "rope_theta": 123456.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = get_family("llama").config_from_hf(raw)
    assert config.rope_theta == 123456.0
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4}, "max_window_layers"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "experts_per_token = 3 of num_experts = 2"),
        ({"model_type": "xglm", "activation_function": "relu"}, "activation_function"),
        ({"model_type": "xglm", "layerdrop": 0.1}, "layerdrop"),
        ({"model_type": "llama", "vocab_size": "many"}, "vocab_size"),
    ],
)
def test_what_the_decoder_does_not_have_is_refused_by_name(raw: dict[str, Any], field: str) -> None:
    from megaxelm.model.families import get_family

    with pytest.raises(ModelError, match=field):
        get_family(raw["model_type"]).config_from_hf(raw)


def test_an_unknown_family_lists_the_known() -> None:
    from megaxelm.model.families import get_family

    with pytest.raises(ModelError, match="gpt2.*llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, xglm"):
        get_family("gpt2")


def test_a_decoder_that_a_family_cannot_express_is_not_exported(tmp_path: Path) -> None:
    config = config_from_recipe(ModelConfig(family="qwen3", hidden_size=32, num_heads=4, num_layers=1), 300, 1, 2, 3)
    from dataclasses import replace

    with pytest.raises(ModelError, match="llama family has qk_norm"):
        save_pretrained(Decoder(replace(config, family="llama")), tmp_path)
