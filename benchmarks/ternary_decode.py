"""Decoding a ternary model on a CPU: ours against our own floats, transformers and llama.cpp, alternately in one run.

    python benchmarks/ternary_decode.py --peer=PYTHON --engine=PYTHON --threads=1,2

The model is BitNet's shape, 276M weights with 8 layers: random ternary matrices and a random tied table, the same
numbers for all sides. Sides are processes that hold their model, decode when told to and wait otherwise:

    packed         ours: 2 bits a weight through the CPU kernel, table in int8 rows
    float32, bf16  ours: the same values as floats, table too
    torch-*        transformers' BitNetForCausalLM and `generate` with its cache (--peer; README.md)
    llama.cpp      TQ2_0 with an F16 table, through llama-cpp-python (--engine)

A round decodes --tokens greedily after a prompt of --prompt tokens; what the prompt takes is measured and subtracted,
so a time is that of attention, cache, matrices, head and choice of the next token. Threads are given by processor
affinity, so each side sees a machine of so many cores. The load average is printed: on a busy machine the figures are
noise.

Rounded activations and an F16 table make a random model's tokens differ soon; how many first ones agree is printed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from own_step import with_huge_pages

LAYERS = flags.DEFINE_integer("layers", 8, "of the model")
VOCAB = flags.DEFINE_integer("vocab", 32000, "of the model")
PEER = flags.DEFINE_string("peer", None, "interpreter with torch and transformers; none: not measured")
ENGINE = flags.DEFINE_string("engine", None, "interpreter with llama_cpp; none: not measured")
SIDES = flags.DEFINE_list("sides", ["packed", "float32", "bf16"], "of ours")
TORCH = flags.DEFINE_list("torch", ["float32", "bfloat16"], "dtypes of the peer")
THREADS = flags.DEFINE_list("threads", ["1", "2"], "threads of each side, one after the other")
TOKENS = flags.DEFINE_integer("tokens", 64, "decoded a round")
PROMPT = flags.DEFINE_integer("prompt", 16, "tokens before them")
ROUNDS = flags.DEFINE_integer("rounds", 7, "alternations")
SERVE = flags.DEFINE_string("serve", None, "a side, for the process that is one")
FOLDER = flags.DEFINE_string("folder", None, "where the weights are, for such a process")
HERE = Path(__file__).parent
SHAPE = {"hidden": 1536, "ffn": 4096, "heads": 24, "eps": 1e-6, "theta": 10000.0}
MATRICES = {"q": ("hidden", "hidden"), "k": ("hidden", "hidden"), "v": ("hidden", "hidden"), "o": ("hidden", "hidden"),
            "gate": ("hidden", "ffn"), "up": ("hidden", "ffn"), "down": ("ffn", "hidden")}  # fmt: skip


class Side:
    """A process that decodes when told to."""

    def __init__(self, command: list[str], threads: int):
        own = sorted(os.sched_getaffinity(0))[-threads:]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, own),
        )
        if (line := self.process.stdout.readline().strip()) != "ready":
            raise SystemExit(f"{command}: {line or 'ended'}")

    def __call__(self, tokens: int) -> dict[str, Any]:
        """{"seconds" a token, "tokens"}."""
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def write_weights(folder: Path) -> None:
    """codes int8[in, out] of each matrix, each with the scale in^-1/2, the table float32 and the shape."""
    rng = np.random.default_rng(0)
    shape = {**SHAPE, "layers": LAYERS.value, "vocab": VOCAB.value, "prompt": PROMPT.value, "tokens": TOKENS.value}
    (folder / "shape.json").write_text(json.dumps(shape))
    for layer in range(LAYERS.value):
        for name, (rows, columns) in MATRICES.items():
            codes = rng.integers(-1, 2, (shape[rows], shape[columns]), np.int8)
            np.save(folder / f"{layer}.{name}.npy", codes)
    np.save(folder / "table.npy", 0.5 * rng.standard_normal((VOCAB.value, SHAPE["hidden"]), np.float32))


def serve(decode: Any, count: int) -> None:
    """Answers each line "N" on stdin with one round; `decode` runs once before, to be warm."""
    decode(count)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, tokens = decode(int(line))
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


def own_side(kind: str, folder: Path) -> Any:
    """Ours: N -> (seconds a token, tokens)."""
    from easylm_plus.inference.generate import Generator
    from easylm_plus.models.config import ModelConfig
    from easylm_plus.models.transformer import Transformer
    from easylm_plus.numerics.kernels import choice
    from easylm_plus.numerics.precision import precision
    from easylm_plus.parallel.cluster import set_backend_flags

    set_backend_flags({"bf16": "bf16_pure"}.get(kind, "float32"), deterministic=False)
    s = json.loads((folder / "shape.json").read_text())
    config = ModelConfig(
        vocab_size=s["vocab"], hidden_size=s["hidden"], intermediate_size=s["ffn"], num_layers=s["layers"],
        num_heads=s["heads"], num_kv_heads=s["heads"], head_dim=s["hidden"] // s["heads"], norm_eps=s["eps"],
        tie_embeddings=True, sub_norms=True, scan_layers=False,
    )  # fmt: skip
    model = Transformer(config, precision("bf16_pure" if kind == "bf16" else "float32"))
    if kind == "packed":
        print(f"ternary products: {choice.told()}", file=sys.stderr)
    generator = Generator(model, own_parameters(kind, folder, s), ())
    prompt = list(range(3, 3 + s["prompt"]))

    def timed(count: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        tokens = generator([prompt], count)[0]
        return time.perf_counter() - start, tokens

    def decode(count: int) -> tuple[float, list[int]]:
        first = min(timed(1)[0] for _ in range(3))
        all_, tokens = timed(1 + count)
        return (all_ - first) / count, tokens

    return decode


def own_parameters(kind: str, folder: Path, s: dict[str, Any]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from easylm_plus.numerics.int8_rows import int8_rows
    from easylm_plus.numerics.packed_ternary import PackedTernary, pack

    dtype = jnp.bfloat16 if kind == "bf16" else jnp.float32

    def matrix(layer: int, name: str) -> dict[str, Any]:
        codes = np.load(folder / f"{layer}.{name}.npy")
        gamma = np.float32(len(codes) ** -0.5)
        if kind == "packed":
            return {"kernel": PackedTernary(jnp.asarray(pack(codes)), jnp.asarray(gamma), len(codes))}
        return {"kernel": jnp.asarray(codes * gamma, dtype)}

    def layer(i: int) -> dict[str, Any]:
        attention = {f"{name}_proj": matrix(i, name) for name in ("q", "k", "v", "o")}
        mlp = {f"{name}_proj": matrix(i, name) for name in ("gate", "up", "down")}
        ones = lambda width: {"weight": jnp.ones(s[width], dtype)}
        return {
            "input_layernorm": ones("hidden"), "post_attention_layernorm": ones("hidden"),
            "self_attn": {**attention, "attn_sub_norm": ones("hidden")}, "mlp": {**mlp, "ffn_sub_norm": ones("ffn")},
        }  # fmt: skip

    table = np.load(folder / "table.npy")
    embedding = jax.tree.map(jnp.asarray, int8_rows(table)) if kind == "packed" else jnp.asarray(table, dtype)
    layers = {str(i): layer(i) for i in range(s["layers"])}
    return {
        "embed_tokens": {"embedding": embedding},
        "layers": layers,
        "norm": {"weight": jnp.ones(s["hidden"], dtype)},
    }


def write_gguf(folder: Path) -> Path:
    """The model for llama.cpp: arch `bitnet`, codes in TQ2_0 blocks of scale 1, gamma beside them, the table in F16."""
    import gguf

    s = json.loads((folder / "shape.json").read_text())
    path = folder / "model.gguf"
    out = gguf.GGUFWriter(path, "bitnet")
    out.add_context_length(2048)
    out.add_embedding_length(s["hidden"])
    out.add_block_count(s["layers"])
    out.add_feed_forward_length(s["ffn"])
    out.add_head_count(s["heads"])
    out.add_head_count_kv(s["heads"])
    out.add_layer_norm_rms_eps(s["eps"])
    out.add_rope_freq_base(s["theta"])
    out.add_rope_dimension_count(s["hidden"] // s["heads"])
    out.add_vocab_size(s["vocab"])
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list([f"<{i}>" for i in range(s["vocab"])])
    out.add_token_scores([0.0] * s["vocab"])
    out.add_token_types([int(gguf.TokenType.NORMAL)] * s["vocab"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    ones = lambda width: np.ones(s[width], np.float32)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
             "down": "ffn_down"}  # fmt: skip
    norms = {"attn_norm": "hidden", "attn_sub_norm": "hidden", "ffn_norm": "hidden", "ffn_sub_norm": "ffn"}
    out.add_tensor("token_embd.weight", np.load(folder / "table.npy").astype(np.float16))
    out.add_tensor("output_norm.weight", ones("hidden"))
    kind = gguf.GGMLQuantizationType.TQ2_0
    for layer in range(s["layers"]):
        for name, width in norms.items():
            out.add_tensor(f"blk.{layer}.{name}.weight", ones(width))
        for name, theirs in names.items():
            codes = np.load(folder / f"{layer}.{name}.npy").T.astype(np.float32)
            out.add_tensor(f"blk.{layer}.{theirs}.weight", gguf.quants.quantize(codes, kind), raw_dtype=kind)
            out.add_tensor(f"blk.{layer}.{theirs}.scale", np.asarray([codes.shape[1] ** -0.5], np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def commands(folder: Path) -> dict[str, list[str]]:
    """How each side's process is started, without its threads."""
    own = [sys.executable, str(Path(__file__)), f"--folder={folder}"]
    sides = {kind: [*own, f"--serve={kind}"] for kind in SIDES.value}
    peers = str(HERE / "ternary_peers.py")
    if PEER.value:
        sides |= {f"torch-{dtype}": [PEER.value, peers, dtype, str(folder)] for dtype in TORCH.value}
    if ENGINE.value:
        sides["llama.cpp"] = [ENGINE.value, peers, str(write_gguf(folder)), str(folder)]
    return sides


