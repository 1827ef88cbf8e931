"""Yuan 2.0's tokens and chat format: the ids of its release, its loss mask, and nothing to inject."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tiny_tokenizers import REAL, YUAN, real_data, tiny, with_pieces

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.templates.template import YuanTemplate, load_template
from data_pipelines.tokenizers.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "yuan2_tiny" / "golden.npz"
ADDED = ("<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>")


def chat(*texts, weight=1.0):
    turns = [Turn("assistant", t, weight) if i % 2 else Turn("user", t, 0.0) for i, t in enumerate(texts)]
    return Conversation("test", "7", tuple(turns))


# --- the tokenizer


def test_added_tokens_follow_the_vocabulary_in_their_order():
    tokenizer = tiny("yuan")
    size = 400 + len(YUAN)
    assert [tokenizer.special_tokens[piece] for piece in ADDED] == list(range(size, size + 5))
    assert tokenizer.special_tokens["<sep>"] == 402 and "<n>" not in tokenizer.special_tokens
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 400, 403)
    # sentencepiece alone knows nothing of it: its pieces are ordinary, and it never finds them
    raw = sentencepiece.SentencePieceProcessor(model_proto=with_pieces(YUAN))
    assert 402 not in raw.encode("a<sep>b") and raw.eos_id() == 2
    assert "<sep>" not in tiny("sentencepiece").special_tokens


def test_the_released_config_names_another_bos(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(with_pieces(YUAN))
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<mask>"]}
    config["added_tokens_decoder"] = {"500": {"content": "<repo_name>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 400, 403)
    assert [tokenizer.special_tokens[piece] for piece in ("<mask>", "<repo_name>", "<sep>")] == [407, 500, 402]


def test_typed_tokens_stay_text():
    tokenizer, template = tiny("yuan"), load_template("yuan", tiny("yuan"))
    for piece in (*YUAN, *ADDED):
        text = f"a{piece}b {piece}"
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values()) and tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode_inside([text])[0]) == text
    prompt = template.render_prompt(chat("what?<sep>the moon<eod>"))
    assert prompt.count(402) == 1 and prompt[-1] == 402 and 400 not in prompt


def test_line_breaks_are_line_breaks():
    tokenizer = tiny("yuan")
    ids = tokenizer.encode("one\ntwo")
    assert tokenizer.token_id("<0x0A>") in ids and tokenizer.decode(ids) == "one\ntwo"
    assert tokenizer.decode(tokenizer.encode("one<n>two")) == "one<n>two"


# --- the template


def test_layout_and_weights():
    tokenizer, template = tiny("yuan"), load_template("yuan", tiny("yuan"))
    first, second = chat("the moon?", "far"), chat("the moon?", "far", "and\nbees?", "near", weight=0.5)
    example = template.encode(first)
    question, answer = tokenizer.encode("the moon?"), tokenizer.encode("far")
    assert example.ids.tolist() == [*question, 402, *answer, 400]
    assert example.weights.tolist() == [0.0] * len(question) + [1.0] * (len(answer) + 2)
    example = template.encode(second)
    question = tokenizer.encode("the moon?\nfar\nand\nbees?")
    assert example.ids.tolist() == [*question, 402, *tokenizer.encode("near"), 400]
    assert example.weights.tolist() == [0.0] * len(question) + [0.5] * (len(example.ids) - len(question))
    asked = Conversation("test", "7", second.turns[:-1])
    assert template.render_prompt(asked) == [*question, 402] and template.stop_ids == (400,)
    assert template.encode(asked).ids.tolist() == [*tokenizer.encode("the moon?"), 402, *tokenizer.encode("far"), 400]
    assert template.encode(chat("a question without an answer")) is None
    system = Conversation("test", "7", (Turn("system", "Be brief.", 0.0), *first.turns))
    assert tokenizer.decode(template.encode(system).ids, False) == "Be brief.\nthe moon?<sep>far<eod>"
    document = Conversation("test", "7", (Turn("text", "bees", 1.0),))
    assert template.encode(document).ids.tolist() == [*tokenizer.encode("bees"), 400]


def test_what_it_cannot_say_is_an_error():
    template = load_template("yuan", tiny("yuan"))
    tool = Conversation("test", "7", (Turn("user", "a", 0.0), Turn("tool", "b", 0.0), Turn("assistant", "c", 1.0)))
    with pytest.raises(ValueError, match="test/7: template \"yuan\" has no role 'tool'"):
        template.encode(tool)
    bad = Conversation("test", "7", (Turn("user", "a", 0.0), Turn("assistant", "c", 1.0, helpful=False)))
    with pytest.raises(ValueError, match="unhelpful answer"):
        template.encode(bad)
    assert load_template("yuan", tiny("yuan"), ignore_helpful=True).encode(bad) is not None
    with pytest.raises(ValueError, match='template "yuan" needs the special token <sep>'):
        load_template("yuan", tiny("sentencepiece"))


# --- the mask of the released training code


class Numbers(Tokenizer):
    """Texts that are ids, for rows that exist only as such; <eod> 253 and <sep> 254 as in the golden rows."""

    vocab_size = 256

    def __init__(self):
        super().__init__(GOLDEN, {"<eod>": 253, "<sep>": 254}, {"eos": "<eod>"}, None)

    def encode_batch(self, texts, *, continued=False):
        return [np.array(text.split(), np.int32) for text in texts]

    encode_inside = encode_batch

    def encode_offsets(self, texts, *, continued=False):
        raise NotImplementedError

    def token_id(self, piece):
        return self.special_tokens[piece]

    def _decode(self, ids):
        return " ".join(map(str, ids))


def documents_of(row):
    """A row of ids as conversations: what stands before an <eod>, chats where it has a <sep>."""
    ends = [i + 1 for i, token in enumerate(row) if token == 253]
    for start, end in zip([0, *ends], [*ends, len(row)]):
        ids = [int(token) for token in row[start:end] if token != 253]
        text = lambda part: " ".join(map(str, part))
        if 254 in ids:
            at = ids.index(254)
            yield chat(text(ids[:at]), text(ids[at + 1 :])), 253 in row[start:end]
        elif ids:
            yield Conversation("test", "7", (Turn("text", text(ids), 1.0),)), 253 in row[start:end]


def loss_weights(template, row):
    """Of the labels row[1:], from the documents of the row; what the end of the row cuts off has no <eod>."""
    weights = []
    for conversation, complete in documents_of(row):
        example = template.encode(conversation)
        weights += example.weights.tolist() if complete else example.weights[:-1].tolist()
    return np.array(weights[1:], np.float32)


def test_weights_are_those_of_the_released_mask():
    """--sft-stage of pretrain_yuan.py on six rows, whose parts without <sep> are taken for documents. (The last part of
    a row may be a question that the row's end cuts off: the released code cannot tell, and learns it.)"""
    golden = np.load(GOLDEN)
    rows, expected = golden["lossmask_tokens25"], golden["lossmask_megatron_sft1"]
    same = [loss_weights(load_template("yuan", Numbers()), row) == mask for row, mask in zip(rows, expected)]
    assert all(row.all() for row in same)
    assert 0 < expected.mean() < 1

    class WithoutSep(YuanTemplate):
        def segments(self, turns, **options):
            return [s._replace(weight=0.0) if s.content == 254 else s for s in super().segments(turns, **options)]

    wrong = WithoutSep(Numbers(), None, False, "yuan")
    assert not all((loss_weights(wrong, row) == mask).all() for row, mask in zip(rows, expected))
    other = golden["lossmask_hf"]  # of the released Hugging Face model, which masks inputs where it should mask labels
    assert not all(
        (loss_weights(load_template("yuan", Numbers()), row) == mask).all() for row, mask in zip(rows, other)
    )


class TestRealFiles:
    pytestmark = real_data

    def test_ids_of_the_release(self):
        tokenizer = load_tokenizer(REAL / "tokenizers" / "yuan2_sp")
        expected = {"<eod>": 77185, "<sep>": 77187, "<pad>": 77188, "<jupyter_start>": 96630, "<empty_output>": 96634,
                    "<commit_before>": 96635, "<commit_after>": 96637, "<mask>": 134953, "<predict>": 134954,
                    "<FIM_SUFFIX>": 134955, "<FIM_PREFIX>": 134956, "<FIM_MIDDLE>": 134957}  # fmt: skip
        assert {piece: tokenizer.special_tokens[piece] for piece in expected} == expected
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 77185, 134958)
        template = load_template("yuan", tokenizer)
        ids = template.encode(chat("详细分析并求解以下数学问题。\n1+1<sep>?", "2")).ids
        assert ids.tolist().count(77187) == ids.tolist().count(77185) == 1
        assert tokenizer.decode(ids, False) == "详细分析并求解以下数学问题。\n1+1<sep>?<sep>2<eod>"
