"""Keys of tokenizers in GGUF files, and the tokenizers that have none. test_gguf_engine.py compares tokens."""

import json
import re

import pytest
import tiny
import tiny_tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipelines.tokenizers.files import PieceType, sentencepiece_proto
from data_pipelines.tokenizers.tokenizer import load_tokenizer
from data_pipelines.tokenizers.training import train
from easylm_plus.errors import UserError
from easylm_plus.interop.gguf_tokenizer import PRE, longest_first, open_tokenizer, tokenizer_keys

LLAMA3, QWEN2 = (next(key[0][1] for key, name in PRE.items() if name == wanted) for wanted in ("llama-bpe", "qwen2"))


def keys_of(tokenizer, extra=0, **more):
    return {key: value for key, _, value in tokenizer_keys(tokenizer, tokenizer.vocab_size + extra, **more)}


def byte_level(folder, pieces, *, normalizer=None, special=("<|begin_of_text|>", "<|end_of_text|>"), **model):
    """A tokenizer.json of byte-level BPE whose text is cut by `pieces`."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(pieces), decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*tiny_tokenizers.SENTENCES, (tiny.ROOT / "README.md").read_text()], trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def test_sentencepiece():
    tokenizer = tiny_tokenizers.tiny("sentencepiece")
    keys = keys_of(tokenizer, extra=3)
    proto = sentencepiece_proto(tokenizer.model())
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"]
    assert keys["tokenizer.ggml.tokens"][:-3] == [piece.piece for piece in proto.pieces]
    assert keys["tokenizer.ggml.scores"][:-3] == [piece.score for piece in proto.pieces]
    types = keys["tokenizer.ggml.token_type"]
    assert types[-3:] == [PieceType.UNUSED] * 3 and len(set(keys["tokenizer.ggml.tokens"])) == len(types)
    assert types[tokenizer.special_tokens["<|user|>"]] == PieceType.CONTROL, "in the file it is user-defined"
    assert types.count(PieceType.BYTE) == 256 and keys["tokenizer.ggml.unknown_token_id"] == 0
    ids = {kind: keys[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos")}
    assert ids == {"bos": 1, "eos": 2} and keys["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize(
    ("change", "told"),
    (
        ({"model_type": 1}, "model_type UNIGRAM; llama.cpp's tokenizers have BPE"),
        ({"byte_fallback": False}, "byte_fallback False"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces True"),
        ({"precompiled_charsmap": b"xx"}, "precompiled_charsmap 2"),
    ),
    ids=("unigram", "no_bytes", "whitespace", "normalised"),
)
def test_sentencepiece_that_llama_cpp_has_not(change, told, monkeypatch):
    tokenizer = tiny_tokenizers.tiny("control")
    proto = sentencepiece_proto(tokenizer.model())
    for key, value in change.items():
        part = proto.trainer_spec if hasattr(proto.trainer_spec, key) else proto.normalizer_spec
        setattr(part, key, value)
    monkeypatch.setattr(tokenizer, "model", proto.SerializeToString)
    with pytest.raises(UserError, match=f"tokenizer.model: found {told}"):
        keys_of(tokenizer)


@pytest.mark.parametrize(
    ("pieces", "model", "pre"),
    (
        ([split(LLAMA3), BYTES], {"ignore_merges": True}, "llama-bpe"),
        ([split(QWEN2), BYTES], {}, "qwen2"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], {}, "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], {}, "smollm"),
    ),
    ids=("llama3", "qwen2", "gpt2", "smollm"),
)  # fmt: skip
def test_words_are_known_by_name(tmp_path, pieces, model, pre):
    tokenizer = byte_level(tmp_path, pieces, **model)
    keys = keys_of(tokenizer)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", pre)
    source = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(merge) for merge in source["merges"]]
    assert all(source["vocab"][piece] == i for i, piece in enumerate(keys["tokenizer.ggml.tokens"]))
    assert keys["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and keys["tokenizer.ggml.bos_token_id"] == 0


@pytest.mark.parametrize(
    ("pieces", "more", "told"),
    (
        ([split(r"\d+"), BYTES], {}, "found pre_tokenizer .*expected one that llama.cpp has"),
        ([split(LLAMA3), BYTES], {}, "model.ignore_merges: found False; llama.cpp's llama-bpe has True"),
        ([split(QWEN2), BYTES], {"ignore_merges": True}, "model.ignore_merges: found True"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], {}, "found pre_tokenizer"),
        ([split(QWEN2), BYTES], {"normalizer": normalizers.NFKC()}, "found a normalizer NFKC; llama.cpp's qwen2"),
    ),
    ids=("words", "merges", "no_merges", "prefix", "normalizer"),
)  # fmt: skip
def test_words_that_llama_cpp_has_not(tmp_path, pieces, more, told):
    with pytest.raises(UserError, match=f"tokenizer.json: {told}"):
        keys_of(byte_level(tmp_path, pieces, **more))


@pytest.mark.parametrize("kind", ("first", "always"))
def test_pieces_without_bytes(kind):
    with pytest.raises(UserError, match=r"found pre_tokenizer .*Metaspace"):
        keys_of(tiny_tokenizers.tiny(kind))


def test_our_own_with_line_breaks(tmp_path):
    train(["a\n\nb\n\n\n\nc " * 20, "def f():\n    return 1\n\n" * 20], 300, [], tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    runs = [i for i in range(tokenizer.vocab_size) if re.fullmatch("\n{2,}", tokenizer.decode([i]))]
    assert len(runs) >= 2
    keys = keys_of(tokenizer)
    assert keys["tokenizer.ggml.pre"] == "smollm"
    for i, (piece, kind) in enumerate(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"])):
        assert (kind == PieceType.USER_DEFINED) == (i in runs) and (i not in runs or piece == tokenizer.decode([i]))


def test_longest_first():
    ids = {"\n": 1, "\n\n": 2, "\n\n\n\n": 4}
    assert longest_first("\n" * 7, ids) == [4, 2, 1]
    assert longest_first("\n", ids) == [1]


def test_our_own_that_cannot_be_told(tmp_path):
    train(["a\t\tb \t\tc " * 40], 300, [], tmp_path / "tabs")
    with pytest.raises(UserError, match=r"found a token '\\t\\t'"):
        keys_of(load_tokenizer(tmp_path / "tabs"))
    train(["a\n\n\nb\n\n\nc " * 40], 300, [], tmp_path / "threes")
    with pytest.raises(UserError, match=r"'\\n\\n\\n\\n' is \[259, 259\], which llama.cpp would make \[260, 201\]"):
        keys_of(load_tokenizer(tmp_path / "threes"))  # merges in pairs: the longest token is not the first


def test_of_two_files_the_one_with_scores(tmp_path):
    for folder, name in (("sentencepiece", "tokenizer.model"), ("first", "tokenizer.json")):
        tokenizer = tiny_tokenizers.tiny(folder)
        (tmp_path / name).write_bytes(tokenizer.path.read_bytes())
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    source["model"]["byte_fallback"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match=r"tokenizer.model: found 400 tokens, tokenizer.json has \d+"):
        open_tokenizer(tmp_path)
    source["model"]["vocab"] = {f"p{i}": i for i in range(400)}
    source["model"]["merges"], source["added_tokens"], source["model"]["unk_token"] = [], [], None
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    assert open_tokenizer(tmp_path).path.name == "tokenizer.model"
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"expected tokenizer\.model beside"):
        open_tokenizer(tmp_path)


def test_bos_and_templates(tmp_path):
    tokenizer = byte_level(tmp_path, [split(QWEN2), BYTES])
    adds = lambda tokenizer, **more: keys_of(tokenizer, **more)["tokenizer.ggml.add_bos_token"]
    assert adds(tokenizer, ours=True) and not adds(tokenizer) and "tokenizer.chat_template" not in keys_of(tokenizer)
    raw = Tokenizer.from_file(str(tokenizer.path))
    special = [("<|begin_of_text|>", tokenizer.bos_id)]
    first = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=special)
    for processor in (first, processors.Sequence([processors.ByteLevel(), first])):
        raw.post_processor = processor
        raw.save(str(tokenizer.path))
        assert adds(load_tokenizer(tmp_path)), "as transformers, which runs it"
    template = "{% for m in messages %}{%- generation -%}{{ m.content }}{% endgeneration %}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    keys = keys_of(load_tokenizer(tmp_path), ours=True, chat_template=template)
    assert not keys["tokenizer.ggml.add_bos_token"]
    assert keys["tokenizer.chat_template"] == "{% for m in messages %}{{ m.content }}{% endfor %}"
