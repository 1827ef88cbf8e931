"""The input pipeline alone: tokens a second, from prepared conversations to packed batches, in one process.

    python benchmarks/input_pipeline.py --data=data/koala --tokenizer=TOKENIZER.model --template=koala

The first pass tokenises on the fly, the second finds the tokens in the cache, the third reads them from the store that
`python -m data_pipelines.tokenize` has made of the same data, if it has. Compare with the tokens a second that the step
prints: the pipeline must deliver several times that. `loader.py` measures what a store is for besides.
"""

import time

import numpy as np
from absl import app, flags

from data_pipelines.batches.loader import Loader
from data_pipelines.batches.training_data import open_data

DATA = flags.DEFINE_string("data", None, "prepared folder", required=True)
TOKENIZER = flags.DEFINE_string("tokenizer", "", "tokenizer file; that of the folder by default")
TEMPLATE = flags.DEFINE_string("template", "koala", "koala, chat, text or a jinja file")
LENGTH = flags.DEFINE_integer("length", 2048, "tokens a row")
BATCH = flags.DEFINE_integer("batch", 8, "rows a batch")


def measure(name: str, loader: Loader, draws: int) -> None:
    """Reads batches with so many examples."""
    wall, cpu, tokens, batches, seen = time.perf_counter(), time.process_time(), 0, 0, 0
    for batch in loader:
        tokens += int(np.count_nonzero(batch.arrays["segment_ids"]))
        seen += sum(map(len, batch.examples))
        batches += 1
        if seen >= draws:
            break
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    padding = 1 - tokens / (batches * BATCH.value * LENGTH.value)
    speed = f"{tokens / wall:,.0f} a second, {tokens / cpu:,.0f} a CPU second"
    print(f"{name:10}  {tokens:,} tokens, {speed}, padding {padding:.2%}", flush=True)


def main(_: list[str]) -> None:
    section = {"path": DATA.value, "sources": (), "tokenizer": TOKENIZER.value, "template": TEMPLATE.value,
               "length": LENGTH.value, "packing": "best_fit"}  # fmt: skip
    data = open_data(section)
    draws = sum(map(len, data.train.values()))
    options = {"batch_size": BATCH.value, "length": LENGTH.value, "draws": 2 * draws}
    loader = Loader(data.train, None, data.learned, **options)
    for name in ("tokenising", "cached"):
        measure(name, loader, draws)
    if len(data.tokens) == len(data.train):
        measure("stored", Loader(data.tokens, None, data.learned, **options), draws)
    else:
        print("stored      no tokens: python -m data_pipelines.tokenize makes them")


if __name__ == "__main__":
    app.run(main)
