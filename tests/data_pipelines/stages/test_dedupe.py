"""What is compared, what is dropped, and that planted copies are found and nothing else."""

import importlib
import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import REAL, real_data

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.sources import exchange
from data_pipelines.stages import edges, minhash
from data_pipelines.stages.base import normal
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.dedupe import EXACT, NEAR, Dedupe, Duplicate, said
from data_pipelines.stages.minhash import NO_KEY, Scheme, Signatures

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
planted = importlib.import_module("planted_duplicates")


def sample(*conversations, source="a", id="1"):
    """Each conversation as texts of user and assistant in turn."""
    turns = [tuple(t for a in range(0, len(texts), 2) for t in exchange(*texts[a : a + 2])) for texts in conversations]
    return Sample(id, tuple(Conversation(source, f"{id}:{n}", each) for n, each in enumerate(turns)))


def document(text, id="1"):
    return Sample(id, (Conversation("d", id, (Turn("text", text, 1.0),)),))


def joined(parts):
    return Signatures(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def duplicates(samples, chunk=10**6, **options):
    """rank -> (keeper, exact or not), with signatures made `chunk` samples at a time."""
    stage = Dedupe(options)
    found = edges.find_edges(joined([stage.signatures(samples[a : a + chunk]) for a in range(0, len(samples), chunk)]))
    return dict(zip(found.ranks.tolist(), zip(edges.resolve(found).tolist(), found.exact.tolist())))


############################################### Parts ################################################

TALK = sample(("Hi", "Hello!", "Bye", "See you."))
PAIR = sample(("Hi", "Hello!", "Bye", "Good."), ("Hi", "Hello!", "Bye", "Bad."))
ANSWERS = sample(("Why?", "So."), ("Why?", "Thus."))


@pytest.mark.parametrize(
    ("given", "query", "exchanged", "whole"),
    (
        (TALK, ["hi"], ["hi", "hello!"], ["hi", "hello!", "bye", "see you."]),
        (PAIR, ["hi"], ["hi", "hello!", "hello!"], ["hi", "hello!", "bye", "good.", "bad."]),
        (ANSWERS, ["why?"], ["why?", "so.", "thus."], ["why?", "so.", "thus."]),
        (document(" Ｆｕｌｌ\n WIDTH ﬁ\tstraße "), *[["full width fi strasse"]] * 3),
        (Sample("1", (Conversation("a", "1", (Turn("assistant", "Hi", 1.0),)),)), [], [], ["hi"]),
        (Sample("1", ()), [], [], []),
    ),
)
def test_parts(given, query, exchanged, whole):
    assert [said(given, part) for part in ("query", "exchange", "whole", "")] == [query, exchanged, whole, []]


@pytest.mark.parametrize(
    ("exact", "other", "equal"),
    (
        ("query", sample(("HI ", "Other.")), True),
        ("query", sample(("Hi there", "Hello!")), False),
        ("exchange", sample(("Hi", "hello!", "More", "And more.")), True),
        ("exchange", sample(("Hi", "Other.")), False),
        ("whole", sample(("Hi", "Hello!", "bye", "See you.")), True),
        ("whole", sample(("Hi", "Hello! Bye", "", "See you.")), False),
        ("whole", sample(("Hi", "Hello!")), False),
        ("", TALK, False),
    ),
)
def test_exact_duplicates(exact, other, equal):
    assert duplicates([TALK, other], exact=exact, near="") == ({1: (0, True)} if equal else {})


def test_sources_that_go_by_the_same_part_are_compared_and_others_are_not():
    key = lambda exact: Dedupe({"exact": exact}).signatures([document("All of it.")]).exact[0]
    assert len({key(part) for part in ("query", "exchange", "whole")}) == 3
    bands = [
        Dedupe({"near": part, "shortest": 0}).signatures([document("All of it.")]).bands for part in ("query", "whole")
    ]
    assert not (bands[0] == bands[1]).any()
    assert key("") == NO_KEY and (Dedupe({"near": ""}).signatures([document("long " * 99)]).bands == NO_KEY).all()


LONG = (
    "Bees make honey from nectar, and bears, who have a nose for it, climb the trees to take what they can carry. " * 2
)
CHINESE = (
    "我們在春天種樹,夏天澆水,秋天收穫果實,冬天修剪枝條。"
    "村裡的老人說,一棵樹要三代人照看:祖父種下它,父親守護它,孫子坐在樹蔭下。"
)


@pytest.mark.parametrize(
    ("first", "second", "options", "found"),
    (
        (LONG, LONG.replace("bears", "beers"), {}, True),
        (LONG, LONG.replace("bears", "beers"), {"similarity": 0.99}, False),
        (LONG, LONG.replace("bears", "beers"), {"near": ""}, False),
        (LONG[:190], LONG[:190].replace("bears", "beers"), {}, False),
        (LONG[:190], LONG[:190].replace("bears", "beers"), {"shortest": 190}, True),
        (LONG[:190], LONG[:190], {}, True),
        (CHINESE, CHINESE.replace("老人", "老者"), {"shortest": 150}, True),
        (CHINESE, CHINESE[::-1], {"shortest": 150}, False),
    ),
)
def test_near_duplicates(first, second, options, found):
    assert bool(duplicates([document(first), document(second)], **options)) == found


def test_samples_of_other_sources_are_dropped_whole_and_the_keeper_is_named():
    texts = [PAIR, sample(("Other", "Text.")), PAIR, TALK]
    found = {2: Duplicate(EXACT, "hh/7"), 3: Duplicate(NEAR, "hh/7", 0.912, "web/3")}
    ledger = Ledger()
    kept = list(Dedupe({}).drop(texts, found, ledger))
    assert kept == texts[:2]
    assert (ledger.entered, ledger.left, ledger.dropped) == (6, 3, Counter({EXACT: 2, NEAR: 1}))
    assert [drop["found"] for drop in ledger.drops] == [
        "of hh/7", "of hh/7", "of hh/7 (estimated Jaccard 0.91), by way of web/3"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"exakt": "query"}, "did you mean 'exact'"),
        ({"exact": "all"}, "exact: found 'all'; expected one of '', 'query'"),
        ({"near": None}, "near: found None"),
        ({"similarity": 0}, "similarity: found 0; expected a number above 0"),
        ({"similarity": True}, "similarity: found True"),
        ({"shortest": -1}, "shortest: found -1; expected a whole number"),
        ({"shortest": "9"}, "shortest: found '9'"),
    ),
)
def test_what_is_no_option_is_named(options, message):
    with pytest.raises(InputError, match=message):
        Dedupe(options)


