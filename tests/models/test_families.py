"""Presets have as many parameters as the published weights, which pins every size that makes one."""

import dataclasses

import jax
import pytest

from easylm_plus.errors import UserError
from easylm_plus.models.config import matmul_parameters
from easylm_plus.models.families import PRESETS, preset
from easylm_plus.models.transformer import Transformer, abstract_parameters

PUBLISHED = {  # elements in the released safetensors, tied heads once
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "codellama-7b": 6_738_546_688,
    "codellama-34b": 33_743_970_304,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "mixtral-8x7b": 46_702_792_704,
    "gpt2-124m": 124_439_808,
    "bitnet-2b4t": 2_412_820_480,
    "stablelm2-1.6b": 1_644_515_328,
}


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(Transformer(config))[0]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_size(name):
    assert count(preset(name)) == PUBLISHED[name]
    assert count(dataclasses.replace(preset(name), num_kv_heads=1)) != PUBLISHED[name]


ROUNDED = {  # billions, as the papers print them
    "palm-8b": "8.63", "palm-62b": "62.50", "palm-540b": "540.35", "gpt3-13b": "12.9", "gpt3-175b": "174.6",
    "yuan-m32": "39.94",
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_the_rounded_size_of_the_paper(name):
    """Rounded or cut off (PaLM's 540.356B is printed as 540.35). GPT-3's are those of its table D.1."""
    digits = len(ROUNDED[name].partition(".")[2])
    assert abs(count(preset(name)) / 1e9 - float(ROUNDED[name])) < 10**-digits


def test_a_token_meets_few_of_the_experts():
    """Mixtral: 13B active (arXiv:2401.04088); M32: 3.70B. Active: all weights but the experts not chosen."""
    for name, active in (("mixtral-8x7b", "12.88"), ("yuan-m32", "3.70")):
        c = preset(name)
        idle = c.num_layers * (c.num_experts - c.experts_per_token) * 3 * c.hidden_size * c.intermediate_size
        assert f"{(count(c) - idle) / 1e9:.2f}" == active
        in_blocks = count(c) - idle - (1 if c.tie_embeddings else 2) * c.vocab_size * c.hidden_size
        matrices = matmul_parameters(c) - c.vocab_size * c.hidden_size
        assert 0 < in_blocks - matrices < 1e6, "norms and biases"


def test_skywork_has_the_size_of_its_config():
    """52 layers of 4 H^2 + 3 H F and two norms, two tables, a norm; the report calls it 13B."""
    H, F, V = 4608, 12288, 65519
    assert count(preset("skywork-13b")) == 52 * (4 * H * H + 3 * H * F + 2 * H) + 2 * V * H + H


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="unknown model 'lama-7b': did you mean 'llama-7b'"):
        preset("lama-7b")
    assert len(PRESETS) > 40
