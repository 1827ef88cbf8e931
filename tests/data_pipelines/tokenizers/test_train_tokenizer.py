"""The trained tokenizer: lossless, deterministic, one token a letter and a digit, and clear about what it refuses."""

import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_pipelines.sources import exact, pydoc
from data_pipelines.tokenizers import training

ROOT = Path(__file__).parents[3]
TEXTS = [
    *(turn.text for _, c in exact.generate(train=200, heldout=0) for turn in c.turns),
    *(turn.text for c in pydoc.generate(kinds=("function", "code"), limit=300) for turn in c.turns),
]


def trained(folder: Path, vocab_size: int = 700, texts: list[str] = TEXTS) -> Tokenizer:
    training.train(iter(texts), vocab_size, training.CHAT_TOKENS, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.text(alphabet=" \n\t\r\u00a0\u2581a1<>|") | st.sampled_from(TEXTS))
@example("  two spaces,\n\n\tlines\r\n and an end \n")
@example("emoji 👩‍👩‍👧 \U0001f1e9\U0001f1ea, 漢字, e\u0301 and é, \u2581, \ufeff, \x00, \u202e")
@example("<0x41> and <|user|> and <pad>")
def test_lossless(tokenizer, text):
    for plain in (False, True):
        tokenizer.encode_special_tokens = plain
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    tokenizer.encode_special_tokens = False


def test_ids(tokenizer):
    special = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert [tokenizer.id_to_token(number) for number in range(7)] == special
    assert tokenizer.get_vocab_size() == 700


def test_special_tokens_can_be_plain_text(tokenizer):
    assert tokenizer.encode("<|user|>").ids == [4]
    tokenizer.encode_special_tokens = True
    assert 4 not in tokenizer.encode("<|user|>").ids
    tokenizer.encode_special_tokens = False


def test_a_token_a_letter(tokenizer):
    """Every letter that the reversal asks about is one token, and so is every letter of the answer."""
    for letter in string.ascii_lowercase:
        assert len(tokenizer.encode(f" {letter}").ids) == 1
    assert tokenizer.encode("f x q k").tokens == ["f", "Ġx", "Ġq", "Ġk"]


def test_a_token_a_digit(tokenizer):
    assert tokenizer.encode("12 + 3700m, 1990-01").tokens == [
        *("1", "2", "Ġ+", "Ġ", "3", "7", "0", "0", "m", ",", "Ġ", "1", "9", "9", "0", "-", "0", "1")
    ]
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and any(c.isdigit() for c in token)]


def test_deterministic(tmp_path):
    """Also in a process with another order of hashes."""
    trained(tmp_path / "here")
    (tmp_path / "input.txt").write_text("\n".join(TEXTS))
    for name in ("one", "two"):
        assert (
            command("--input", tmp_path / "input.txt", "--vocab_size=600", "--output", tmp_path / name).returncode == 0
        )
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert first == second
    assert trained(tmp_path / "again").to_str() == trained(tmp_path / "here").to_str()


def command(*args: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "data_pipelines.train_tokenizer", *map(str, args)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_command_takes_several_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name * 5} " * 20)
    done = command("--output", tmp_path / "out", "--special_tokens=<x>", "--input", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.token_to_id("<x>") == 3
    assert len(tokenizer.encode("bbbbb").ids) < 5


def test_command_errors_are_one_line(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for path, message in ((tmp_path / "absent", "No such file"), (tmp_path / "latin", "latin: found 'utf-8' codec")):
        done = command("--input", path, "--output", tmp_path / "out")
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_small_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="vocab_size: found 262; expected 263 or more: 7 special tokens, 256 bytes"):
        trained(tmp_path, vocab_size=262)
    assert trained(tmp_path, vocab_size=263).get_vocab_size() == 263


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text(tmp_path, texts):
    with pytest.raises(ValueError, match="texts: found none, or only empty ones"):
        trained(tmp_path, texts=texts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("special", [("<a>", "<a>"), ("<pad>",), ("",)])
def test_special_tokens_repeated_or_empty(tmp_path, special):
    with pytest.raises(ValueError, match=r"special_tokens: found .*; expected each once, and none empty"):
        training.train(["text"], 300, special, tmp_path)
