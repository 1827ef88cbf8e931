"""What finds near duplicates, and how fast: recall and precision on planted copies, by kind, setting and threshold.

    python benchmarks/dedupe.py                           # on the standard library's documentation
    python benchmarks/dedupe.py --data=../shared/data     # on real texts in three languages
    RAYON_NUM_THREADS=1 python benchmarks/dedupe.py --data=../shared/data --peers     # and rensa and datasketch

`planted_duplicates` says what the texts are, and what is planted in them. A copy is found if it is dropped and its
keeper is its original; every other drop is wrong. Times are CPU seconds of one thread, the least of five.
"""

import itertools
import random
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import planted_duplicates as planted
from absl import app, flags
from dedupe_peers import PEERS as PEER_MINIMA

from data_pipelines.conversation import Conversation
from data_pipelines.sources import exchange
from data_pipelines.stages import edges, minhash
from data_pipelines.stages.base import normal
from data_pipelines.stages.chunk import Sample
from data_pipelines.stages.dedupe import Dedupe
from data_pipelines.stages.minhash import SCHEME, Scheme, Signatures, Uint32

DATA = flags.DEFINE_string("data", None, "folder of real data; without it pydoc alone")
TEXTS = flags.DEFINE_integer("texts", 1000, "texts of a corpus, at most")
PEERS = flags.DEFINE_bool("peers", False, "measure rensa and datasketch, too")
SAMPLES = flags.DEFINE_integer("samples", 1_000_000, "signatures among which edges are found")

BOILERPLATE = {"half": 1 / 2, "two thirds": 2 / 3, "three quarters": 3 / 4}  # of the text
NEGATIVES = ("half", "two thirds")  # three quarters are as similar as a copy with noise: see the table of thresholds
SIMILARITY = Dedupe.OPTIONS["similarity"]
THRESHOLDS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
SETTINGS = (
    ("characters", Scheme(5, 28, 4)), ("characters", Scheme(5, 22, 5)), ("characters", Scheme(5, 18, 6)),
    ("characters", Scheme(5, 16, 7)), ("characters", Scheme(5, 14, 8)), ("characters", Scheme(4, 22, 5)),
    ("characters", Scheme(7, 22, 5)),
    ("words", Scheme(5, 28, 4)), ("words", Scheme(5, 14, 8)), ("words", Scheme(3, 22, 5)),
)  # fmt: skip


class Corpus(NamedTuple):
    name: str
    documents: list[planted.Document]
    texts: list[str]  # of the documents, normalised


class Found(NamedTuple):
    """By kind: the documents, those dropped that have the right keeper, and those dropped wrongly."""

    there: Counter[str]
    right: Counter[str]
    wrong: Counter[str]

    @property
    def mistakes(self) -> int:
        return sum(self.wrong[kind] for kind in ("original", *planted.KINDS, *NEGATIVES))

    def recall(self, *kinds: str) -> float:
        return sum(self.right[kind] for kind in kinds) / sum(self.there[kind] for kind in kinds)


############################################## Finding ###############################################


def corpus(name: str, texts: Iterable[str]) -> Corpus:
    """Two thirds of the texts with their copies; the others are made into boilerplate, a third of them of each kind."""
    taken = list(itertools.islice(planted.distinct(texts), TEXTS.value))
    cut = 2 * len(taken) // 3
    documents = planted.plant(taken[:cut])
    for at, (kind, share) in enumerate(BOILERPLATE.items()):
        documents += [planted.Document(text, kind, -1) for text in planted.boilerplate(taken[cut + at :: 3], share)]
    return Corpus(name, documents, [normal(document.text) for document in documents])


def own_minima(texts: Sequence[str], unit: str = "characters", scheme: Scheme = SCHEME) -> Uint32:
    cut = minhash.shingles if unit == "characters" else planted.word_shingles
    return minhash.minima(cut(texts, scheme.shingle), len(texts), scheme.permutations)


def signatures(minima: Uint32, scheme: Scheme = SCHEME, similarity: float = SIMILARITY) -> Signatures:
    bands, sketches = minhash.bands_and_sketches(minima, 0, scheme)
    needed = np.full(len(minima), minhash.needed(similarity, scheme.permutations), np.uint8)
    return Signatures(np.zeros(len(minima), np.uint64), bands, sketches, needed)


def find(documents: Sequence[planted.Document], among: Signatures) -> Found:
    found, result = edges.find_edges(among), Found(Counter(d.kind for d in documents), Counter(), Counter())
    for rank, keeper in zip(found.ranks, edges.resolve(found)):
        dropped, kept = documents[rank], documents[keeper]
        right = dropped.kind in planted.KINDS and (kept.kind, kept.family) == ("original", dropped.family)
        (result.right if right else result.wrong)[dropped.kind] += 1
    return result


def find_all(texts: Sequence[Corpus], among: Iterable[Signatures]) -> Found:
    results = [find(each.documents, these) for each, these in zip(texts, among)]
    return Found(*(sum(counters, Counter()) for counters in zip(*results)))


