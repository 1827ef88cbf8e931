"""Signatures: always the same, as accurate as random orders, and as likely to meet in a bucket as the formula says."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.stages import minhash
from data_pipelines.stages.minhash import NO_KEY, SCHEME, Scheme, Signatures, sketch

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "我們在春天種樹,秋天收穫。",
    "🙂🙃🙂🙃🙂🙃",
    "abcde",
    "abcd",
    "",
]


def sets(similarity, pairs, size=600, seed=0):
    """Hashes of `pairs` pairs of sets with that Jaccard similarity, to within one in `size`."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 1 << 32, (pairs, 2 * size), np.uint32)
    shared = round(2 * size * similarity / (1 + similarity))
    return [row[:size] for row in drawn], [np.append(row[:shared], row[size : 2 * size - shared]) for row in drawn]


def errors(hashes, similarity, change=lambda smallest: smallest):
    a, b = (change(minhash.minima(side, len(side), SCHEME.permutations)) for side in hashes)
    return (a == b).mean(1) - similarity


@pytest.mark.parametrize("similarity", (0.1, 0.5, 0.8))
def test_estimates_are_those_of_random_orders(similarity):
    hashes = sets(similarity, 400)
    expected = (similarity * (1 - similarity) / SCHEME.permutations) ** 0.5
    error = errors(hashes, similarity)
    assert abs(error.mean()) < 3 * expected / 400**0.5 + 1 / 600
    assert 0.85 * expected < error.std() < 1.15 * expected
    # control: the same few orders again and again know no more than these
    repeated = errors(hashes, similarity, lambda smallest: np.tile(smallest[:, :11], 10))
    assert repeated.std() > 2 * expected


@pytest.mark.parametrize("similarity", (0.0, 0.3, 0.8))
def test_eight_bits_estimate_as_well(similarity):
    smallest = [minhash.minima(side, len(side), SCHEME.permutations) for side in sets(similarity, 400)]
    a, b = (minhash.bands_and_sketches(side, 0, SCHEME)[1] for side in smallest)
    matches = np.count_nonzero(a == b, axis=1)
    expected = ((similarity + 1 / 256) * (1 - similarity) / SCHEME.permutations) ** 0.5
    unclipped = (matches / SCHEME.permutations - 1 / 256) / (1 - 1 / 256)
    assert abs(unclipped.mean() - similarity) < 3 * expected / 400**0.5 + 1 / 600
    assert minhash.estimate(matches, SCHEME.permutations) == pytest.approx(np.maximum(0, unclipped))


@pytest.mark.parametrize(("similarity", "scheme"), ((0.5, Scheme(5, 22, 5)), (0.7, Scheme(5, 14, 8))))
def test_pairs_meet_as_often_as_the_formula_says(similarity, scheme):
    smallest = [minhash.minima(side, len(side), scheme.permutations) for side in sets(similarity, 600)]
    keys = [minhash.bands_and_sketches(side, 0, scheme)[0] for side in smallest]
    met = (keys[0] == keys[1]).any(axis=1).mean()
    expected = 1 - (1 - similarity**scheme.rows) ** scheme.bands
    assert met == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 600) ** 0.5)
    assert abs(met - (1 - (1 - similarity ** (scheme.rows + 1)) ** scheme.bands)) > 0.1  # control: another formula


def test_signatures_never_change():
    """They are kept and compared with those of later runs: a change here makes all that is cached useless."""
    bands, sketches = sketch(TEXTS, salt=7)
    digest = hashlib.sha256(bands.astype("<u8").tobytes() + sketches.tobytes()).hexdigest()
    assert digest[:16] == DIGEST


DIGEST = "acff919d1483e66f"


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=8), batch=st.integers(1, 60), block=st.integers(1, 20))
def test_a_text_has_the_same_signature_whatever_stands_beside_it(texts, batch, block):
    bands, sketches = sketch(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "_BATCH", batch)
        patch.setattr(minhash, "_BLOCK", block)
        again = sketch(texts)
    alone = [sketch([text]) for text in texts]
    for found, one in zip((bands, sketches), zip(*alone)):
        assert (found == np.concatenate(one)).all()
    assert (bands == again[0]).all() and (sketches == again[1]).all()


def test_a_shingle_is_a_set_of_runs():
    [once], [twice], [other] = (list(minhash.shingles([text], 5)) for text in ("abcdefg", "abcdefgabcdefg", "gfedcba"))
    assert len(once) == 3 and len(np.unique(np.append(once, other))) == 6
    assert set(once) < set(twice)
    assert (minhash.minima([once], 1, 30) == minhash.minima([np.append(once, once)], 1, 30)).all()


def test_hashes_of_shingles_do_not_collide_more_than_random_ones():
    codes = np.random.default_rng(0).integers(0x4E00, 0x9FA5, 100_000)
    [hashes] = minhash.shingles(["".join(map(chr, codes))], 5)
    assert len(hashes) - len(np.unique(hashes)) <= 5  # 1.2 expected


def test_what_is_shorter_than_a_shingle_meets_nothing():
    bands, _ = sketch(TEXTS)
    assert (bands[:4] != NO_KEY).all() and (bands[4:] == NO_KEY).all()


def test_keys_of_bands_and_of_kinds_differ():
    bands = np.concatenate([sketch(TEXTS[:4], salt)[0] for salt in (0, 1, 2**64 - 1)])
    assert len(np.unique(bands)) == bands.size
    assert (sketch(["same text"])[0] == sketch(["same text"])[0]).all()


def test_needed_is_the_first_count_that_is_similar_enough():
    for similarity in (1e-9, 0.3, 0.7, 0.75, 1.0):
        need = minhash.needed(similarity, SCHEME.permutations)
        reached = minhash.estimate([need - 1, need], SCHEME.permutations) >= similarity
        assert reached.tolist() == [False, True] or need == 1
    assert minhash.needed(1.0, SCHEME.permutations) == SCHEME.permutations


def test_signatures_are_kept_without_pickle(tmp_path):
    bands, sketches = sketch(TEXTS)
    kept = Signatures(np.arange(6, dtype=np.uint64), bands, sketches, np.full(6, 78, np.uint8))
    kept.save(tmp_path / "a.npz")
    read = Signatures.load(tmp_path / "a.npz")
    for name in ("exact", "bands", "sketches", "needed"):
        there, back = getattr(kept, name), getattr(read, name)
        assert there.dtype == back.dtype and (there == back).all()
    assert len(read) == 6
