"""Fill in the middle: nothing of a document is lost, the shares are right, and a draw decides everything."""

import gzip
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import REAL, real_data, tiny

from data_pipelines.batches.loader import Loader, evaluation_batches, merge_states
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.templates.fill_in_the_middle import FAMILIES
from data_pipelines.templates.template import load_template
from data_pipelines.templates.text_objective import text_objective
from data_pipelines.tokenizers.tokenizer import load_tokenizer

KINDS = {"yuan": FAMILIES[0], "code_llama": FAMILIES[1], "objectives": FAMILIES[3]}
TEXTS = st.text(st.sampled_from("ab  \n<>|_é湖🐟"), min_size=1, max_size=40)
WORDS = "bees like honey, and the moon is far away; "


def document(text, weight=1.0, name="docs", number=0):
    return Conversation(name, str(number), (Turn("text", text, weight),))


def objective(kind, max_length=None, fim_rate=1.0, **options):
    template = load_template("text", tiny(kind), max_length=max_length)
    return text_objective(template, fim_rate=fim_rate, **options)


def encode(made, conversation, seed=0):
    (example,) = made.encode_drawn([conversation], [np.random.default_rng(seed)])
    return example


def parts(kind, ids):
    """(spm, {prefix, suffix, middle -> ids}) of an example; SPM has prefix and middle in one, as "middle", and looks
    like PSM with an empty prefix."""
    tokenizer, family = tiny(kind), KINDS[kind]
    ids, end = list(ids), tokenizer.special_tokens[family.end] if family.end else tokenizer.eos_id
    if tokenizer.bos_id is not None:
        assert ids.pop(0) == tokenizer.bos_id
    assert ids.pop() == end
    prefix, suffix, middle = (ids.index(tokenizer.special_tokens[piece]) for piece in family[1:4])
    assert prefix == 0 and prefix < suffix < middle
    return suffix == 1, {"prefix": ids[1:suffix], "suffix": ids[suffix + 1 : middle], "middle": ids[middle + 1 :]}


def text_of(kind, found, first="prefix"):
    """The document that the parts come from: prefix, middle, suffix. Where `first`, the part that was tokenised with
    sentencepiece's space in front, is empty, something stands in front for whose sake decoding leaves a space alone."""
    tokenizer, in_order = tiny(kind), [found["prefix"], found["middle"], found["suffix"]]
    if KINDS[kind].apart:
        return "".join(map(tokenizer.decode, in_order))
    front = [] if found[first] else tokenizer.encode("x")
    return tokenizer.decode(itertools.chain(front, *in_order))[bool(front) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, seed=st.integers(0, 1 << 32))
def test_the_parts_are_the_document(kind, text, seed):
    for rate in (0.0, 1.0):
        example = encode(objective(kind, fim_spm_rate=rate), document(text), seed)
        spm, found = parts(kind, example.ids)
        assert (
            text_of(kind, found, "middle" if rate else "prefix") == text and spm >= (rate == 1.0) and example.cut == 0
        )
        assert example.weights.tolist() == [float(i != tiny(kind).bos_id) for i in example.ids]


def test_the_order_of_parts_matters_to_that_test():
    texts = [f"{i} one {i} two {i} three" for i in range(20)]
    for kind in KINDS:
        found = [parts(kind, encode(objective(kind, fim_spm_rate=0.0), document(t), 5).ids)[1] for t in texts]
        swapped = [p | {"prefix": p["suffix"], "suffix": p["prefix"]} for p in found]
        assert sum(text_of(kind, p) == t for p, t in zip(swapped, texts)) < 5


