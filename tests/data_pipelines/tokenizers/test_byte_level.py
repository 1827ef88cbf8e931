"""The quick way gives what `tokenizers` gives, ids and offsets, and files where that is not certain do not take it."""

import gzip
import itertools
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHAT, REAL, SENTENCES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipelines.tokenizers import byte_level, training
from data_pipelines.tokenizers.tokenizer import load_tokenizer

TEXTS = st.text(
    st.one_of(st.sampled_from("abestnmoi'SsTdl  \n\r\t\u3000!<|>1234éß湖🐟\u0301ſ\x00"), st.characters(codec="utf-8"))
)
MORE = [
    *SENTENCES,
    "I'LL don't we've 12345 \r\n\n  x   y\t z",
    "湖湖 bees  bees\u3000\u3000 Straße ñandú ﬁ ², ⅷ 한국어",
    "aaaa bbbb the the",
]


def trained(words, vocabulary=420):
    """A tokenizer with this expression; None: ByteLevel's own."""
    tokenizer = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, own]) if split else own
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<pad>", "<eos>", *CHAT], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(MORE * 4, trainers.BpeTrainer(vocab_size=vocabulary, **options))
    return tokenizer


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """[(loaded, its peer)] for each expression."""
    found = []
    for number, words in enumerate((None, *byte_level.KNOWN)):
        path = tmp_path_factory.mktemp("quick") / f"{number}.json"
        trained(words).save(str(path))
        peer = Tokenizer.from_file(str(path))
        peer.encode_special_tokens = True
        found.append((load_tokenizer(path), peer))
    return found


def check_same(tokenizer, peer, texts):
    """Ids and offsets of one text after the other, and of all inside."""
    for ids, inside, (again, starts, ends), expected in zip(
        tokenizer.encode_batch(texts),
        tokenizer.encode_inside(texts),
        tokenizer.encode_offsets(texts, continued=True),
        peer.encode_batch(texts, add_special_tokens=False),
        strict=True,
    ):
        assert ids.tolist() == inside.tolist() == again.tolist() == expected.ids
        assert list(zip(starts.tolist(), ends.tolist())) == expected.offsets
        assert ids.dtype == starts.dtype == ends.dtype == np.int32


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
@example(["", "<eos>", f"a{CHAT[0]}", "a" * 30_000, " " * 30_000, " a" * 20_000])
def test_ids_and_offsets_are_those_of_tokenizers(both, texts):
    for tokenizer, peer in both:
        assert tokenizer._quick is not None
        check_same(tokenizer, peer, texts)


def of_pairs(words):
    """Both with a vocabulary of bytes and of a left neighbour and a byte: ids then tell where words are cut."""
    pieces = byte_level.byte_pieces()
    merges = [(pieces[ord(left)], piece) for left in "a1! " for piece in pieces]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *map("".join, merges)])}
    peer = Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    return byte_level.quick(json.loads(peer.to_str()), peer.model), peer


@pytest.mark.parametrize("words", byte_level.KNOWN)
def test_every_character_is_cut_alike(words):
    """Unicode's versions might differ. From U+10000 on every fourth, from U+20000 (mostly ideographs) every 256th."""
    quick, peer = of_pairs(words)
    numbers = itertools.chain(
        range(0xD800), range(0xE000, 0x10000), range(0x10000, 0x20000, 4), range(0x20000, 0x110000, 256)
    )
    characters = list(map(chr, numbers))
    blocks = [characters[i : i + 2000] for i in range(0, len(characters), 2000)]
    texts = ["".join(f"a{c}1{c}!{c} {c}'{c}\n" for c in block) for block in blocks]
    for text, expected in zip(texts, peer.encode_batch_fast(texts, add_special_tokens=False)):
        assert quick.takes(text)
        assert quick.pairs.encode(text).tolist() == expected.ids


