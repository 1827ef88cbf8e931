"""Calls of tools: read from every shape, learned as answers are, handed to chat templates, inert, and never lost."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHAT, REAL, real_data, tiny

from data_pipelines import sources
from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.files.records import read_rows
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.tools import Tools
from data_pipelines.templates.jinja_chat import ChatTemplateError
from data_pipelines.templates.template import load_template
from data_pipelines.tool_calls import messages, tools_text

WHERE = Where("folder/file.jsonl", 7)
CALL, OTHER = {"name": "time", "arguments": {"zone": "é", "n": [1]}}, {"name": "date", "arguments": {}}
TOOL = {"name": "time", "description": "Tells the time.", "parameters": {"type": "object"}}
WRAPPED = [{"type": "function", "function": TOOL}]
# in the way of Qwen and Hermes
TOOLS = """{{ bos_token }}{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}
{% endfor %}<|end|>{% endif %}{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}
<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>{% endfor %}<|end|>
{%- endgeneration %}{% elif m.role == 'tool' %}[{{ m.name }}] {{ m.content }}<|end|>
{%- else %}{{ m.content }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def convert(row, kind="sharegpt"):
    (conversation,) = sources.load(kind).convert(row, WHERE)
    return conversation


def turns(conversation):
    return [(turn.role, turn.text, turn.weight) for turn in conversation.turns]


def openai(*calls):
    return [{"type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}} for call in calls]


GLAIVE = {
    "conversations": [
        {"from": "human", "value": "ask"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "tell"},
    ],
    "tools": json.dumps([TOOL]),
}
OPENAI = {
    "messages": [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": None, "tool_calls": openai(CALL)},
        {"role": "tool", "tool_call_id": "c9", "content": "noon"},
        {"role": "assistant", "content": "tell"},
    ],
    "tools": WRAPPED,
}
LEGACY = {
    "messages": [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "", "function_call": openai(CALL)[0]["function"]},
        {"role": "function", "name": "time", "content": "noon"},
        {"role": "assistant", "content": "tell"},
    ],
    "tools": [TOOL],
}


@pytest.mark.parametrize("row", [GLAIVE, OPENAI, LEGACY], ids=["glaive", "openai", "legacy"])
def test_all_shapes_become_the_same(row):
    call = json.dumps([CALL], ensure_ascii=False)
    expected = [("user", "ask", 0.0), ("call", call, 1.0), ("tool", "noon", 0.0), ("assistant", "tell", 1.0)]
    conversation = convert(row)
    assert turns(conversation) == expected
    assert json.loads(conversation.tools) == WRAPPED
    assert Conversation.from_json(conversation.to_json()) == conversation
    sources.check(conversation, WHERE, 1000)
    assert convert(json.loads(conversation.to_json()), "jsonl").turns == conversation.turns


def test_records_without_tools_are_what_they_were():
    row = {**GLAIVE, "tools": "[]"}
    assert convert(row).tools == convert({**GLAIVE, "tools": None}).tools == ""
    assert list(convert(row).to_dict()) == ["source", "id", "turns"]
    assert list(convert(GLAIVE).to_dict()) == ["source", "id", "turns", "tools"]


def test_words_before_a_call_and_flags():
    message = {"role": "assistant", "content": "wait", "tool_calls": openai(CALL, OTHER), "train": False}
    row = {**OPENAI, "messages": [OPENAI["messages"][0], message, *OPENAI["messages"][2:]]}
    assert [(role, weight) for role, _, weight in turns(convert(row))][1:3] == [("assistant", 0.0), ("call", 0.0)]
    assert json.loads(convert(row).turns[2].text) == [CALL, OTHER]
    last = {**GLAIVE, "conversations": GLAIVE["conversations"][:2]}
    assert [turn.role for turn in convert(last).turns] == ["user", "call"]  # a call may be what is learned last


def test_answers_stand_in_the_order_of_the_calls_they_name():
    calls = [{"id": name, **call} for name, call in zip("ab", openai(CALL, OTHER))]
    answers = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in "ba"]
    told = {"role": "assistant", "content": "tell"}
    row = {"messages": [OPENAI["messages"][0], {"role": "assistant", "tool_calls": calls}, *answers, told]}
    assert [turn.text for turn in convert(row).turns[2:4]] == ["of a", "of b"]
    said, _ = messages(convert(row).turns)
    assert [(m["name"], m["tool_call_id"], m["content"]) for m in said[2:4]] == [
        ("time", "a", "of a"),
        ("date", "b", "of b"),
    ]
    answers[0]["tool_call_id"] = "z"
    with pytest.raises(DataError, match="row 7, turn 3: found an answer to the call the text 'z'") as caught:
        convert(row)
    assert caught.value.reason == "wrong_call"


def changed(row, place, **values):
    key = "messages" if "messages" in row else "conversations"
    return {**row, key: [{**item, **(values if i == place else {})} for i, item in enumerate(row[key])]}


BROKEN = [  # row, reason, turn, part of the message
    (changed(GLAIVE, 1, value="time()"), "wrong_call", 2, "expected JSON text of"),
    (changed(GLAIVE, 1, value='{"name": "time"}'), "wrong_call", 2, '"arguments" is null'),
    (changed(GLAIVE, 1, value='{"name": " ", "arguments": {}}'), "wrong_call", 2, "the call an object"),
    (changed(GLAIVE, 1, value='{"name": "f", "arguments": "[1]"}'), "wrong_call", 2, '"arguments" is a list of 1'),
    (changed(GLAIVE, 1, value='{"name": "f", "arguments": "{"}'), "wrong_call", 2, "JSON text of"),
    (changed(GLAIVE, 1, value='{"name": "f", "arguments": {"x": NaN}}'), "wrong_call", 2, "JSON does not have"),
    (changed(GLAIVE, 1, value="[]"), "wrong_call", 2, "an empty list of calls"),
    (changed(GLAIVE, 1, value="[" * 99_999), "wrong_call", 2, "expected JSON text of"),
    (changed(OPENAI, 0, tool_calls=openai(CALL)), "wrong_call", 1, "a call of the user"),
    (changed(OPENAI, 1, tool_calls=[{"type": "function"}]), "wrong_call", 2, "the call an object"),
    (changed(GLAIVE, 3, **{"from": "observation"}), "ends_with_tool", 4, "a last turn of the tool"),
    (changed(GLAIVE, 2, **{"from": "gpt"}), "not_alternating", 3, "assistant after a turn of the call"),
    (changed(GLAIVE, 1, **{"from": "tool"}), "not_alternating", 2, "tool after a turn of the user"),
    (changed(GLAIVE, 2, weight=1), "wrong_weight", 3, "of a turn of the tool"),
    ({**GLAIVE, "tools": "time"}, "wrong_tools", None, '"tools" is the text'),
    ({**GLAIVE, "tools": "{}"}, "wrong_tools", None, '"tools" is an empty object'),
    ({**GLAIVE, "tools": [{"type": "function"}]}, "wrong_tools", None, "the tool an object"),
    ({**GLAIVE, "tools": [{"name": 3}]}, "wrong_tools", None, "the tool an object"),
]


@pytest.mark.parametrize("row, reason, turn, part", BROKEN)
def test_broken(row, reason, turn, part):
    with pytest.raises(DataError) as caught:
        sources.check(convert(row), WHERE, 1000)
    assert (caught.value.reason, caught.value.where.turn) == (reason, turn)
    assert part in str(caught.value)


# --- chat templates


def test_a_template_learns_the_call_and_reads_its_answer():
    template = load_template(TOOLS, tiny("bytes"))
    example = template.encode(convert(OPENAI))
    decode = lambda ids: template.tokenizer.decode(ids, skip_special=False)
    call = '<call>{"name": "time", "arguments": {"zone": "é", "n": [1]}}</call><|end|>'
    tools = json.dumps(WRAPPED[0])
    assert decode(example.ids) == (
        f"<bos><|system|>{tools}\n<|end|><|user|>ask<|end|><|assistant|>{call}"
        "<|user|>[time] noon<|end|><|assistant|>tell<|end|>"
    )
    assert decode(example.ids[example.weights > 0]) == f"{call}tell<|end|>"
    weighted = convert(changed(OPENAI, 1, weight=0.5))
    assert decode(template.encode(weighted).ids[template.encode(weighted).weights == 0.5]) == call
    asked = dataclasses.replace(convert(OPENAI), turns=convert(OPENAI).turns[:3])
    assert decode(template.render_prompt(asked)).endswith("[time] noon<|end|><|assistant|>")
    with pytest.raises(ValueError, match="a prompt cannot end with"):
        template.render_prompt(dataclasses.replace(asked, turns=asked.turns[:2]))


def test_words_and_a_call_are_one_message():
    words = Turn("assistant", "wait", 1.0)
    user, call, *rest = convert(OPENAI).turns
    said, weights = messages([user, words, call, *rest])
    assert [m["role"] for m in said] == ["user", "assistant", "tool", "assistant"] and weights == [1.0, 1.0]
    assert said[1]["content"] == "wait" and said[1]["tool_calls"] == [{"type": "function", "function": CALL}]
    with pytest.raises(ValueError, match=r"found a message of the weight 0 with a call of 1"):
        messages([user, words._replace(weight=0.0), call])


@pytest.mark.parametrize("text", ["time()", "[]", '{"name": "f"}', "3", "[3]", '[{"name": "f", "arguments": 3}]'])
def test_a_call_that_a_stage_broke_is_an_error(text):
    with pytest.raises(ChatTemplateError, match=r"s/i: found .* as a call"):
        load_template(TOOLS, tiny("bytes")).encode(Conversation("s", "i", (Turn("call", text, 1.0),)))


def test_templates_without_a_place_for_them_say_so():
    called = dataclasses.replace(convert(OPENAI), tools="")
    unused = dataclasses.replace(convert(OPENAI), turns=(Turn("user", "a", 0.0), Turn("assistant", "b", 1.0)))
    for name, kind in (("koala", "bytes"), ("yuan", "yuan"), ("chat", "bytes"), ("text", "bytes")):
        template = load_template(name, tiny(kind))
        with pytest.raises(ValueError, match=r"sharegpt/folder/file:7: .*(no role|does not write any|takes one turn)"):
            template.encode(called)
        with pytest.raises(ValueError, match="found a list of tools, for which this template has no place"):
            template.encode(unused)
    assert load_template(TOOLS, tiny("bytes")).takes_tools
    assert not load_template("{% set tools = 1 %}{{ tools }}", tiny("bytes")).takes_tools


PIECES = st.sampled_from([*CHAT, "<bos>", "<|end", "|end|>", "end|>", "é湖🐟", '"', "\ue000", " "])
HOSTILE = st.lists(PIECES, min_size=1, max_size=4).map("".join)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(HOSTILE, min_size=6, max_size=6))
@pytest.mark.parametrize("source", [TOOLS, TOOLS.replace("tojson", "tojson(ensure_ascii=True, indent=1)")])
def test_special_tokens_in_calls_and_tools_are_inert(source, texts):
    name, key, value, answer, described, parameter = texts
    call = {"name": f"n{name}", "arguments": {key: [value]}}
    tool = {"name": f"n{name}", "description": described, "parameters": {parameter: described}}
    said = (Turn("user", "a", 0.0), Turn("call", json.dumps([call]), 1.0), Turn("tool", answer, 0.0))
    attacked = Conversation("s", "i", (*said, Turn("assistant", "b", 1.0)), tools_text([tool], WHERE))
    template = load_template(source, tiny("bytes"))
    special = {*template.tokenizer.special_tokens.values()}
    order = lambda conversation: [i for i in template.encode(conversation).ids.tolist() if i in special]
    assert order(attacked) == order(convert(OPENAI))
    ascii_only = "ensure" in source
    text = template.tokenizer.decode(template.encode(attacked).ids, skip_special=False)
    dumped = json.dumps(call["arguments"], ensure_ascii=ascii_only, indent=1 if ascii_only else None)
    dumped = dumped.replace("\\ue000", "\ue000")  # characters that serve as marks are not escaped
    assert dumped in text and answer in text  # and all of it is still there, letter for letter


