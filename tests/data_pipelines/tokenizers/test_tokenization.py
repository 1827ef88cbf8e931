"""Every back end: text stays text, a stream equals the whole, files are found, and real vectors are met."""

import base64
import functools
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import (
    BACK_ENDS,
    BYTE_LEVEL,
    CHAT,
    REAL,
    hugging_face,
    llama2c_file,
    real_data,
    sentencepiece_model,
    tiktoken_file,
    tiny,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from data_pipelines.tokenizers import tiktoken_files
from data_pipelines.tokenizers.tokenizer import StreamDecoder, load_tokenizer

TEXTS = st.text(st.sampled_from("ab <|>/usered\n é湖🐟▁\x00"), max_size=30)


@pytest.mark.parametrize("kind", BACK_ENDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_text_never_becomes_a_special_token(kind, data):
    tokenizer = tiny(kind)
    pieces = st.sampled_from(sorted(tokenizer.special_tokens))
    text = data.draw(st.lists(st.one_of(pieces, TEXTS), max_size=6).map("".join))
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.encode_batch([text, "bees", text])[2].tolist() == ids
    if kind in BYTE_LEVEL:
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["sentencepiece", "control", "llama2c"])
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=30).filter(lambda text: "▁" not in text))
def test_sentencepiece_with_bytes_is_lossless(kind, text):
    assert tiny(kind).decode(tiny(kind).encode(text)) == text


def test_chat_tokens_are_special_however_they_were_declared():
    for kind in BACK_ENDS[:-1]:
        for piece in CHAT:
            assert tiny(kind).special_tokens[piece] == tiny(kind).token_id(piece) not in tiny(kind).encode(piece)


def test_control_libraries_by_themselves_do_make_special_tokens_of_text():
    raw = Tokenizer.from_file(str(tiny("bytes").path))
    assert raw.token_to_id("<|user|>") in raw.encode("hi <|user|>").ids
    raw = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(user_defined_symbols=CHAT))
    assert raw.piece_to_id("<|user|>") in raw.encode("hi <|user|>")


@pytest.mark.parametrize("kind", BACK_ENDS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_a_stream_equals_the_whole_and_never_breaks_a_character(kind, text):
    tokenizer = tiny(kind)
    ids = [*tokenizer.encode(text), tokenizer.eos_id, *tokenizer.encode(" " + text)]
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(token_id) for token_id in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)


def test_a_stream_gives_up_on_broken_text_and_shows_special_tokens_if_asked():
    tokenizer = tiny("sentencepiece")
    byte = tokenizer.token_id("<0xF0>")
    decoder = StreamDecoder(tokenizer)
    assert "\ufffd" in "".join(decoder.push(byte) for _ in range(20))
    decoder = StreamDecoder(tokenizer, skip_special=False)
    ids = [*tokenizer.encode("bees"), tokenizer.eos_id, *tokenizer.encode("like")]
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids, skip_special=False)
    assert tokenizer.decode(ids, skip_special=False) == "bees</s>like"
    assert tokenizer.decode(np.array(ids)) == "bees like"
    one_by_one = "".join(tokenizer.decode([i]) for i in tokenizer.encode("the 湖"))
    assert one_by_one != "the 湖"  # what the decoder is for


@pytest.mark.parametrize("kind", BACK_ENDS)
@pytest.mark.parametrize("text", ["oon", " is far", "  two", "湖<|end|>", ""])
def test_text_inside_a_word_gets_no_space(kind, text):
    tokenizer = tiny(kind)
    front, (inside,) = tokenizer.encode("m"), tokenizer.encode_inside([text])
    assert tokenizer.decode([*front, *inside]) == "m" + text
    with_space = tokenizer.decode([*front, *tokenizer.encode("oon")])
    assert with_space == ("moon" if kind in BYTE_LEVEL else "m oon")  # what it is for


def test_a_normalizer_that_prepends_a_space_is_left_out_inside(tmp_path):
    raw = hugging_face("first")  # then made what LLaMA's first tokenizer.json was
    raw.pre_tokenizer = pre_tokenizers.Sequence([])
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([*tokenizer.encode("m"), *tokenizer.encode_inside(["oon is"])[0]]) == "moon is"
    assert tokenizer.decode([*tokenizer.encode("m"), *tokenizer.encode("oon is")]) == "m oon is"


@pytest.mark.parametrize("kind", BACK_ENDS)
def test_ids_beyond_the_vocabulary_are_no_text(kind):
    tokenizer = tiny(kind)
    ids = [*tokenizer.encode("bees"), tokenizer.vocab_size, *tokenizer.encode("bees"), tokenizer.vocab_size + 900]
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode("bees") * 2)
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_sentencepiece_puts_its_space_before_every_segment():
    tokenizer = tiny("sentencepiece")
    space = lambda text: tokenizer.decode([tokenizer.encode("a")[0], *tokenizer.encode(text)])
    assert space("moon") == "a moon" and space(" moon") == "a  moon"
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("kind", BACK_ENDS)
def test_offsets_cover_the_text(kind):
    text = "Bees é湖 moon"
    ((ids, starts, ends),) = tiny(kind).encode_offsets([text])
    assert ids.tolist() == tiny(kind).encode(text)
    assert starts[0] == 0 and ends[-1] == len(text) and (starts <= ends).all()
    covered = set().union(*(range(a, b) for a, b in zip(starts, ends)))
    assert covered >= {i for i, character in enumerate(text) if character != " "}


