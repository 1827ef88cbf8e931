"""Chat templates with {% generation %}: Hugging Face's ids and mask to the token, and special tokens of users inert."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.templates.jinja_chat import ChatRenderer
from data_pipelines.templates.template import load_template
from data_pipelines.tokenizers.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "chat_masks"
TEMPLATES = ("chatml", "llama3", "zephyr", "koala")
ATTACKED = 5  # the conversation of the golden file whose user writes special tokens


@functools.cache
def tokenizer(kind="golden"):
    return load_tokenizer(GOLDEN) if kind == "golden" else tiny(kind)


def template(name, change=lambda source: source, kind="golden"):
    return load_template(change((GOLDEN / f"{name}.jinja").read_text("utf-8")), tokenizer(kind))


@functools.cache
def golden():
    return json.loads((GOLDEN / "chat_masks.json").read_text("utf-8"))


def conversation(messages):
    turns = [Turn(m["role"], m["content"], float(m["role"] == "assistant")) for m in messages]
    return Conversation("golden", "1", tuple(turns))


def cases(name):
    """(conversation, what Hugging Face made of it) of those without an attack."""
    return list(zip(map(conversation, golden()["conversations"]), golden()["templates"][name]))[:ATTACKED]


def agrees(example, expected):
    return example.ids.tolist() == expected["ids"] and (example.weights > 0).tolist() == [
        m == 1 for m in expected["mask"]
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_hugging_face(name):
    assert len(cases(name)) == ATTACKED
    for said, expected in cases(name):
        assert agrees(template(name).encode(said), expected) and 0 < sum(expected["mask"]) < len(expected["ids"])
        asked = dataclasses.replace(said, turns=said.turns[:-1])
        assert template(name).render_prompt(asked) == expected["prompt"]


WRONG = {  # template -> a change of its source after which something else is learned
    "chatml": ("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>"),
    "llama3": ("+ '<|eot_id|>' }}\n        {%- endgeneration %}", "}}{%- endgeneration %}{{ '<|eot_id|>' }}"),
    "zephyr": ("<|assistant|>\n{% generation %}\n", "{% generation %}\n<|assistant|>\n"),
    "koala": (" GPT:{% generation %} ", "{% generation %} GPT: "),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_a_mask_with_the_header_or_off_by_one_is_seen(name):
    old, new = WRONG[name]
    for said, expected in cases(name):
        example = template(name).encode(said)
        for shift in (-1, 1):
            assert not agrees(dataclasses.replace(example, weights=np.roll(example.weights, shift)), expected)
        wrong = template(name, lambda source: source.replace(old, new)).encode(said)
        assert wrong.ids.tolist() == example.ids.tolist() and not agrees(wrong, expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_hugging_face_itself_is_not_inert(name):
    """Why ids of a conversation with special tokens in it are not compared: there they become real."""
    said, theirs = golden()["conversations"][ATTACKED], golden()["templates"][name][ATTACKED]["ids"]
    ours = template(name).encode(conversation(said)).ids.tolist()
    real = lambda ids: sum(i in tokenizer().special_tokens.values() for i in ids)
    harmless = [{**said[0], "content": "Hi"}, *said[1:]]
    assert real(ours) == real(template(name).encode(conversation(harmless)).ids) < real(theirs)
    assert tokenizer().decode(ours, skip_special=False) == tokenizer().decode(theirs, skip_special=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_without_the_marks_ours_would_not_be_either(name, monkeypatch):
    said, theirs = golden()["conversations"][ATTACKED], golden()["templates"][name][ATTACKED]["ids"]
    monkeypatch.setattr(ChatRenderer, "_inert", lambda self, content: content)
    assert template(name).encode(conversation(said)).ids.tolist() == theirs


KINDS = ("golden", "tiktoken", "first", "control", "one_byte")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_special_tokens_of_a_user_are_inert(kind, name, data):
    """Each special id as often as without the user's, in the same order, and the same is learned."""
    special = sorted(tokenizer(kind).special_tokens)
    words = st.one_of(st.text("a <|>_\n湖", max_size=5), st.sampled_from(special).map(lambda piece: piece[:-1]))
    parts = data.draw(st.lists(st.tuples(words, st.sampled_from(special), words), min_size=2, max_size=2))
    encode = template(name, kind=kind).encode
    said = lambda *users: encode(
        conversation(
            [
                {"role": "system", "content": users[0]},
                {"role": "user", "content": users[0]},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": users[1]},
                {"role": "assistant", "content": "The moon."},
            ]
        )
    )
    ids = tokenizer(kind).special_tokens.values()
    order = lambda example: [i for i in example.ids.tolist() if i in ids]
    attacked, without, harmless = said(*map("".join, parts)), said(*(a + b for a, _, b in parts)), said("Hi", "Hi")
    assert order(attacked) == order(without) == order(harmless)
    learned = lambda example: example.ids[example.weights > 0].tolist()
    assert learned(attacked) == learned(without) == learned(harmless)
