"""Masked spans and masked tokens: what is hidden can be told from what is learned, in the published amounts."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import EXTRA, tiny

from data_pipelines.batches.loader import Loader, evaluation_batches
from data_pipelines.batches.packing import empty_arrays, fill_row, pack, part
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.templates.corruption import _lengths
from data_pipelines.templates.template import Example, load_template
from data_pipelines.templates.text_objective import text_objective

TOKENIZER = tiny("objectives")
FIRST = TOKENIZER.special_tokens[EXTRA[0]]
SENTINELS = range(FIRST, FIRST + len(EXTRA))
MASK = TOKENIZER.special_tokens["<mask>"]
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def document(text, weight=1.0, name="docs", number=0):
    return Conversation(name, str(number), (Turn("text", text, weight),))


def objective(kind, max_length=None, tokenizer=TOKENIZER, **options):
    return text_objective(load_template("text", tokenizer, max_length=max_length), corruption=kind, **options)


def corrupted(made, example, seed=0):
    return made._corruption(example, np.random.default_rng(seed))


def example_of(n, weight=1.0):
    """bos, n ids of text, eos."""
    ids = np.array([BOS, *range(100, 100 + n), EOS], np.int32)
    return Example(ids, np.array([0, *[weight] * (n + 1)], np.float32))


# --- spans


def restored(ids):
    """(text, spans) of `bos read eos learned eos`: the spans put back where their sentinels stand."""
    ids = list(ids)
    end = ids.index(EOS)
    read, learned = ids[1:end], ids[end + 1 : -1]
    assert ids[0] == BOS and ids[-1] == EOS
    spans, text = {}, []
    for token in learned:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    for token in read:
        text += spans[token] if token in SENTINELS else [token]
    assert [t for t in read if t in SENTINELS] == list(spans) == list(SENTINELS[: len(spans)])
    return text, list(spans.values())


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 200), seed=st.integers(0, 1 << 32), rate=st.sampled_from([0.15, 0.3]))
def test_spans_are_what_is_missing(n, seed, rate):
    example = example_of(n, 0.5)
    made = corrupted(objective("spans", corruption_rate=rate, span_length=5.0), example, seed)
    text, spans = restored(made.ids)
    assert text == example.ids[1:-1].tolist()
    noise = min(max(round(n * rate), 1), n - 1)
    assert sum(map(len, spans)) == noise and len(spans) == min(max(round(noise / 5), 1), n - noise)
    assert made.ids[1] not in SENTINELS and made.ids[list(made.ids).index(EOS) - 1] in SENTINELS
    learned = noise + len(spans) + 1
    assert made.weights.tolist() == [0.0] * (len(made.ids) - learned) + [0.5] * learned
    inputs, targets, weights = made.row()
    at = int(np.flatnonzero(weights)[0])
    assert inputs[at] == EOS and targets[at] == SENTINELS[0] and targets[-1] == EOS


def test_restoring_notices_spans_in_another_order():
    example = example_of(60)
    ids = corrupted(objective("spans"), example, 3).ids
    swapped = ids.copy()
    swapped[ids == SENTINELS[0]], swapped[ids == SENTINELS[1]] = SENTINELS[1], SENTINELS[0]
    with pytest.raises(AssertionError):
        assert restored(swapped)[0] == example.ids[1:-1].tolist()


def chi_squared(lengths_of, draws=6000):
    """Of the 10 divisions of 6 into 3 parts."""
    rng = np.random.default_rng(11)
    counts = Counter(tuple(lengths_of(6, 3, rng).tolist()) for _ in range(draws))
    assert all(sum(parts) == 6 and min(parts) >= 1 for parts in counts)
    return sum((counts[parts] - draws / 10) ** 2 for parts in counts) / (draws / 10) + (10 - len(counts)) * draws / 10


def test_every_division_into_spans_is_equally_likely():
    assert chi_squared(_lengths) < 27.9  # 0.1 % of 9 degrees of freedom
    assert chi_squared(lambda total, parts, rng: 1 + rng.multinomial(total - parts, [1 / parts] * parts)) > 100


@pytest.mark.parametrize("max_length", [12, 33, 65, 100])
def test_what_does_not_fit_is_cut(max_length):
    made = objective("spans", max_length)
    for n in range(max_length // 2, max_length):
        example = example_of(n)
        found = corrupted(made, example, n)
        text, _ = restored(found.ids)
        assert len(found.ids) <= max_length and text == example.ids[1 : len(text) + 1].tolist()
        assert found.cut == n - len(text) and (found.cut == 0 or len(found.ids) >= max_length - 3)
    assert corrupted(made, example_of(1)) is None


# --- masked tokens


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), seed=st.integers(0, 1 << 32))
def test_masked_tokens_are_learned_where_they_stand(n, seed):
    example = example_of(n, 0.5)
    made = corrupted(objective("masked"), example, seed)
    inputs, targets, weights = made.row()
    assert targets.tolist() == example.ids.tolist() and made.positions == n + 2
    learned = weights > 0
    assert learned.sum() == max(1, round(0.15 * n)) and set(weights.tolist()) <= {0.0, 0.5}
    assert not learned[0] and not learned[-1] and (inputs == targets)[~learned].all()
    packed = empty_arrays(1, n + 2 + 4)
    fill_row(packed, 0, [(example_of(3), 1), (made, 2)])
    assert (packed["inputs"][0, 4:] == inputs).all() and (packed["targets"][0, 4:] == targets).all()
    assert (packed["loss_weights"][0, 4:] == weights).all() and packed["segment_ids"][0].tolist() == [1] * 4 + [2] * (
        n + 2
    )
    assert packed["positions"][0].tolist() == [*range(4), *range(n + 2)]
    assert pack([made.positions], n + 2, "best_fit") == [[(0, 0, n + 2)]]
    with pytest.raises(ValueError, match="found examples of"):
        pack([made.positions], n + 1, "best_fit")
    pieces = [part(made, 0, 3).row(), part(made, 3, n + 2).row()]
    assert all((np.concatenate(both) == whole).all() for both, whole in zip(zip(*pieces), made.row()))


def test_eight_in_ten_are_masked_and_one_is_random():
    made, n = objective("masked"), 400
    drawn = [corrupted(made, example_of(n), seed) for seed in range(60)]
    learned = np.concatenate([e.weights > 0 for e in drawn])
    inputs, targets = (np.concatenate([getattr(e, name) for e in drawn])[learned] for name in ("ids", "targets"))
    total = len(inputs)
    near = lambda count, share: abs(count - share * total) < 5 * np.sqrt(total * share * (1 - share))
    masked, kept = (inputs == MASK).sum(), (inputs == targets).sum()
    others = inputs[(inputs != MASK) & (inputs != targets)]
    assert total == 60 * 60 and near(masked, 0.8) and near(kept, 0.1) and near(len(others), 0.1)
    assert not near(kept, 0.15) and not near(masked, 0.85)
    assert others.min() < 20 and others.max() > TOKENIZER.vocab_size - 20  # the whole vocabulary
    places = np.mean([np.flatnonzero(e.weights).mean() for e in drawn])
    assert abs(places - (n + 1) / 2) < 10  # everywhere in the text alike


def test_one_position_more_fits_than_of_next_tokens():
    made = objective("masked", 33)  # rows of 32
    (example,) = made.encode_drawn([document("bees like honey " * 20)], [np.random.default_rng(0)])
    assert example.positions == 32 and example.cut > 0
    whole = load_template("text", TOKENIZER).encode(document("bees like honey " * 20))
    assert example.cut == len(whole.ids) - 32


# --- both

TEXT = "The moon is far away, and bears like honey. "
SOURCES = {
    name: [document(TEXT * (2 + i % 3), 1.0, name, i) for i in range(size)] for name, size in (("a", 9), ("b", 5))
}


def taken(batches, number):
    return [next(batches) for _ in range(number)]


def same(found, expected):
    pairs = list(zip(found, expected, strict=True))
    return all((a.arrays[name] == b.arrays[name]).all() for a, b in pairs for name in b.arrays)


@pytest.mark.parametrize("kind", ["spans", "masked"])
def test_resuming_is_exact_and_epochs_differ(kind):
    def loader(seed=5, rate=0.15):
        made = objective(kind, 65, corruption_rate=rate)
        return Loader(SOURCES, None, made, batch_size=4, length=64, pool=6, seed=seed)

    expected = taken(loader(), 12)
    for at in (1, 5, 11):
        first, second = loader(), loader()
        taken(first, at)
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert same(taken(second, 12 - at), expected[at:])
        sought = loader()
        sought.seek(at)
        assert same(taken(sought, 12 - at), expected[at:])
    assert not same(taken(loader(seed=6), 12), expected) and not same(taken(loader(rate=0.3), 12), expected)
    seen, learned = {}, 0
    one = Loader(SOURCES, None, objective(kind, 200), batch_size=2, length=199, packing="none", pool=7)
    for batch in taken(one, 28):
        learned += np.count_nonzero(batch.arrays["loss_weights"])
        for row, (example,) in enumerate(batch.examples):
            seen.setdefault(example, set()).add(batch.arrays["inputs"][row].tobytes())
    assert len(seen) == 14 and all(len(variants) > 2 for variants in seen.values())
    assert one.stats()["loss_tokens"] == learned > 0


@pytest.mark.parametrize("kind", ["spans", "masked"])
def test_held_out_documents_are_corrupted_always_alike(kind):
    made = objective(kind, 65)
    assert made.heldout is made
    options = {"batch_size": 4, "length": 64}
    first, second = (list(evaluation_batches(SOURCES, made.heldout, **options)) for _ in range(2))
    assert same(first, second) and 0 < first[0].arrays["loss_weights"].mean() < 0.5
    assert all((a.arrays["loss_weights"] > 0).any() for a in first)


def test_settings_change_the_fingerprint():
    made = [
        objective("spans"), objective("masked"), objective("spans", corruption_rate=0.2),
        objective("spans", span_length=4.0), objective("spans", sentinels="420:440"),
        objective("masked", mask_token="430"), objective("masked", corruption_rate=0.2), objective("none"),
    ]  # fmt: skip
    assert len({one.fingerprint for one in made}) == len(made)
    assert [one.vocab_size for one in made[3:6]] == [420, 440, 431]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "span"}, r"data\.corruption = 'span': expected one of none, spans, masked"),
        ({"corruption_rate": 0.0}, r"data\.corruption_rate = 0\.0: expected a share between 0 and 1"),
        ({"corruption_rate": 1.0}, r"data\.corruption_rate = 1\.0"),
        ({"span_length": 0.5}, r"data\.span_length = 0\.5: expected a mean length of 1 or more"),
        ({"fim_rate": 0.5}, r"data\.fim_rate = 0\.5 and data\.corruption = 'spans': expected one of the two"),
        ({"sentinels": "<extra>"}, r"data\.sentinels = '<extra>': expected names with {} for the number"),
        ({"sentinels": "400:500"}, r"data\.sentinels = '400:500': expected ids from 420 on"),
        ({"sentinels": "500:500"}, r"data\.sentinels = '500:500': expected ids from 420 on"),
        ({"sentinels": "<x{}>"}, r"data\.sentinels = '<x{}>': .*tokenizer\.json has no special token <x0>"),
        ({"max_length": 2049}, r"data\.sentinels = .*: found 20; expected 9\d, for examples of 2049 ids"),
        ({"kind": "masked", "tokenizer": tiny("bytes")}, r"data\.mask_token = '': .* has no special token <mask> or"),
        ({"kind": "masked", "mask_token": "<hole>"}, r"data\.mask_token = '<hole>': .* no special token <hole>"),
        ({"kind": "masked", "mask_token": "30"}, r"data\.mask_token = '30': .*that it does not use, as 420"),
    ],
)
def test_wrong_settings_are_errors_that_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**{"kind": "spans", **options})


def test_a_conversation_is_an_error():
    chat = Conversation("talks", "7", (Turn("user", "a", 0.0), Turn("assistant", "b", 1.0)))
    for kind in ("spans", "masked"):
        with pytest.raises(ValueError, match=r"talks/7: found roles .*data\.corruption takes documents"):
            objective(kind).encode_drawn([chat], [np.random.default_rng(0)])


def test_a_text_with_too_many_spans_is_an_error():
    with pytest.raises(ValueError, match="found a text that needs 25 sentinels; expected 20 at most"):
        corrupted(objective("spans"), example_of(500))
