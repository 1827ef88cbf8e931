"""Models that are trained here, run by llama.cpp: do we compute the same, what do files and memory take.

    python benchmarks/gguf_engine.py --engine=PYTHON                       # trains the two models first
    python benchmarks/gguf_engine.py --engine=PYTHON --ternary=RUN --plain=RUN

PYTHON has llama-cpp-python; this one has gguf. The ternary model is BitNet b1.58 with SwiGLU, a tied head and input
sizes that are multiples of 256, as the engine has it, trained with numerics.rules on all linear layers of the blocks;
the plain one is a LLaMA of the same size. Both are written by `convert --to=gguf` and continue 20 texts by 64 tokens.
Every position is then computed here from the engine's tokens (teacher-forced), three times:

    emulated  from the file, with the engine's rounding of activations (tests/engine.py)
    exact     from the file, activations not rounded
    ours      from the checkpoint, as training computes: of a ternary model activations are rounded by token

A miss is a position where the largest logit is another. It is told with the engine's margin between its first and its
second token, beside twice the largest difference of a logit there: a miss with a larger margin would be a mistake.
Weights laid out for AMX crash some hosts (the engine's, not the file's fault): then it is told, and tried without.
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

ENGINE = flags.DEFINE_string("engine", None, "a Python interpreter with llama_cpp", required=True)
TERNARY = flags.DEFINE_string("ternary", "", "run of a ternary model; by default one is trained")
PLAIN = flags.DEFINE_string("plain", "", "run of a plain model; by default one is trained")
FOLDER = flags.DEFINE_string("folder", "runs/gguf_engine", "of runs and files")
STEPS = flags.DEFINE_integer("steps", 600, "of the ternary model; the plain one takes half as many")
NEW = flags.DEFINE_integer("new", 64, "tokens a text is continued by")

ROOT = Path(__file__).parents[1]
MODEL = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
         "head_dim": 64}  # fmt: skip
RULES = r"('layers/\*/(self_attn|mlp)/.*_proj=ternary',)"
TWO_STAGE = {"schedule": "two_stage", "learning_rate": 3e-3, "stage_learning_rate": 2e-3, "end_learning_rate": 0.0}
FILES = (  # model, type, type of embedding and head
    ("ternary", "tq2_0", "q8_0"), ("ternary", "tq1_0", "q8_0"), ("ternary", "tq2_0", "f32"), ("ternary", "f16", "f16"),
    ("plain", "f32", "f32"), ("plain", "f16", "f16"), ("plain", "bf16", "bf16"), ("plain", "q8_0", "q8_0"),
    ("plain", "q4_0", "q8_0"),
)  # fmt: skip
DOCUMENTED = (str.split, str.join, str.format, str.strip, dict.get, dict.pop, dict.update, list.sort, list.append,
              list.insert, set.union, bytes.decode, int.to_bytes, print, sorted, zip, range, open, isinstance,
              max)  # fmt: skip
PROMPT = 10  # tokens of a text, bos included


def train(name: str, steps: int, ternary: bool) -> Path:
    """A run of the small model on what every machine has (configs/koala_tiny.py); one that is there is kept."""
    log = Path(FOLDER.value) / name
    if (log / "checkpoints").is_dir():
        return log
    set_to = {f"model.{key}": value for key, value in MODEL.items()}
    set_to |= {"log.dir": log, "data.path": Path(FOLDER.value) / "data", "eval.every": 0}
    if ternary:
        set_to |= {"model.sub_norms": True, "numerics.rules": RULES}
        set_to |= {f"optimizer.{key}": value for key, value in TWO_STAGE.items()}
    command = [sys.executable, "-m", "easylm_plus.train", f"--config=configs/koala_tiny.py:steps={steps}"]
    subprocess.run([*command, *(f"--config.{key}={value}" for key, value in set_to.items())], cwd=ROOT, check=True)
    return log


def export(run: Path, kind: str, ends: str) -> tuple[Path, str]:
    """(the file, what the command told)."""
    path = Path(FOLDER.value).absolute() / f"{run.name}-{kind}-{ends}.gguf"
    command = [sys.executable, "-m", "easylm_plus.convert", "--to=gguf", f"--gguf_type={kind}", f"--gguf_ends={ends}",
               f"--input={run.absolute()}", f"--output={path}", "--force"]  # fmt: skip
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return path, told.strip().split(": ", 1)[1]


def answered(path: Path, prompts: list[list[int]]) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """What the engine tells and computes, and how it had to be run."""
    from engine import Crashed, ask

    request = {"model": path, "prompts": prompts, "new": NEW.value, "mmap": False}
    try:
        return *ask(ENGINE.value, **request), "as it comes"
    except Crashed as error:
        return *ask(ENGINE.value, **request, repack=False), f"use_extra_bufts=False, else {error.args[0][:9]}"


def compared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Logits [N, V] against the engine's."""
    error, ordered = np.abs(ours - theirs).max(-1), np.sort(theirs, -1)
    margin = ordered[:, -1] - ordered[:, -2]
    missed = np.flatnonzero(ours.argmax(-1) != theirs.argmax(-1))
    misses = [(round(float(margin[n]), 5), round(float(2 * error[n]), 5)) for n in missed]
    return {"equal": len(ours) - len(missed), "of": len(ours), "misses": misses, "median": float(np.median(error)),
            "largest": float(error.max())}  # fmt: skip


