"""Which copies of benchmark items the stage `decontaminate` finds, what it takes for one in clean text, and how fast.

    python benchmarks/decontaminate.py --data=../shared/data

Planted: items of 14 benchmarks (2,000 of each at most), each within 500 characters of WikiText before and after it (of
Chinese news for Chinese items), changed in one way; found is an item that is reported by its own id. Clean: texts that
hold no items, in documents of 1,000 characters or as they are. Leaked: files known to hold benchmarks. Rephrased: the
items that LMSYS's llm-decontaminator had rewritten, which no comparison of words can find. Speed: documents of 1,000
characters a CPU second, of one process.
"""

import csv
import gzip
import io
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags

from data_pipelines.contamination.eval_items import read_benchmark
from data_pipelines.contamination.index import prepared_index
from data_pipelines.contamination.ngrams import Words
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.decontaminate import Decontaminate

DATA = flags.DEFINE_string("data", "../shared/data", "folder with eval/, koala/ and pretrain/")
MOST = flags.DEFINE_integer("most", 2000, "items planted of a benchmark")

RULES = ("13-gram", "8-gram", "50-char")
BENCHMARKS = {
    "gsm8k": "gsm8k/test.jsonl.gz",
    "math": "math500/*.json.gz",
    "humaneval": "humaneval/*.jsonl.gz",
    "mbpp": "mbpp/*.jsonl.gz",
    "mmlu": "mmlu/mmlu.zip",
    "ceval": "ceval/ceval.zip",
    "cmmlu": "cmmlu/cmmlu.zip",
    "agieval": "agieval/v1/*.jsonl.gz",
    "truthfulqa": "truthfulqa/*.csv.gz",
    "alpaca_eval": "alpaca_eval/*.json.gz",
    "koala_test_set": "koala_test_set/*.jsonl",
    "mt_bench": "mt_bench/question.jsonl",
    "vicuna_bench": "vicuna_bench/*.jsonl",
    "self_instruct": "self_instruct/user*.jsonl",
}
Change = Callable[[str, random.Random], str]


def text_of(path: str) -> str:
    with gzip.open(Path(DATA.value) / path, "rt", encoding="utf-8") as file:
        return file.read()


def rows_of(path: str) -> list[dict]:
    text = text_of(path)
    if ".csv" in path:
        return list(csv.DictReader(io.StringIO(text)))
    return json.loads(text) if ".json." in path else [json.loads(line) for line in text.split("\n") if line]


def pieces(text: str) -> list[str]:
    return [text[i : i + 1000] for i in range(0, len(text), 1000)]


def punctuated(text: str, draw: random.Random) -> str:
    """Other spaces and punctuation between words, and some between Chinese characters."""
    text = re.sub(r"\s+", lambda _: draw.choice((", ", " - ", "\n\n", "  ", "! ", "\u3000")), text)
    return re.sub(r"(?<=[一-鿿])(?=[一-鿿])", lambda _: draw.choice(("", "", "，", " ", "“", "\n")), text)