def dropped(texts: Sequence[str], similarity: float = SIMILARITY) -> int:
    return len(edges.find_edges(signatures(own_minima([normal(text) for text in texts]), similarity=similarity)))


def brought_together(texts: Sequence[Corpus], among: Sequence[Signatures]) -> list[Counter[str]]:
    """kind -> copies that share a band's key with their original, and how many there are; before any comparison."""
    shared: Counter[str] = Counter()
    for each, these in zip(texts, among):
        for document, keys in zip(each.documents, these.bands):
            shared[document.kind] += bool((keys == these.bands[document.family]).any())
    return [shared, sum((Counter(d.kind for d in each.documents) for each in texts), Counter())]


def unrelated(texts: Sequence[Corpus], among: Sequence[Signatures]) -> list[float]:
    """Of a million originals of one corpus, how many share a band's key with another one: the mean and the largest."""
    mates, pairs = [], []
    for each, these in zip(texts, among):
        keys = these.bands[[document.kind == "original" for document in each.documents]]
        _, sizes = np.unique(keys, return_counts=True)  # bands are salted: keys of different ones differ
        mates.append((sizes * (sizes - 1)).sum() / keys.shape[1])
        pairs.append(len(keys) * (len(keys) - 1))
    return [1e6 * sum(mates) / sum(pairs), max(1e6 * m / p for m, p in zip(mates, pairs))]


def wilson(hits: int, count: int) -> str:
    """Share, and its 95 % interval."""
    z, share = 1.96, hits / count
    middle = share + z * z / 2 / count
    half = z * (share * (1 - share) / count + (z / 2 / count) ** 2) ** 0.5
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return f"{share:.4f} ({low:.4f} to {high:.4f})"


############################################### Tables ###############################################


def row(*cells: object) -> None:
    print(f"| {' | '.join(f'{cell:.4f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")


def head(title: str, *cells: str) -> None:
    print(f"\n{title}\n")
    row(*cells)
    row(*["---"] * len(cells))


def by_kind(texts: Sequence[Corpus]) -> None:
    """Of what the stage finds."""
    made = [signatures(own_minima(each.texts)) for each in texts]
    head("Found of planted", "corpus", "texts", "characters", *planted.KINDS, "wrong")
    for each, among in zip(texts, made):
        found = find(each.documents, among)
        length = f"{np.mean([len(text) for text in each.texts]):.0f}"
        kinds = [f"{found.right[kind]} of {found.there[kind]}" for kind in planted.KINDS]
        row(each.name, found.there["original"], length, *kinds, found.mistakes)
    every = find_all(texts, made)
    head("All corpora", "kind", "recall (95 % interval)", "precision (95 % interval)")
    for kind in planted.KINDS:
        right = every.right[kind]
        row(kind, wilson(right, every.there[kind]), wilson(right, right + every.wrong[kind]))
    right, copies = every.right.total(), sum(every.there[kind] for kind in planted.KINDS)
    row("all, beside originals and boilerplate", wilson(right, copies), wilson(right, right + every.mistakes))


def by_setting(texts: Sequence[Corpus]) -> None:
    cells = ("shingles", "bands x rows", "noise", "reordered", "cut", "unrelated of a million, mean", "largest")
    head("Settings: copies that share a bucket with their original, before any comparison", *cells)
    for unit, scheme in SETTINGS:
        made = [signatures(own_minima(each.texts, unit, scheme), scheme) for each in texts]
        shared, there = brought_together(texts, made)
        shares = [
            sum(shared[kind] for kind in kinds) / sum(there[kind] for kind in kinds)
            for kinds in (("noise",), ("reordered",), ("cut_start", "cut_end"))
        ]
        mates = [f"{number:.2f}" for number in unrelated(texts, made)]
        row(f"{scheme.shingle} {unit}", f"{scheme.bands} x {scheme.rows}", *shares, *mates)


def by_threshold(texts: Sequence[Corpus]) -> None:
    kinds = ("noise", "reordered", "cut_start", "cut_end")
    boilerplate = [f"boilerplate, {kind}" for kind in BOILERPLATE]
    head("Thresholds: share dropped", "similarity", *kinds, *boilerplate, "GSM8K, other numbers")
    minima = [own_minima(each.texts) for each in texts]
    asked = problems()
    changed = [planted.other_numbers(text, random.Random(at)) for at, text in enumerate(asked)]
    for similarity in THRESHOLDS:
        found = find_all(texts, (signatures(each, similarity=similarity) for each in minima))
        wrong = [found.wrong[kind] / found.there[kind] for kind in BOILERPLATE]
        numbers = dropped(asked + changed, similarity) / len(asked) if asked else "-"
        row(similarity, *(found.recall(kind) for kind in kinds), *wrong, numbers)


def problems() -> list[str]:
    """Grade-school problems with their solutions."""
    if DATA.value is None:
        return []
    read = planted.rows(Path(DATA.value, "eval/gsm8k/train.jsonl.gz"))
    return [f"{problem['question']}\n{problem['answer']}" for problem in itertools.islice(read, 1000)]


