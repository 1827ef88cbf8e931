"""llama.cpp, through llama-cpp-python, in an environment of its own: reads one JSON object, writes arrays and JSON.

    python tests/engine_peer.py REQUEST.json ANSWER.npz

    model     a GGUF file
    texts     made into tokens, without bos and without special tokens in the text
    chat      messages, laid out by the file's own template
    prompts   lists of ids, each continued greedily by `new` tokens
    batch     tokens that are evaluated at once; 1: one by one
    repack    whether weights may be laid out otherwise for this processor (as for AMX)
    mmap      whether the file is mapped

The answer: tokens::i of text i, ids::i of prompt i with what was generated, logits::i [T, V] of all of them but the
last, and `told`, JSON of what the engine says of the file and of the memory that it takes, in kB.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

F32 = 0  # ggml's type of the cache of keys and values


def resident() -> dict[str, int]:
    """Memory of this process in kB: all, what is its own, what is mapped from files."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {key[:-1]: int(value) for key, value, _ in (line for line in lines if line[0][:3] in ("VmR", "Rss"))}


def opened(request: dict) -> llama_cpp.Llama:
    default = llama_cpp.llama_model_default_params

    def parameters() -> llama_cpp.llama_model_params:
        chosen = default()
        chosen.use_extra_bufts = request.get("repack", True)
        return chosen

    llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = parameters
    batch = request.get("batch", 512)
    return llama_cpp.Llama(
        request["model"], n_ctx=request.get("context", 256), n_batch=batch, n_ubatch=batch, n_threads=1,
        n_threads_batch=1, logits_all=True, type_k=F32, type_v=F32, flash_attn=False,
        use_mmap=request.get("mmap", True), verbose=False,
    )  # fmt: skip


def continued(model: llama_cpp.Llama, prompt: list[int], new: int) -> tuple[list[int], np.ndarray]:
    """(the prompt and the greedy tokens after it, logits of all but the last)."""
    model.reset()
    ids = list(prompt)
    model.eval(ids)
    for _ in range(new):
        ids.append(int(np.argmax(model.scores[len(ids) - 1])))
        if len(ids) < len(prompt) + new:
            model.eval(ids[-1:])
    return ids, np.array(model.scores[: len(ids) - (1 if new else 0)], np.float32)


def main(request: dict, answer: str) -> None:
    before = resident()
    model = opened(request)
    loaded = resident()
    arrays = {}
    for i, text in enumerate(request.get("texts", ())):
        arrays[f"tokens::{i}"] = np.array(model.tokenize(text.encode(), add_bos=False, special=False), np.int32)
    for i, prompt in enumerate(request.get("prompts", ())):
        arrays[f"ids::{i}"], arrays[f"logits::{i}"] = continued(model, prompt, request.get("new", 0))
    told = {"metadata": model.metadata, "before": before, "loaded": loaded, "used": resident()}
    told |= {"bos": model.token_bos(), "eos": model.token_eos()}
    told["with_bos"] = model.tokenize(b"a", add_bos=True, special=False)
    if "chat" in request:
        piece = lambda i: model._model.token_get_text(i)
        form = Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], piece(told["eos"]), piece(told["bos"]))
        prompt = form(messages=request["chat"]).prompt
        told["chat"] = model.tokenize(prompt.encode(), add_bos=False, special=True)
    arrays["told"] = np.array(json.dumps(told))
    np.savez(answer, **arrays)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
