"""Measuring other people's weights: they name no data, so the command has to."""

import json
import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a model of random weights, with a tokenizer and a chat template."""
    model, params = tiny.model(vocab=300)
    c, place = model.config, tmp_path_factory.mktemp("hub") / "llama"
    shutil.copytree(tiny.data() / "tokenizer", place)
    save_file({name: np.ascontiguousarray(x) for name, x in tiny.under_their_names(params, c).items()},
              place / "model.safetensors")  # fmt: skip
    described = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "max_position_embeddings": 64, "rms_norm_eps": c.norm_eps, "hidden_act": "silu",
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(described))
    names = {"chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (place / "tokenizer_config.json").write_text(json.dumps(names))
    return place


def evaluate(*arguments):
    return tiny.run(*arguments, door="easylm_plus.evaluate")


def test_without_data_it_asks_for_them(folder):
    status, output = evaluate(f"--checkpoint={folder}")
    assert status == 1
    assert output == (
        f"evaluate.py: error: --data is not set, and {folder} does not name any: expected a prepared folder\n"
    )


def test_with_data_it_measures(folder, tmp_path):
    where = f"--output={tmp_path / 'figures.json'}"
    status, output = evaluate(
        f"--checkpoint={folder}", f"--data={tiny.data()}", "--examples=4", "--max_new_tokens=4", where
    )
    assert status == 0 and "eval/loss" in output, output[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["eval/loss"] == pytest.approx(np.log(300), abs=1.5), "random weights know nothing"
    assert {"eval/loss/sums", "eval/loss/letters", "exact/sums", "exact/letters"} <= set(figures)


def test_a_folder_that_holds_no_data_is_named(folder, tmp_path):
    status, output = evaluate(f"--checkpoint={folder}", f"--data={tmp_path}")
    assert status == 1 and output.count("\n") == 1 and str(tmp_path) in output, output[-2000:]