def test_another_expression_would_be_noticed():
    quick, _ = of_pairs(byte_level.GPT_2)
    _, peer = of_pairs(byte_level.GPT_2.replace(r" ?\p{L}+", r" ?[\p{L}\u0301]+"))
    assert quick.pairs.encode("a\u0301").tolist() != peer.encode("a\u0301").ids


def swapped(source):
    """The first merge, made last."""
    merges = source["model"]["merges"]
    merges.append(merges.pop(0))


def unreachable(source):
    source["model"]["vocab"]["zqx"] = len(source["model"]["vocab"])


CHANGES = {
    "merges in another order": swapped,
    "a token that no merge makes": unreachable,
    "another expression": lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\s+|\S+"}),
    "cut off, not isolated": lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    "a space in front": lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "cut twice": lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    "no bytes": lambda s: s.update(pre_tokenizer=None),
    "another normaliser": lambda s: s.update(normalizer={"type": "Lowercase"}),
    "an unknown token": lambda s: s["model"].update(unk_token="<pad>"),
    "words as they are": lambda s: s["model"].update(ignore_merges=True),
    "a missing byte": lambda s: s["model"]["vocab"].pop("Ā"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_files_that_are_not_certain_are_left_to_tokenizers(tmp_path, change):
    source = json.loads(trained(byte_level.GPT_2).to_str())
    model = lambda: Tokenizer.from_str(json.dumps(source)).model
    assert byte_level.quick(source, model()) is not None
    change(source)
    assert byte_level.quick(source, model()) is None


def test_the_order_of_merges_matters():
    """What a file is refused for: with the ids as ranks the text would get other tokens."""
    pieces = byte_level.byte_pieces()
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "ab", "bc"])}
    ranks = {piece.encode("latin-1"): vocabulary[piece] for piece in ("a", "b", "c", "ab", "bc")}
    quick = byte_level.BytePairs(ranks, byte_level.GPT_2)
    for merges, same in (([("a", "b"), ("b", "c")], True), ([("b", "c"), ("a", "b")], False)):
        peer = Tokenizer(models.BPE(vocabulary, merges))
        peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert (quick.encode("abc").tolist() == peer.encode("abc").ids) == same
        assert (byte_level.quick(json.loads(peer.to_str()), peer.model) is not None) == same


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.sampled_from(["<think>", "<thin", "e\u0301", "é", " a", "bees", "\n "]), max_size=6).map("".join)
)
def test_texts_that_the_quick_way_does_not_take(normalised, text):
    check_same(*normalised, [text, f"{text} bees", "bees"])


@pytest.fixture(scope="module")
def normalised(tmp_path_factory):
    """With NFC, and a token that is found in any text."""
    tokenizer = trained(byte_level.QWEN)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<think>")])
    path = tmp_path_factory.mktemp("normalised") / "tokenizer.json"
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    assert [loaded._quick.takes(text) for text in ("bees", "é", "a<think>", "<thin")] == [True, False, False, True]
    peer = Tokenizer.from_file(str(path))
    peer.encode_special_tokens = True
    return loaded, peer


def test_trimmed_offsets_and_half_surrogates_are_left_to_tokenizers(tmp_path):
    tokenizer = trained(None)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded._quick is not None and not loaded._quick.offsets
    check_same(loaded, tokenizer, [" bees  make honey "])
    with pytest.raises(TypeError):
        loaded.encode("\ud800")


def test_trained_files_are_quick(tmp_path):
    training.train(MORE, 400, CHAT, tmp_path)
    assert load_tokenizer(tmp_path)._quick is not None


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data")
def test_gpt2_on_real_text():
    path = REAL / "tokenizers" / "gpt2" / "tokenizer.json"
    assert load_tokenizer(path)._quick is not None
    with gzip.open(REAL / "pretrain" / "wikitext2" / "wiki.valid.tokens.gz", "rt", encoding="utf-8") as file:
        text = file.read(400_000)
    check_same(load_tokenizer(path), Tokenizer.from_file(str(path)), [text, *text.splitlines(keepends=True)])