def translations() -> None:
    english, chinese = (
        planted.lines(Path(DATA.value, f"eval/yuan2/GSM8K/gsm8k_{name}.txt.gz")) for name in ("En", "Cn")
    )
    alone, both = dropped(english) + dropped(chinese), dropped(english + chinese)
    print(f"\nTranslations: {both - alone} of {len(chinese)} GSM8K problems in Chinese dropped for the English ones.")


############################################### Speed ################################################


def seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def speed(texts: Sequence[Corpus]) -> None:
    """Of samples with a question and an answer."""
    raw = [document.text for each in texts for document in each.documents if document.kind == "original"]
    turns = [exchange(text[:100], text[100:]) for text in raw]
    samples = [Sample(str(at), (Conversation("a", str(at), pair),)) for at, pair in enumerate(turns)]
    compared = [normal(text) for text in raw]
    hashes = list(minhash.shingles(compared, SCHEME.shingle))
    minima = minhash.minima(hashes, len(raw), SCHEME.permutations)
    steps: dict[str, Callable[[], Any]] = {
        "normal text": lambda: [normal(text) for text in raw],
        "shingles": lambda: list(minhash.shingles(compared, SCHEME.shingle)),
        "minima": lambda: minhash.minima(hashes, len(raw), SCHEME.permutations),
        "bands and sketches": lambda: minhash.bands_and_sketches(minima, 0, SCHEME),
        "the stage, from samples to signatures": lambda: Dedupe({}).signatures(samples),
    }
    if PEERS.value:
        steps |= {f"minima, {name}": lambda f=f: f(hashes, SCHEME.permutations) for name, f in PEER_MINIMA.items()}
    size = f"{np.mean([len(text.encode()) for text in raw]):,.0f} bytes"
    head(
        f"Speed: {len(raw):,} texts of {size} and {np.mean([len(h) for h in hashes]):.0f} shingles",
        "step",
        "µs a text",
        "texts a second",
    )
    for name, work in steps.items():
        taken = seconds(work) / len(raw)
        row(name, f"{1e6 * taken:.1f}", f"{1 / taken:,.0f}")


def accuracy(texts: Sequence[Corpus]) -> None:
    """Estimates against exact similarities of originals and their copies."""
    head(
        "Estimates of copies' similarity, less the exact one",
        "minima",
        "mean",
        "deviation",
        "as many random orders have",
    )
    pairs = [
        (each.texts[d.family], t) for each in texts for d, t in zip(each.documents, each.texts) if d.kind == "noise"
    ]
    both = [list(minhash.shingles(side, SCHEME.shingle)) for side in zip(*pairs)]
    exact = np.array([len(np.intersect1d(a, b)) / len(np.union1d(a, b)) for a, b in zip(*both)])
    expected = float(np.sqrt(np.mean(exact * (1 - exact)) / SCHEME.permutations))
    finders = {"ours": lambda h, count: minhash.minima(h, len(h), count)} | (PEER_MINIMA if PEERS.value else {})
    for name, finder in finders.items():
        a, b = (finder(side, SCHEME.permutations) for side in both)
        error = (a == b).mean(1) - exact
        row(name, f"{error.mean():+.4f}", float(error.std()), expected)
        if name == "ours":
            a, b = (minhash.bands_and_sketches(side, 0, SCHEME)[1] for side in (a, b))
            error = minhash.estimate(np.count_nonzero(a == b, axis=1), SCHEME.permutations) - exact
            row("ours, 8 bits of each", f"{error.mean():+.4f}", float(error.std()), expected)


def edges_at_scale() -> None:
    """Random signatures, a tenth of them near duplicates of earlier ones."""
    count, rng = SAMPLES.value, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        among = edges.gather(random_chunks(count, rng), count, Path(folder))
        tracemalloc.start()
        start = time.process_time()
        found = edges.find_edges(among)
        taken, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    memory = f"{peak / count:.0f} bytes of memory each"
    print(f"\nEdges: {len(found):,} among {count:,} samples in {taken:.1f} s, {memory}.")


def random_chunks(count: int, rng: np.random.Generator, size: int = 10_000) -> Iterator[Signatures]:
    for start in range(0, count, size):
        minima = rng.integers(0, 1 << 32, (min(size, count - start), SCHEME.permutations), np.uint32)
        tenth = len(minima) // 10
        copied = rng.random((tenth, SCHEME.permutations)) < 0.85
        minima[-tenth:] = np.where(copied, minima[:tenth], minima[-tenth:])
        yield signatures(minima)


def main(_: list[str]) -> None:
    texts = [corpus(*each) for each in planted.corpora(DATA.value and Path(DATA.value)).items()]
    by_kind(texts)
    by_setting(texts)
    by_threshold(texts)
    if DATA.value:
        translations()
    accuracy(texts)
    speed(texts)
    edges_at_scale()


if __name__ == "__main__":
    app.run(main)