def test_no_samples_and_one():
    assert len(Dedupe({}).signatures([])) == 0 and duplicates([document(LONG)]) == {}


############################################## Planted ###############################################


@pytest.fixture(scope="module")
def library():
    """Documentation of the standard library, about 1 kB each."""
    return documents(planted.documentation())


def documents(texts):
    """500 texts with a copy each, 100 of every kind, and 140 of which half is boilerplate."""
    taken = list(itertools.islice(planted.distinct(texts), 655))
    assert len(taken) == 655
    return planted.plant(taken[:500]) + [planted.Document(t, "half", -1) for t in planted.boilerplate(taken[500:], 0.5)]


def results(documents, found):
    """(kind -> copies dropped for their original, all drops besides)"""
    right, wrong = Counter(), 0
    for rank, (keeper, _) in found.items():
        own = documents[rank].kind in planted.KINDS and keeper == documents[rank].family
        right[documents[rank].kind] += own
        wrong += not own
    return right, wrong


def check(documents, found):
    right, wrong = results(documents, found)
    assert min(right[kind] for kind in planted.KINDS) >= 98, right  # of 100
    assert wrong <= 0.02 * right.total(), wrong


def test_planted_copies_are_found_and_nothing_else(library):
    found = duplicates([document(text) for text, _, _ in library])
    check(library, found)
    exact = {library[rank].kind for rank, (_, exact) in found.items() if exact}
    assert "exact" in exact and "noise" not in exact
    assert all(exact for rank, (_, exact) in found.items() if library[rank].kind == "exact")


def test_control_words_miss_the_copies_with_noise(library):
    scheme, texts = Scheme(5, 14, 8), [normal(text) for text, _, _ in library]
    smallest = minhash.minima(planted.word_shingles(texts, scheme.shingle), len(texts), scheme.permutations)
    words, _ = minhash.bands_and_sketches(smallest, 0, scheme)
    characters, _ = minhash.sketch(texts)
    met = {}
    for name, keys in (("words", words), ("characters", characters)):
        noisy = [(rank, d.family) for rank, d in enumerate(library) if d.kind == "noise"]
        met[name] = np.mean([(keys[rank] == keys[family]).any() for rank, family in noisy])
    assert met["words"] < 0.1 and met["characters"] > 0.98


def test_chunks_of_any_size_give_the_same_duplicates(library):
    samples = [document(text) for text, _, _ in library]
    assert duplicates(samples, chunk=7) == duplicates(samples)


def test_keepers_are_kept_and_come_first(library):
    """Copies stand before their originals here, and stay."""
    backwards = library[::-1]
    found = duplicates([document(text) for text, _, _ in backwards])
    assert all(keeper < rank and keeper not in found for rank, (keeper, _) in found.items())
    originals = sum(backwards[rank].kind == "original" for rank in found)
    assert originals >= 0.98 * 500


class TestRealData:
    pytestmark = real_data

    @pytest.mark.parametrize("name", ("HC3 answers", "WikiText-2", "Chinese web", "Japanese novel"))
    def test_planted_copies_are_found_and_nothing_else(self, name):
        planted_in = documents(planted.corpora(REAL)[name])
        check(planted_in, duplicates([document(text) for text, _, _ in planted_in]))

    def test_translations_are_no_duplicates(self):
        english, chinese = (planted.lines(REAL / f"eval/yuan2/GSM8K/gsm8k_{name}.txt.gz") for name in ("En", "Cn"))
        found = duplicates([document(text) for text in english + chinese], shortest=0)
        assert not [rank for rank, (keeper, _) in found.items() if keeper < len(english) <= rank]
