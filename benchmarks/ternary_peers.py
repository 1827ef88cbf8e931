"""The peers of ternary_decode.py, each in an environment of its own.

    float32|bfloat16 FOLDER --threads=N    transformers' BitNetForCausalLM, with the codes' values as plain weights
    MODEL.gguf FOLDER --threads=N          llama.cpp through its Python bindings

Both print "ready", then answer each line "N" on stdin with the seconds that one of N decoded tokens took, and the
tokens, as JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def torch_side(dtype: str, folder: Path, threads: int):
    import torch
    from transformers import BitNetConfig, BitNetForCausalLM

    torch.set_num_threads(threads)
    s = json.loads((folder / "shape.json").read_text())
    config = BitNetConfig(
        vocab_size=s["vocab"], hidden_size=s["hidden"], intermediate_size=s["ffn"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["heads"], hidden_act="silu", rms_norm_eps=s["eps"],
        rope_theta=s["theta"], tie_word_embeddings=True, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    kind = getattr(torch, dtype)
    torch.set_default_dtype(kind)
    model = BitNetForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(np.load(folder / "table.npy")))
        for i, layer in enumerate(model.model.layers):
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                codes = np.load(folder / f"{i}.{name}.npy").astype(np.float32)
                holder = layer.self_attn if name in "qkvo" else layer.mlp
                weight = getattr(holder, f"{name}_proj").weight
                weight.copy_(torch.from_numpy(codes.T * np.float32(len(codes) ** -0.5)))
    prompt = torch.arange(3, 3 + s["prompt"])[None]

    def timed(count):
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, use_cache=True,
                pad_token_id=0,
            )  # fmt: skip
        return time.perf_counter() - start, out[0, prompt.shape[1] :].tolist()

    def decode(count):
        first = min(timed(1)[0] for _ in range(3))
        whole, tokens = timed(1 + count)
        return (whole - first) / count, tokens

    return decode, s["tokens"]


def engine_side(model_path: str, folder: Path, threads: int):
    import llama_cpp

    s = json.loads((folder / "shape.json").read_text())
    slots = s["prompt"] + s["tokens"] + 8
    llama = llama_cpp.Llama(model_path, n_ctx=slots, n_threads=threads, n_threads_batch=threads, verbose=False)

    def evaluate(tokens):
        """The likeliest next token, by the library's own calls: the bindings' Python would be most of the time."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(array, len(tokens)))
        assert status == 0, status
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (s["vocab"],))
        return int(logits.argmax())

    def decode(count):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        tokens = [evaluate(list(range(3, 3 + s["prompt"])))]
        start = time.perf_counter()
        for _ in range(count):
            tokens.append(evaluate(tokens[-1:]))
        return (time.perf_counter() - start) / count, tokens

    return decode, s["tokens"]


if __name__ == "__main__":
    what, place, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3].removeprefix("--threads="))
    side = engine_side if what.endswith(".gguf") else torch_side
    decode, count = side(what, place, threads)
    decode(count)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, tokens = decode(int(line))
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)
