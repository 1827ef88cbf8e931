"""Measure a model on held-out data: loss by source, and exact match of its greedy answers.

    python -m easylm_plus.evaluate --checkpoint=runs/koala_tiny

Answers are generated the way the chat generates them. The figures are printed and written to --output as JSON.
"""

import json
import math
import sys
from pathlib import Path

from absl import flags
from rich.table import Table

from data_pipelines import datasets
from data_pipelines.batches.loader import evaluation_batches
from data_pipelines.batches.training_data import judged_by, learned_of
from data_pipelines.conversation import Conversation
from easylm_plus.door import console, run
from easylm_plus.errors import UserError
from easylm_plus.evaluation.exact_match import Answer, answers, exact_match
from easylm_plus.evaluation.loss import make_evaluate, unigram_entropy
from easylm_plus.inference.load import Opened, open_model, told
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.parallel import cluster

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "run folder, Hugging Face folder or llama2.c file", required=True)
KV_CACHE = flags.DEFINE_enum("kv_cache", None, ["compute", "int8"], "what decoding keeps keys and values as")
STEP = flags.DEFINE_integer("step", None, "step of the run; the last by default")
ADAPTER = flags.DEFINE_string("adapter", "", "folder of PEFT's adapters for these weights")
DATA = flags.DEFINE_string("data", "", "prepared folder; that of the run by default")
EXAMPLES = flags.DEFINE_integer("examples", 200, "held-out examples a source")
EXACT = flags.DEFINE_list(
    "exact", None, "sources whose answers are compared letter for letter; by default those made of exact tasks"
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "longest answer")
SHOW = flags.DEFINE_integer("show", 2, "answers shown a source")
OUTPUT = flags.DEFINE_string("output", "", "JSON file for the figures")


def main() -> int:
    """Prints the figures of one checkpoint."""
    cluster.use_compilation_cache()
    opened = open_model(CHECKPOINT.value, step=STEP.value, adapter=ADAPTER.value, kv_cache=KV_CACHE.value or "")
    if line := told(opened.params):
        print(line, file=sys.stderr)
    if not (DATA.value or opened.config.get("data", {}).get("path")):
        raise UserError(f"--data is not set, and {CHECKPOINT.value} does not name any: expected a prepared folder")
    folder = DATA.value or opened.config["data"]["path"]
    entries = datasets.read_manifest(folder)["sources"]
    names = [name for name, entry in entries.items() if "heldout" in entry["splits"]]
    exact = [n for n in names if entries[n]["kind"] == "exact"] if EXACT.value is None else EXACT.value
    if unknown := sorted(set(exact) - set(names)):
        raise UserError(f"--exact: found {unknown}, expected some of {', '.join(names)}")
    heldout = {name: datasets.open_source(folder, name, "heldout") for name in names}

    figures = losses(opened, heldout)
    results = {task: ask(opened, list(heldout[task][: EXAMPLES.value])) for task in exact}
    figures |= {f"exact/{task}": share for task, share in exact_match(results).items()}

    console.print(table(figures))
    for task, rows in results.items():
        for row in rows[: SHOW.value]:
            mark = "right" if row.correct else f"wrong, expected {row.expected!r}"
            console.print(f"{task}: {row.question!r} -> {row.given!r} ({mark})", markup=False)
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def losses(opened: Opened, heldout: dict) -> dict[str, float]:
    """eval/loss in all and by source, and the unigram entropy of the same tokens, in nats."""
    length = opened.config["data"]["length"] if opened.config else opened.model.config.max_length
    encode = judged_by(learned_of(opened.config["data"], opened.template)) if opened.config else opened.template
    limit = EXAMPLES.value
    batches = evaluation_batches(heldout, encode, batch_size=8, length=length, limit_per_source=limit)
    arrays = [batch.arrays for batch in batches]
    objective = LanguageModel(opened.model, len(heldout))
    figures = make_evaluate(objective, list(heldout))(opened.params, arrays)
    return figures | {"eval/unigram_entropy": unigram_entropy(arrays, opened.model.config.vocab_size)}


def ask(opened: Opened, conversations: list[Conversation]) -> list[Answer]:
    """Greedy answers to the held-out questions."""
    return answers(opened.chatter(), conversations, MAX_NEW_TOKENS.value)


def table(figures: dict[str, float]) -> Table:
    """The figures for the terminal."""
    show = Table("figure", "value", "perplexity")
    for name, value in figures.items():
        is_loss = name.startswith("eval/loss")
        text = f"{value:.1%}" if name.startswith("exact/") else f"{value:.4f}"
        show.add_row(name, text, f"{math.exp(min(value, 50)):.2f}" if is_loss else "")
    return show


if __name__ == "__main__":
    run(main)