def cut(text: str, draw: random.Random) -> str:
    """Without a quarter at either end, as long as 13 words or 21 characters are left."""
    words = Words(text)
    least = 21 if words.alone.mean() > 0.5 else 13
    off = min(len(words) // 4, max(0, len(words) - least) // 2)
    return words.quote(off, len(words) - off - 1)


CHANGES: dict[str, Change] = {
    "verbatim": lambda text, draw: text,
    "upper case": lambda text, draw: text.upper(),
    "punctuation and spaces": punctuated,
    "cut": cut,
}


def found_items(stage: Decontaminate, texts: Iterator[str] | list[str]) -> tuple[int, Ledger]:
    """How many of the texts, each a conversation, are dropped."""
    ledger = Ledger()
    for i, text in enumerate(texts):
        stage.sample(Sample(str(i), (Conversation("x", str(i), (Turn("text", text, 1.0),)),)), ledger)
    return sum(ledger.dropped.values()), ledger


def planted(stages: dict[str, Decontaminate], folder: Path) -> None:
    english = text_of("pretrain/wikitext2/wiki.valid.tokens.gz")
    chinese = "".join(row["text"] for row in rows_of("eval/skywork/zh_general.jsonl.gz"))
    print("| benchmark | items | long |", " | ".join(f"{rule}, {change}" for rule in stages for change in CHANGES), "|")
    print("|---|" + "---|" * (2 + len(stages) * len(CHANGES)))
    for name, spec in BENCHMARKS.items():
        draw = random.Random(0)
        items = [item for item in read_benchmark(name, spec, folder, answers=False) if item.texts]
        chosen = draw.sample(items, min(MOST.value, len(items)))
        long = [(item, text) for item in chosen if (text := longest(item.texts))]
        cells = []
        for stage in stages.values():
            for change in CHANGES.values():
                hits = 0
                for item, text in long:
                    around = chinese if Words(text).alone.mean() > 0.5 else english
                    at = draw.randrange(len(around) - 1000)
                    whole = f"{around[at : at + 500]} {change(text, draw)} {around[at + 500 : at + 1000]}"
                    _, ledger = found_items(stage, [whole])
                    hits += item.id in ledger.seen.get(f"contamination_items/{name}", {})
                cells.append("1" if hits == len(long) else f"{hits / len(long):.4f}")
        print(f"| {name} | {len(chosen):,} | {len(long):,} | {' | '.join(cells)} |", flush=True)


def longest(texts: tuple[str, ...]) -> str:
    """The longest text that 13-gram's run fits in, or none."""
    text = max(texts, key=len)
    words = Words(text)
    return text if len(words) >= (21 if len(words) and words.alone.mean() > 0.5 else 13) else ""


def clean_texts() -> Iterator[tuple[str, list[str]]]:
    parts = ("wiki.valid.tokens", "wiki.test.tokens", "wikitext2_train_5k.txt")
    yield "WikiText-2", [text for part in parts for text in pieces(text_of(f"pretrain/wikitext2/{part}.gz"))]
    yield "TinyStories", pieces(text_of("pretrain/tinystories/tinystories_sample_2MiB.txt.gz"))
    yield "C4", [row["text"] for row in rows_of("pretrain/c4_demo/c4_demo.jsonl.gz")]
    hc3 = rows_of("koala/hc3/hc3_en_native_subset.jsonl.gz")
    yield "HC3, answers", [text for row in hc3 for text in row["human_answers"] + row["chatgpt_answers"]]
    yield "Alpaca 5k", [" ".join(map(str, row.values())) for row in rows_of("koala/alpaca/alpaca_5000.json.gz")]
    yield "CodeAlpaca 2k", [" ".join(map(str, row.values())) for row in rows_of("koala/alpaca/code_alpaca_2k.json.gz")]
    names = ("test_hc3_si", "val_hc3_QA", "val_hc3_si")
    chinese = [rows_of(f"koala/hc3/hc3plus_zh_{name}.jsonl.gz") for name in names]
    yield "HC3, Chinese", [row["text"] for rows in chinese for row in rows]
    yield "Chinese news", [row["text"] for row in rows_of("eval/skywork/zh_general.jsonl.gz")]
    poems = [rows_of(f"pretrain/chinese_poetry/{dynasty}.csv.gz") for dynasty in ("先秦", "魏晋", "清末近现代初")]
    yield "Chinese poems", [row["内容"] for rows in poems for row in rows]


def leaked_texts() -> Iterator[tuple[str, list[str]]]:
    yield "Yuan 2.0's gsm8k_En", text_of("eval/yuan2/GSM8K/gsm8k_En.txt.gz").replace("[SEP]", " ").splitlines()
    yield "Skywork's pt_train", [row["text"] for row in rows_of("pretrain/skywork_pt_train/pt_train.jsonl.gz")]
    yield "OIG's maths", [row["text"] for row in rows_of("koala/oig/derived_grade_school_math.jsonl.gz")]
    yield "HumanEval, as tested", [row["text"] for row in rows_of("eval/decontamination/test/HumanEval.jsonl.gz")]
    evals = rows_of("eval/alpaca_eval/eval_gpt-3.5-turbo-0301.json.gz")
    yield "AlpacaEval's prompts", [f"{row['instruction']} {row['input']}" for row in evals]
    rows = rows_of("koala/hh_rlhf/helpful-base/test.jsonl.gz")
    yield "HH helpful-base, test", [row["chosen"] for row in rows]


def rephrased_texts() -> Iterator[tuple[str, list[str]]]:
    for path in sorted((Path(DATA.value) / "eval/decontamination/rephrase").glob("*.jsonl.gz")):
        texts = [row["text"] for row in rows_of(str(path.relative_to(DATA.value)))]
        yield path.name.removesuffix(".jsonl.gz"), [text for text in texts if text.strip()]


def counted(title: str, stages: dict[str, Decontaminate], sets: Iterator[tuple[str, list[str]]]) -> None:
    print(f"\n| {title} | texts |", " | ".join(stages), "| of benchmarks, by all rules |")
    print("|---|---|" + "---|" * (len(stages) + 1))
    for name, texts in sets:
        counts, seen = [], dict[str, int]()
        for stage in stages.values():
            count, ledger = found_items(stage, texts)
            counts.append(f"{count:,}")
            for table, items in ledger.seen.items():
                if table.startswith("contamination_items/"):
                    benchmark = table.removeprefix("contamination_items/")
                    seen[benchmark] = max(seen.get(benchmark, 0), len(items))
        of = ", ".join(f"{benchmark} {items:,}" for benchmark, items in seen.items())
        print(f"| {name} | {len(texts):,} | {' | '.join(counts)} | {of} |", flush=True)


def speed(stages: dict[str, Decontaminate]) -> None:
    texts = pieces(text_of("pretrain/wikitext2/wikitext2_train_5k.txt.gz"))
    print("\n| rules | documents a CPU second |\n|---|---|")
    for name, stage in stages.items():
        best = 0.0
        for _ in range(3):
            start = time.process_time()
            found_items(stage, texts)
            best = max(best, len(texts) / (time.process_time() - start))
        print(f"| {name} | {best:,.0f} |")


def main(_: list[str]) -> None:
    folder = Path(DATA.value) / "eval"
    with tempfile.TemporaryDirectory() as work:
        start = time.process_time()
        benchmarks = {**BENCHMARKS, "gsm8k_train": {"files": "gsm8k/train.jsonl.gz", "layout": "gsm8k"}}
        path, digest = prepared_index(benchmarks, folder, Path(work), {"rules": RULES})
        print(f"index: {path.stat().st_size:,} bytes in {time.process_time() - start:.0f} CPU s\n")
        options = {"index": str(path), "sha256": digest}
        stages = {rule: Decontaminate({**options, "rules": (rule,)}) for rule in RULES}
        planted(stages, folder)
        counted("clean", stages, clean_texts())
        counted("leaked", stages, leaked_texts())
        counted("rephrased", stages, rephrased_texts())
        speed({**stages, "13-gram and 50-char": Decontaminate({**options, "rules": ("13-gram", "50-char")})})


if __name__ == "__main__":
    app.run(main)