def test_a_token_cannot_be_completed_by_what_follows_a_templates_own_text():
    source = "{% for m in messages %}<{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}"
    example = load_template(source, tiny("bytes")).encode(Conversation("s", "i", (Turn("assistant", " |end|>x", 1.0),)))
    assert tiny("bytes").token_id("<|end|>") not in example.ids
    assert tiny("bytes").decode(example.ids, skip_special=False) == "<|end|>x"


# --- leaving them out


CALLED, UNUSED, PLAIN = (
    convert(GLAIVE),
    convert({"messages": [OPENAI["messages"][0], OPENAI["messages"][3]], "tools": WRAPPED}),
    convert({"messages": [OPENAI["messages"][0], OPENAI["messages"][3]]}),
)


@pytest.mark.parametrize(
    "options, kept, dropped",
    [
        ({}, [PLAIN], {"tool_call": 1, "unused_tools": 1}),
        ({"calls": "keep"}, [CALLED, PLAIN], {"unused_tools": 1}),
        ({"unused": "keep"}, [UNUSED, PLAIN], {"tool_call": 1}),
        ({"unused": "forget"}, [PLAIN, PLAIN], {"tool_call": 1}),
    ],
)
def test_stage(options, kept, dropped):
    ledger = Ledger()
    samples = [Sample(str(i), (conversation,)) for i, conversation in enumerate((CALLED, UNUSED, PLAIN))]
    assert [sample.conversations[0] for sample in Tools(options)(samples, ledger)] == kept
    assert ledger.dropped == dropped and ledger.entered == ledger.left + sum(dropped.values()) == 3
    assert ledger.changed == ({"forgot_tools": 1} if options.get("unused") == "forget" else {})


def test_stage_options():
    with pytest.raises(ValueError, match="calls: found 'forget'; expected one of keep, drop"):
        Tools({"calls": "forget"})


class TestRealFiles:
    pytestmark = real_data

    @pytest.mark.parametrize("language, calls", [("en", 211), ("zh", 216)])
    def test_glaive(self, language, calls):
        path = REAL / "koala" / "sharegpt" / f"glaive_toolcall_{language}_demo.json.gz"
        found = [
            conversation
            for where, row in read_rows(path)
            for conversation in sources.load("sharegpt").convert(row, where)
        ]
        assert len(found) == 300 and sum(t.role == "call" and t.weight == 1 for c in found for t in c.turns) == calls
        template = load_template(TOOLS, tiny("bytes"))
        for conversation, example in zip(found, template.encode_many(found)):
            learned = template.tokenizer.decode(example.ids[example.weights > 0])
            assert all(
                json.dumps(json.loads(turn.text)[0]["arguments"], ensure_ascii=False) in learned
                for turn in conversation.turns
                if turn.role == "call"
            )
            assert not any(
                turn.text in learned for turn in conversation.turns if turn.role == "tool" and turn.text[0] == "{"
            )