def compare(started: dict[str, list[str]], threads: int) -> None:
    """All sides on so many threads: a line a side."""
    sides = {name: Side([*command, f"--threads={threads}"], threads) for name, command in started.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    said: dict[str, list[int]] = {}
    for _ in range(ROUNDS.value):
        for name, run in sides.items():
            result = run(TOKENS.value)
            times[name].append(result["seconds"])
            said[name] = result["tokens"]
    for side in sides.values():
        side.close()
    print(f"{threads} thread(s), load average {os.getloadavg()[0]:.1f}", flush=True)
    first = next(iter(sides))
    for name, seconds in times.items():
        ratios = [theirs / mine for mine, theirs in zip(times[first], seconds, strict=True)]
        agree = next((i for i, (a, b) in enumerate(zip(said[name], said[first])) if a != b), len(said[first]))
        speed = f"best {1 / min(seconds):6.1f}  median {1 / statistics.median(seconds):6.1f} tokens/s"
        times_as = (
            f"{min(seconds) / min(times[first]):5.2f} by the best, {statistics.median(ratios):5.2f} by the median"
        )
        print(f"  {name:15} {speed}; {first} / this: {times_as}; first {agree} tokens agree", flush=True)


def main(_: list[str]) -> None:
    if SERVE.value:
        serve(own_side(SERVE.value, Path(FOLDER.value)), TOKENS.value)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder))
        started = commands(Path(folder))
        for threads in THREADS.value:
            compare(started, int(threads))


if __name__ == "__main__":
    with_huge_pages()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(HERE.parent))
    app.run(main)
