"""The peer of train_step_cpu.py: one LLaMA training step in transformers + torch. Runs in an environment of its own.

Two commands:

    make FOLDER SHAPE   writes a randomly initialised model (so that both sides start from the same weights)
    serve FOLDER ...    prints "ready", then for every line "N" on stdin runs N steps and prints their seconds,
                        CPU seconds and the last loss as JSON
"""

import json
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make(folder: str, shape: dict) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"],
        max_position_embeddings=shape["length"], rms_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def serve(folder: str, batch: int, length: int, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), 1e-8, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length + 1), generator=generator)
    torch.save(tokens, folder + "/tokens.pt")
    with open(folder + "/tokens.json", "w") as file:
        json.dump(tokens.tolist(), file)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, cpu_seconds = [], []
        for _ in range(int(line)):
            start, cpu_start = time.perf_counter(), time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": value}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], json.loads(sys.argv[3]))
    else:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
