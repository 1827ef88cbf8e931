"""EasyLM's `fields`: any row that can be kept gives the ids and the mask that EasyLM's TextProcessor gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny

from data_pipelines import sources
from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.sources import easylm
from data_pipelines.templates.template import load_template
from data_pipelines.templates.text_objective import is_document

WHERE = Where("folder/file.jsonl", 7)
KINDS = ("bytes", "first", "sentencepiece")
TEXTS = {"a": "the moon", "b": "is far", "c": "  away,\nhoney", "d": "湖🐟", "e": "<|eos|></s>", "empty": ""}


def convert(**row):
    (conversation,) = easylm.convert(row, WHERE)
    return conversation


def text_processor(fields, row, tokenizer):
    """What TextProcessor of young-geng/EasyLM does with its defaults (a bos of loss 0 first, an eos of loss 1 last)
    where the row brings neither itself. -> ids, weights."""
    parts = []
    for field in fields.split(","):
        inside = field[1:-1] if field.startswith("[") and field.endswith("]") else field
        if inside in ("<|bos|>", "<|eos|>"):
            ids = [tokenizer.bos_id if inside == "<|bos|>" else tokenizer.eos_id]
        else:
            ids = tokenizer.encode(" ".join(row[name] for name in inside.split("+")))
        parts += [(i, float(inside == field)) for i in ids]
    parts = (
        parts
        if parts[:1] in ([(tokenizer.bos_id, 0.0)], [(tokenizer.bos_id, 1.0)])
        else [(tokenizer.bos_id, 0.0), *parts]
    )
    parts = parts if parts[-1] == (tokenizer.eos_id, 1.0) else [*parts, (tokenizer.eos_id, 1.0)]
    return [i for i, _ in parts], [weight for _, weight in parts]


NAMES = st.lists(st.sampled_from(sorted(TEXTS)), min_size=1, max_size=3).map("+".join)
FIELD = st.one_of(NAMES, st.sampled_from(("<|eos|>", "<|bos|>")))
FIELDS = st.lists(st.one_of(FIELD, FIELD.map("[{}]".format)), min_size=1, max_size=6).map(",".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(fields=FIELDS)
def test_ids_and_weights_are_those_of_easylm(kind, fields):
    ids, weights = text_processor(fields, TEXTS, tiny(kind))
    try:
        conversation = convert(**TEXTS, fields=fields)
    except DataError as error:
        assert error.reason == "empty_text" and {*ids} <= {tiny(kind).bos_id, tiny(kind).eos_id}
        return
    assert Conversation.from_json(conversation.to_json()) == conversation
    for name in ("koala", "chat", "text"):  # a document looks the same in every template
        example = load_template(name, tiny(kind)).encode(conversation)
        assert example.ids.tolist() == ids and example.weights.tolist()[1:] == weights[1:]
    try:
        sources.check(conversation, WHERE, 1000)
    except DataError as error:  # "empty+empty" is a space
        assert error.reason == "empty_text" and any(not turn.text.strip() for turn in conversation.turns)


def test_control_parts_tokenised_together_would_differ():
    apart = load_template("text", tiny("sentencepiece")).encode(convert(**TEXTS, fields="[a],b"))
    together = load_template("text", tiny("sentencepiece")).encode(convert(**TEXTS, fields="a+b"))
    assert apart.ids.tolist() == text_processor("[a],b", TEXTS, tiny("sentencepiece"))[0]
    assert load_template("text", tiny("bytes")).encode(convert(**TEXTS, fields="[a],b")).ids.tolist() != (
        load_template("text", tiny("bytes")).encode(convert(**TEXTS, fields="a+b")).ids.tolist()
    )
    assert apart.weights.tolist() != together.weights.tolist()


KOALA = {"u": "USER:", "g": "GPT:", "bad": "An Unhelpful Answer:", "q": "ask", "a": "tell"}


def test_koalas_shape_is_told_by_the_markers_not_by_the_names():
    conversation = convert(**KOALA, fields="[u+q+g],a,<|eos|>,[u+q+bad],a,<|eos|>")
    question = Turn("user", "ask", 0.0)
    assert conversation.turns == (
        *(question, Turn("assistant", "tell", 1.0)),
        *(question, Turn("assistant", "tell", 1.0, helpful=False)),
    )
    assert conversation.id == "folder/file:7"


@pytest.mark.parametrize(
    "fields",
    [
        "[u+q+g],a",
        "[u+q+g],a,[<|eos|>]",
        "u+q+g,a,<|eos|>",
        "[u+q+g],[a],<|eos|>",
        "[u+q+g],a,<|eos|>,[u+q+g]",
        "[u+q+g],a+a,<|eos|>",
        "[q+u+g],a,<|eos|>",
        "[u+g],a,<|eos|>",
        "[u+q+g],a,<|bos|>",
    ],
)
def test_anything_else_is_a_document_of_parts(fields):
    conversation = convert(**KOALA, fields=fields)
    assert {turn.role for turn in conversation.turns} == {"text", "special"}
    ids, weights = text_processor(fields, KOALA, tiny("bytes"))
    example = load_template("koala", tiny("bytes")).encode(conversation)
    assert (example.ids.tolist(), example.weights.tolist()) == (ids, weights)


def test_a_text_that_is_learned_is_a_plain_document():
    for fields in ("a", "a,<|eos|>", "<|bos|>,a,<|eos|>", "a,empty"):
        assert convert(**TEXTS, fields=fields).turns == (Turn("text", "the moon", 1.0),)
    assert is_document(convert(**TEXTS, fields="a+b")) and not is_document(convert(**TEXTS, fields="[a],b"))


def test_a_prompt_of_parts_ends_before_eos():
    template = load_template("text", tiny("bytes"))
    example = template.encode(convert(**TEXTS, fields="[a],b"))
    assert template.render_prompt(convert(**TEXTS, fields="[a],b")) == example.ids.tolist()[:-1]


@pytest.mark.parametrize(
    "row, reason, part",
    [
        ({"a": "x"}, "wrong_keys", 'without "fields"'),
        ({"a": "x", "fields": ["a"]}, "wrong_type", '"fields" is a list of 1'),
        ({"a": "x", "fields": ""}, "empty_text", '"fields" is empty'),
        ({"a": "x", "fields": "a, b"}, "wrong_keys", "the text ' b', which the row lacks"),
        ({"a": "x", "fields": "[a+z],a"}, "wrong_keys", "the text 'z', which the row lacks"),
        ({"a": 3, "fields": "a"}, "wrong_type", "'a' is int 3"),
        ({"a": "x", "fields": "a,<|123|>"}, "raw_tokens", "the text '<|123|>'; expected texts, <|bos|> or <|eos|>"),
        ({"a": "x", "fields": "[{a}]"}, "raw_tokens", "the text '{a}'"),
        ({"a": "", "fields": "[a],<|eos|>"}, "empty_text", '"fields" without any text'),
    ],
)
def test_what_cannot_be_kept_is_refused(row, reason, part):
    with pytest.raises(DataError) as caught:
        convert(**row)
    assert caught.value.reason == reason and part in str(caught.value)


def test_documents_of_parts_in_rows_of_our_own():
    turns = [["text", "a", 0.0, True], ["special", "<|eos|>", 1.0, True], ["text", "b", 1.0, True]]
    (conversation,) = sources.load("jsonl").convert({"turns": turns}, WHERE)
    tokenizer = tiny("bytes")
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    ids = [tokenizer.bos_id, *a, tokenizer.eos_id, *b, tokenizer.eos_id]
    assert load_template("chat", tokenizer).encode(conversation).ids.tolist() == ids
    with pytest.raises(DataError, match="the special token the text '<s>'"):
        sources.load("jsonl").convert({"turns": [["special", "<s>", 0.0, True]]}, WHERE)
    broken = Conversation("s", "i", (Turn("text", "a", 1.0), Turn("special", "</s>", 1.0)))
    with pytest.raises(ValueError, match="s/i: found special '</s>' in a document"):
        load_template("text", tokenizer).encode(broken)
