"""Runs in an interpreter with torch and transformers: makes tiny models of random weights, and what they compute.

    python peer_models.py FOLDER < cases.json     {name: {"class": "Llama", "config": {...}}, ...}

Each FOLDER/<name> gets config.json, model.safetensors and expected.npz: input_ids, logits, a greedy continuation of the
first 7 tokens, and gradients of the mean cross-entropy.
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
    model = getattr(transformers, spec["class"] + "ForCausalLM")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape)
            weight.copy_(1 + 0.15 * noise if "norm" in name else noise * 1.1 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    ids = torch.randint(0, config.vocab_size, (2, 24))
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, config.vocab_size), ids[:, 1:].reshape(-1))
    loss.backward()
    gradients = {f"grad::{name}": p.grad.numpy() for name, p in model.named_parameters()}
    with torch.no_grad():
        tokens = model.generate(ids[:, :7], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    arrays = {"input_ids": ids.numpy(), "logits": logits.detach().numpy(), "tokens": tokens.numpy()}
    np.savez(folder / "expected.npz", **arrays, **gradients)


if __name__ == "__main__":
    for name, spec in json.load(sys.stdin).items():
        make(Path(sys.argv[1]) / name, spec)