def test_code_llamas_format():
    """As `infilling_prompt_tokens` of the release writes it, where a character in front takes the space that
    sentencepiece adds, and is taken off again."""
    tokenizer = tiny("code_llama")
    pre, suf, mid, eot = (tokenizer.special_tokens[piece] for piece in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"))
    joined = lambda text: tokenizer.encode("☺" + text)[len(tokenizer.encode("☺")) :]
    text = "the moon is far away"
    for seed in range(20):
        example = encode(objective("code_llama", fim_spm_rate=0.0), document(text), seed)
        _, found = parts("code_llama", example.ids)
        first, second = (len(tokenizer.decode(ids)) for ids in (found["prefix"], found["prefix"] + found["middle"]))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        expected = [1, pre, *tokenizer.encode(prefix), suf, *joined(suffix), mid, *joined(middle), eot]
        assert example.ids.tolist() == expected
        example = encode(objective("code_llama", fim_spm_rate=1.0), document(text), seed)
        second = len(tokenizer.decode(parts("code_llama", example.ids)[1]["middle"]))
        expected = [1, pre, suf, *joined(text[second:]), mid, *tokenizer.encode(text[:second]), eot]
        assert example.ids.tolist() == expected
    assert joined("moon") != tokenizer.encode("moon")


def counted(made, draws=4000):
    """(documents that were cut, those in SPM order, the mean share of the middle)."""
    text = "0123456789" * 20
    examples = made.encode_drawn([document(text)] * draws, [np.random.default_rng((7, i)) for i in range(draws)])
    marker = tiny("objectives").special_tokens["<|fim_prefix|>"]
    cut = [parts("objectives", e.ids) for e in examples if marker in e.ids]
    middles = [len(tiny("objectives").decode(found["middle"])) / len(text) for spm, found in cut if not spm]
    return len(cut), sum(spm for spm, _ in cut), float(np.mean(middles))


def near(count, draws, share):
    """Within five standard deviations of a binomial count."""
    return abs(count - draws * share) < 5 * np.sqrt(draws * share * (1 - share))


def test_shares_of_documents_and_orders():
    cut, spm, middle = counted(objective("objectives", fim_rate=0.5, fim_spm_rate=0.25))
    assert near(cut, 4000, 0.5) and near(spm, cut, 0.25)
    assert abs(middle - 1 / 3) < 0.02  # the mean distance of two uniform points
    other, more, _ = counted(objective("objectives", fim_rate=0.6, fim_spm_rate=0.5))
    assert not near(other, 4000, 0.5) and not near(more, other, 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_long_documents_keep_their_middle(kind):
    text, lengths, whole = WORDS * 20, set(), 0
    for seed in range(200):
        example = encode(objective(kind, max_length=60), document(text), seed)
        marker = tiny(kind).special_tokens[KINDS[kind].prefix]
        lengths.add(len(example.ids))
        if marker not in example.ids:  # what does not fit in three parts
            whole += 1
            continue
        spm, found = parts(kind, example.ids)
        assert text.startswith(text_of(kind, found, "middle" if spm else "prefix")) and example.cut > 0
    assert max(lengths) == 60 and whole < 20
    short = encode(objective(kind, max_length=60, fim_spm_rate=1.0), document("bees"), 1)
    assert short.cut == 0 and text_of(kind, parts(kind, short.ids)[1], "middle") == "bees"


def test_only_documents_that_are_learned():
    made = objective("objectives")
    chat = Conversation("docs", "1", (Turn("user", "a", 0.0), Turn("assistant", "b", 1.0)))
    with pytest.raises(ValueError, match='template "text" takes one turn'):
        encode(made, chat)
    koala = text_objective(load_template("koala", tiny("objectives")), fim_rate=1.0)
    assert encode(koala, chat).ids.tolist() == koala.template.encode(chat).ids.tolist()
    assert encode(made, document("bees", weight=0.0)) is None
    assert set(encode(made, document("bees", weight=0.5)).weights.tolist()) == {0.0, 0.5}


# --- the order of the data

SOURCES = {
    name: [document(WORDS * (1 + i % 3), 1.0, name, i) for i in range(size)] for name, size in (("a", 9), ("b", 5))
}


def loader(**options):
    defaults = {"batch_size": 4, "length": 64, "pool": 6, "seed": 5}
    made = options.pop("made", None) or objective("objectives", 65, fim_rate=0.5)
    return Loader(SOURCES, None, made, **defaults | options)


def taken(batches, number):
    return [next(batches) for _ in range(number)]


def same(found, expected):
    pairs = list(zip(found, expected, strict=True))
    return all(a.examples == b.examples for a, b in pairs) and all(
        (a.arrays[name] == b.arrays[name]).all() for a, b in pairs for name in b.arrays
    )


def test_resuming_is_exact_and_other_seeds_differ():
    expected = taken(loader(), 12)
    for at in (0, 1, 5, 11):
        first = loader()
        taken(first, at)
        second = loader()
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert same(taken(second, 12 - at), expected[at:])
    assert not same(taken(loader(seed=6), 12), expected)
    assert not same(taken(loader(made=objective("objectives", 65, fim_rate=0.6)), 12), expected)


def test_processes_make_the_same_stream():
    expected = taken(loader(), 6)
    halves = [loader(rows=rows) for rows in (range(2), range(2, 4))]
    found = [taken(half, 6) for half in halves]
    for step, batch in enumerate(expected):
        for name, array in batch.arrays.items():
            assert (np.concatenate([half[step].arrays[name] for half in found]) == array).all()
    assert merge_states([half.get_state() for half in halves])["step"] == 6


def test_every_epoch_cuts_anew():
    made, seen = objective("objectives", 200, fim_rate=1.0), {}
    for batch in taken(Loader(SOURCES, None, made, batch_size=2, length=199, packing="none", pool=7), 42):
        for row, (example,) in enumerate(batch.examples):
            seen.setdefault(example, set()).add(batch.arrays["inputs"][row].tobytes())
    assert len(seen) == 14 and all(len(variants) > 2 for variants in seen.values())


def test_held_out_documents_are_whole():
    made = objective("objectives", 65, fim_rate=1.0)
    assert made.heldout is made.template
    options = {"batch_size": 4, "length": 64}
    plain = list(evaluation_batches(SOURCES, made.template, **options))
    assert same(list(evaluation_batches(SOURCES, made.heldout, **options)), plain)
    cut = next(evaluation_batches(SOURCES, made, **options))
    assert (cut.arrays["inputs"] != plain[0].arrays["inputs"]).any()


# --- settings


def test_the_fingerprint_tells_settings_apart():
    made = [
        objective("objectives"), objective("yuan"), objective("objectives", fim_rate=0.5),
        objective("objectives", fim_spm_rate=0.4), objective("objectives", max_length=65),
    ]  # fmt: skip
    assert len({one.fingerprint for one in [*made, made[0].template]}) == 6
    assert objective("objectives").fingerprint == made[0].fingerprint
    template = load_template("text", tiny("objectives"))
    assert text_objective(template, fim_spm_rate=0.1) is template


def test_wrong_settings_are_errors_that_name_the_key():
    with pytest.raises(
        ValueError, match=r"data\.fim_rate: .*tokenizer\.json has no special tokens for it; known are Yuan"
    ):
        objective("bytes")
    for key, value in [("fim_rate", 1.5), ("fim_rate", float("nan")), ("fim_spm_rate", -0.1)]:
        with pytest.raises(ValueError, match=rf"data\.{key} = {value}: expected a share, from 0 to 1"):
            objective("objectives", **{key: value})


class TestRealFiles:
    pytestmark = real_data

    @pytest.mark.parametrize("name", ["yuan2_sp"])
    def test_stories_come_back_whole(self, name):
        tokenizer = load_tokenizer(REAL / "tokenizers" / name)
        with gzip.open(REAL / "pretrain" / "tinystories" / "tinystories_sample_2MiB.txt.gz", "rt") as file:
            stories = [story.strip() for story in file.read().split("<|endoftext|>")[:300]]
        made = text_objective(load_template("text", tokenizer), fim_rate=1.0, fim_spm_rate=0.0)
        rngs = [np.random.default_rng(i) for i in range(len(stories))]
        prefix, suffix, middle, eod = (
            tokenizer.special_tokens[f"<{n}>"] for n in ("FIM_PREFIX", "FIM_SUFFIX", "FIM_MIDDLE", "eod")
        )
        for story, example in zip(stories, made.encode_drawn(list(map(document, stories)), rngs)):
            ids = example.ids.tolist()
            at, then = ids.index(suffix), ids.index(middle)
            assert ids[0] == prefix and ids[-1] == eod
            found = [ids[1:at], ids[then + 1 : -1], ids[at + 1 : then]]
            assert "".join(map(tokenizer.decode, found)) == story