@pytest.mark.parametrize("kind", BACK_ENDS)
def test_save_and_load(kind, tmp_path):
    tokenizer = tiny(kind)
    (tokenizer.path.parent / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    try:
        tokenizer.save(tmp_path / "copy")
    finally:
        (tokenizer.path.parent / "tokenizer_config.json").unlink()
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint, copy.vocab_size, copy.special_tokens) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.special_tokens,
    )
    assert copy.encode(SENTENCE) == tokenizer.encode(SENTENCE) and copy.chat_template == "{{ 1 }}"
    assert None not in (copy.bos_id, copy.eos_id) and copy.bos_id != copy.eos_id


SENTENCE = "The moon is far away."


def test_files_are_found_or_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tokenizer(tmp_path / "other.json")
    (tmp_path / "words.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected a \.json"):
        load_tokenizer(tmp_path / "words.txt")
    (tmp_path / "tokenizer.bin").write_bytes(llama2c_file(sentencepiece_model())[:-1])
    with pytest.raises(ValueError, match=r"expected a token of a llama2\.c tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert load_tokenizer(tmp_path).token_id("<s>") == 1
    hugging_face("bytes").save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).token_id("<bos>") == 2
    with pytest.raises(ValueError, match="no piece 'elephant'"):
        load_tokenizer(tmp_path).token_id("elephant")


def test_what_the_files_beside_a_model_declare(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(user_defined_symbols=["<eod>", "honey"]))
    added = {"0": {"content": "<unk>", "special": True}, "900": {"content": "<mask>", "special": True}}
    added["901"] = {"content": "plain", "special": False}
    config = {"bos_token": {"content": "<eod>"}, "eos_token": "<eod>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.token_id("<eod>")
    assert tokenizer.special_tokens["<mask>"] == 900 and tokenizer.vocab_size == 901
    assert tokenizer.decode([*tokenizer.encode("moon"), 900], skip_special=False) == "moon<mask>"
    assert "honey" not in tokenizer.special_tokens  # a user-defined symbol that is a word stays one
    assert tokenizer.token_id("honey") in tokenizer.encode("ahoneyb")


def test_a_vocabulary_that_lets_text_spell_a_special_token_is_refused(tmp_path):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="plain text '</s>' encodes to the special token 1"):
        load_tokenizer(tmp_path)


def test_special_tokens_are_split_off_as_hugging_face_does(tmp_path):
    raw = hugging_face("bytes")
    raw.add_special_tokens([AddedToken("<x>", rstrip=True, special=True), AddedToken("<x>y", special=True)])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "a<x>  b<x>yc<|end|>"
    cut = [(text[a:b], special) for a, b, special in tokenizer.split_special(text)]
    x, xy, end = (tokenizer.special_tokens[piece] for piece in ("<x>", "<x>y", "<|end|>"))
    assert cut == [("a", None), ("<x>  ", x), ("b", None), ("<x>y", xy), ("c", None), ("<|end|>", end)]
    assert tokenizer.split_special("") == []


# --- Llama 3's file of tiktoken, and bytes


@functools.cache
def lines_of_tiktoken():
    return tiktoken_file().splitlines()


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("ab <|>\n 09é湖🐟\u0301"), max_size=30))
def test_offsets_of_tiktoken_are_the_characters_of_each_tokens_bytes(text):
    owner, at = [i for i, character in enumerate(text) for _ in character.encode()], 0
    for token, start, end in zip(*tiny("tiktoken").encode_offsets([text])[0]):
        size = len(base64.b64decode(lines_of_tiktoken()[token].split()[0]))
        assert (start, end) == (owner[at], owner[at + size - 1] + 1)
        at += size
    assert at == len(owner)


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=30))
def test_a_token_a_byte_has_the_ids_of_byt5(text):
    assert tiny("one_byte").encode(text) == [byte + 3 for byte in text.encode()]
    assert tiny("one_byte").decode(tiny("one_byte").encode(text)) == text
    assert {*tiny("one_byte").special_tokens.values()} == {0, 1, 2, *range(259, 259 + len(CHAT))}


def test_a_token_a_byte_by_command(tmp_path):
    line = [sys.executable, "-m", "data_pipelines.train_tokenizer", "--bytes", "--output", tmp_path]
    subprocess.run([*line, "--special_tokens=" + ",".join(CHAT)], cwd=Path(__file__).parents[3], check=True)
    assert load_tokenizer(tmp_path).fingerprint == tiny("one_byte").fingerprint


