"""Presets have as many parameters as the published weights, which pins every size that makes one."""

import dataclasses

import jax
import pytest

from easylm_plus.errors import UserError
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
    "llama3.2-1b": 1_235_814_400,
    "codellama-34b": 33_743_970_304,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
}


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(Transformer(config))[0]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_size(name):
    assert count(preset(name)) == PUBLISHED[name]
    assert count(dataclasses.replace(preset(name), num_kv_heads=1)) != PUBLISHED[name]


def test_skywork_has_the_size_of_its_config():
    """52 layers of 4 H^2 + 3 H F and two norms, two tables, a norm; the report calls it 13B."""
    H, F, V = 4608, 12288, 65519
    assert count(preset("skywork-13b")) == 52 * (4 * H * H + 3 * H * F + 2 * H) + 2 * V * H + H


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="unknown model 'lama-7b': did you mean 'llama-7b'"):
        preset("lama-7b")
    assert len(set(PRESETS)) == len(PRESETS) > 15
