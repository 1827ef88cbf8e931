"""The input pipeline alone: tokens a second, from prepared conversations to packed batches, in one process.

    python benchmarks/input_pipeline.py --data=data/koala --tokenizer=TOKENIZER.model --template=koala

The first pass tokenises on the fly, the second finds the tokens in the cache. Compare with the tokens a second that the
step prints: the pipeline must deliver several times that.
"""

import time

from absl import app, flags

from data_pipelines import datasets
from data_pipelines.loader import Loader
from data_pipelines.template import load_template
from data_pipelines.tokenization import load_tokenizer

DATA = flags.DEFINE_string("data", None, "prepared folder", required=True)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer file; that of the folder by default")
TEMPLATE = flags.DEFINE_string("template", "koala", "koala, chat, text or a jinja file")
LENGTH = flags.DEFINE_integer("length", 2048, "tokens a row")
BATCH = flags.DEFINE_integer("batch", 8, "rows a batch")


def main(_: list[str]) -> None:
    tokenizer = load_tokenizer(TOKENIZER.value or f"{DATA.value}/tokenizer")
    template = load_template(TEMPLATE.value, tokenizer, max_length=LENGTH.value + 1)
    names = datasets.read_manifest(DATA.value)["sources"]
    sources = {name: datasets.open_source(DATA.value, name, "train") for name in names}
    draws = sum(map(len, sources.values()))
    loader = Loader(sources, None, template, batch_size=BATCH.value, length=LENGTH.value, draws=2 * draws)
    for name in ("tokenising", "cached"):
        wall, cpu, tokens, batches, seen = time.perf_counter(), time.process_time(), 0, 0, 0
        for batch in loader:
            tokens += int((batch.arrays["segment_ids"] > 0).sum())
            seen += sum(map(len, batch.examples))
            batches += 1
            if seen >= draws:
                break
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        padding = 1 - tokens / (batches * BATCH.value * LENGTH.value)
        speed = f"{tokens / wall:,.0f} a second, {tokens / cpu:,.0f} a CPU second"
        print(f"{name:10}  {tokens:,} tokens, {speed}, padding {padding:.1%}")


if __name__ == "__main__":
    app.run(main)
