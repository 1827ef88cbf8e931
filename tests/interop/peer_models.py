"""Runs in an interpreter with torch and transformers: makes tiny models of random weights, and what they compute.

    python peer_models.py FOLDER < cases.json     {name: {"class": "Llama", "config": {...}}, ...}
    python peer_models.py FOLDER open             computes logits of the models that are in FOLDER's folders

Each FOLDER/<name> gets config.json, model.safetensors and expected.npz: input_ids, logits, a greedy continuation of the
first 7 tokens, and gradients of the mean cross-entropy. `open` reads <name>/input_ids.npy and writes <name>/logits.npy;
a tensor that is missing or has no place ends it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def make(folder: Path, spec: dict) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, spec["class"] + "Config")(**spec["config"])
    kind = getattr(transformers, spec.get("model", spec["class"] + "ForCausalLM"))
    model = kind._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise, is_norm = torch.randn(weight.shape), "norm" in name or ".ln_" in name
            if name.endswith("bias"):
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(1 + 0.15 * noise if is_norm else noise * 1.1 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    ids = torch.randint(0, config.vocab_size, (2, 24))
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, config.vocab_size), ids[:, 1:].reshape(-1))
    loss.backward()
    gradients = {f"grad::{name}": p.grad.numpy() for name, p in model.named_parameters()}
    with torch.no_grad():
        whole = {"attention_mask": torch.ones_like(ids[:, :7]), "pad_token_id": 0}  # a 0 in the prompt is no padding
        tokens = model.generate(ids[:, :7], max_new_tokens=12, min_new_tokens=12, do_sample=False, **whole)
    arrays = {"input_ids": ids.numpy(), "logits": logits.detach().numpy(), "tokens": tokens.numpy()}
    np.savez(folder / "expected.npz", **arrays, **gradients)


def round_online(model: torch.nn.Module, settings: "transformers.BitNetQuantConfig") -> None:
    """Puts transformers' AutoBitLinear in the places where from_pretrained puts it, which needs accelerate for it."""
    from transformers.integrations.bitnet import AutoBitLinear

    if (settings.linear_class, settings.quantization_mode) != ("autobitlinear", "online"):
        raise SystemExit(f"found {settings}, expected autobitlinear online")
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    for name, old in linear:
        new = AutoBitLinear(old.in_features, old.out_features, old.bias is not None, online_quant=True)
        new.load_state_dict(old.state_dict())
        model.set_submodule(name, new)


def compute(folder: Path) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = transformers.AutoConfig.from_pretrained(folder)
    rounding = config.__dict__.pop("quantization_config", None)
    model, told = load(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if rounding:
        round_online(model, transformers.BitNetQuantConfig(**rounding))
    ids = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    if ids != [None] * 3:
        raise SystemExit(f"{folder}: found token ids {ids} in a model that came without a tokenizer")
    if wrong := {key: found for key, found in told.items() if found}:
        raise SystemExit(f"{folder}: {wrong}")
    with torch.no_grad():
        np.save(folder / "logits.npy", model(torch.from_numpy(np.load(folder / "input_ids.npy"))).logits.numpy())


if __name__ == "__main__":
    if sys.argv[2:] == ["open"]:
        for place in sorted(Path(sys.argv[1]).iterdir()):
            compute(place)
        sys.exit()
    for name, spec in json.load(sys.stdin).items():
        make(Path(sys.argv[1]) / name, spec)