def measure(run: Path, opened: Any, kind: str, ends: str, prompts: list[list[int]]) -> dict[str, Any]:
    import jax
    from engine import load

    path, told = export(run, kind, ends)
    stated, arrays, how = answered(path, prompts)
    ids = [arrays[f"ids::{i}"] for i in range(len(prompts))]
    theirs = np.concatenate([arrays[f"logits::{i}"][PROMPT - 1 :] for i in range(len(prompts))])
    apply = jax.jit(opened.model.apply)

    def logits(tree: Any) -> np.ndarray:
        rows = np.asarray(apply({"params": tree}, np.stack(ids)[:, :-1]))
        return rows[:, PROMPT - 1 :].reshape(-1, rows.shape[-1])

    config = opened.model.config
    found = {"emulated": compared(logits(load(path, config)), theirs)}
    found["exact"] = compared(logits(load(path, config, rounding=False)), theirs)
    found["ours"] = compared(logits(opened.params), theirs)
    memory = {when: stated[when]["RssAnon"] - stated["before"]["RssAnon"] for when in ("loaded", "used")}
    return {"model": run.name, "kind": kind, "ends": ends, "told": told, "how": how, "bytes": path.stat().st_size,
            "largest logit": float(np.abs(theirs).max()), "memory": memory, **found}  # fmt: skip


def texts(tokenizer: Any) -> list[list[int]]:
    """The beginnings of 20 docstrings."""
    rows = [[tokenizer.bos_id, *tokenizer.encode(inspect.getdoc(thing) or "")][:PROMPT] for thing in DOCUMENTED]
    assert all(len(row) == PROMPT for row in rows)
    return rows


def table(results: list[dict[str, Any]]) -> None:
    print("\n| model | blocks | ends | emulated | exact | ours | median difference | file, KiB | loaded, KiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in results:
        shares = [f"{r[how]['equal']}/{r[how]['of']}" for how in ("emulated", "exact", "ours")]
        median = " / ".join(f"{r[how]['median']:.1e}" for how in ("emulated", "exact", "ours"))
        cells = (r["model"], r["kind"], r["ends"], *shares, median, f"{r['bytes'] / 1024:,.0f}",
                 f"{r['memory']['loaded']:,}")  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    for r in results:
        for how in ("emulated", "exact", "ours"):
            if r[how]["misses"]:
                print(f"{r['model']} {r['kind']} {r['ends']}, {how}: misses (margin, 2 x error) {r[how]['misses']}")


def main(_: list[str]) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    runs = {
        "ternary": Path(TERNARY.value) if TERNARY.value else train("ternary", STEPS.value, True),
        "plain": Path(PLAIN.value) if PLAIN.value else train("plain", STEPS.value // 2, False),
    }
    from easylm_plus.inference.load import open_model

    Path(FOLDER.value).mkdir(parents=True, exist_ok=True)
    models = {name: open_model(run) for name, run in runs.items()}
    results = []
    for name, kind, ends in FILES:
        results.append(measure(runs[name], models[name], kind, ends, texts(models[name].tokenizer)))
        print(json.dumps(results[-1]), flush=True)
    table(results)


if __name__ == "__main__":
    app.run(main)
