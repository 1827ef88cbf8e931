"""Runs of words have equal hashes where they are equal, and only there."""

import random
import re
import time

import numpy as np
import pytest

from data_pipelines.contamination.ngrams import BOUNDARY, Characters, Runs, Words


def split(text):
    words = Words(text)
    return [words.quote(i, i) for i in range(len(words))]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        (" ?! — …\n", []),
        ("Don't  PANIC!", ["don", "t", "panic"]),
        ("don’t\tpanic", ["don", "t", "panic"]),
        ("snake_case(x=1,000.5)", ["snake", "case", "x", "1", "000", "5"]),
        ("Ｆｕｌｌ ﬁ STRASSE Straße", ["full", "fi", "strasse", "strasse"]),  # NFKC, then case folded
        ("cafe\u0301 café", ["café", "café"]),
        ("co\u00adop zero\u200bwidth \ufeffx", ["coop", "zerowidth", "x"]),
        ("你好，world世界", ["你", "好", "world", "世", "界"]),
        ("猫である ﾈｺ", ["猫", "で", "あ", "る", "ネ", "コ"]),
        ("한국어 문장", ["한국어", "문장"]),  # written with spaces
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # marks belong to the word
        ("❤️ 👍🏽 x", ["x"]),
        (f"a{BOUNDARY}b", ["a", BOUNDARY, "b"]),
        ("half \ud800 pair", ["half", "pair"]),
    ],
)
def test_words(text, expected):
    assert [word.replace("\ufffd", "") for word in split(text)] == expected


def test_equal_words_have_equal_hashes_wherever_they_stand():
    a, b = Words("one two, one"), Words("Well: TWO")
    assert a.hashes[0] == a.hashes[2] != a.hashes[1]
    assert a.hashes[1] == b.hashes[1]
    assert (
        len({int(h) for text in ("ab", "ba", "a", "b", "aa", "aaa", "你", "0", "00") for h in Words(text).hashes}) == 9
    )


@pytest.mark.parametrize("length", [1, 2, 8, 13])
def test_runs_are_those_of_the_words(length):
    """Against tuples of words: the same equalities, within a text and between two."""
    draw = random.Random(length)
    texts = [" ".join(draw.choices(("a", "b", "aa", "é"), k=400)) for _ in range(2)]
    tuples, hashes = [], []
    for text in texts:
        words = re.findall(r"\w+", text)
        tuples += [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
        hashes += Runs(Words(text).hashes).of(length).tolist()
    assert len(hashes) == len(tuples)
    assert len(set(hashes)) == len(set(tuples)) == len(set(zip(tuples, hashes)))


def test_runs_of_any_length():
    runs = Runs(Words("a b c a b c d").hashes)
    assert runs.of(3)[0] == runs.of(3)[3] == runs.between(np.array([3]), np.array([6]))[0]
    assert runs.between(np.array([0, 0, 3]), np.array([7, 6, 6])).tolist()[2] != runs.of(6)[0]
    assert len(runs.of(8)) == len(Runs(Words("").hashes).of(1)) == 0
    one, two = Runs(np.array([5, 5, 5], np.uint64)), Runs(np.array([0, 0], np.uint64))
    assert len({*one.of(1), *one.of(2), *one.of(3), *two.of(1), *two.of(2)}) == 5  # the length counts


def test_characters_leave_out_what_is_between_words():
    a, b = Characters(Words("It's 5 o'clock.")), Characters(Words("its 5oclock"))
    assert (a.hashes == b.hashes).all() and len(a) == 10
    assert not (Characters(Words("its 5oc1ock")).hashes == a.hashes).all()


def test_the_time_grows_with_the_length_of_a_text():
    def seconds(text):
        taken = []
        for _ in range(3):
            start = time.process_time()
            Runs(Words(text).hashes).of(13)
            taken.append(time.process_time() - start)
        return min(taken)

    Words("warm")
    for text in ("word " * 20_000, "w" * 100_000, "字" * 100_000, ". " * 50_000):
        assert seconds(text * 8) < 40 * seconds(text) + 0.01