@pytest.mark.parametrize("character", " \ta湖=")
def test_long_runs_are_cut_where_llama_3_cuts_them(character):
    tokenizer, run = tiny("tiktoken"), tiktoken_files.LONGEST_RUN
    cut, text = tokenizer.encode(character * run), character * (2 * run + 7)
    assert tokenizer.encode(text) == cut + cut + tokenizer.encode(character * 7)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_offsets([text])[0][2][-1] == len(text)


def test_long_texts_are_cut():
    encode, longest = tiny("tiktoken").encode, tiktoken_files.LONGEST_TEXT
    text = "ab cd " * (longest // 6) + "ab cd "
    assert encode(text) == encode(text[:longest]) + encode(text[longest:])
    assert encode(text) != encode(text[: longest - 1]) + encode(text[longest - 1 :])


def test_control_the_library_by_itself_does_not_end_a_long_run():
    with pytest.raises(BaseException, match="StackOverflow"):
        tiny("tiktoken")._encoding.encode_ordinary(" " * 1_200_000)


def test_special_tokens_of_tiktoken(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_file())
    monkeypatch.setattr("socket.socket", None)  # nothing is fetched
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, len(tokenizer.special_tokens), tokenizer.bos_id, tokenizer.eos_id) == (
        *(128_256, 256, 128_000, 128_001),
    )
    names = {"<|start_header_id|>": 128_006, "<|eot_id|>": 128_009, "<|reserved_special_token_250|>": 128_255}
    assert all(tokenizer.token_id(name) == i for name, i in names.items()) and tokenizer.pad_id is None
    pad = {"128004": {"content": "<|finetune_right_pad_id|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": pad}))
    assert load_tokenizer(tmp_path).pad_id == 128_004
    assert "<|reserved_special_token_2|>" not in load_tokenizer(tmp_path).special_tokens


TIKTOKEN_BROKEN = (  # how the file's lines are changed, part of the message
    (lambda lines: lines[:-1], "found a file of tiktoken with 127,999 tokens; expected the 128,000 of Llama 3"),
    (lambda lines: [*lines, b"YWFhYWFh 128000"], "128,001 tokens"),
    (lambda lines: [b"YWFhYWFh 0", *lines[1:]], "ranks or bytes missing"),
    (lambda lines: [*lines[:-2], lines[-1], lines[-2]], "ranks or bytes missing"),
    (lambda lines: [*lines[:9], b"!!! 9", *lines[10:]], "damaged tokenizer"),
    (lambda lines: [*lines[:9], b"YQ==", *lines[10:]], "damaged tokenizer"),
)


@pytest.mark.parametrize("change, part", TIKTOKEN_BROKEN)
def test_broken_files_of_tiktoken(tmp_path, change, part):
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(change(lines_of_tiktoken())))
    with pytest.raises(ValueError, match=part):
        load_tokenizer(tmp_path)


GOLDEN_FILES = {"sp_test_1000": "test_model.model", "chinese_llama_sp20000": "chinese_sp.model"}
GOLDEN = ("llama2_sp32000", "mistral_v1_sp32000", "mistral_v3_sp32768", "yuan2_sp", "sp_test_1000")


class TestRealFiles:
    pytestmark = real_data

    @pytest.mark.parametrize("name", [*GOLDEN, "chinese_llama_sp20000", "gpt2", "torchtitan_test", "llama3_tiktoken"])
    def test_golden_encodings(self, name):
        golden = json.loads((REAL / "tokenizers" / "golden_encodings.json").read_text())[name]
        tokenizer = load_tokenizer(REAL / "tokenizers" / name / GOLDEN_FILES.get(name, ""))
        added = 5 if name == "yuan2_sp" else 0  # by its released code, not in the file
        assert tokenizer.vocab_size == golden.get("vocab", golden.get("n_vocab_with_256_special")) + added
        for case in golden["cases"]:
            ids = tokenizer.encode(case["text"])
            assert ids == case["ids"]
            assert not case.get("lossless") or tokenizer.decode(ids) == case["text"]
            decoder = StreamDecoder(tokenizer)
            assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)

    def test_llama2c_encodes_stories_as_it_did(self):
        tokenizer = load_tokenizer(REAL / "weights" / "stories260K" / "tok512.bin")
        golden = json.loads((REAL / "weights" / "stories260K" / "golden.json").read_text())
        assert [tokenizer.bos_id, *tokenizer.encode("Once upon a time")] == golden["prompt_ids_example"]["ids"]
        assert tokenizer.decode(golden["greedy_ids_200"]) == golden["greedy_text"].strip()
        with gzip.open(REAL / "pretrain" / "tinystories" / "tinystories_sample_2MiB.txt.gz", "rt") as file:
            stories = [story.strip() for story in file.read().split("<|endoftext|>")[:300]]
        lengths = [len(ids) for ids in tokenizer.encode_batch(stories) if 1 + len(ids) <= 512]
        expected = golden["tinystories_2MiB_first300"]
        assert (len(lengths), sum(lengths)) == (expected["stories_used"], expected["tokens"])
