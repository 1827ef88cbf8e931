"""Every source turns rows of its format into the right turns and weights, and names what does not fit."""

import random

import pytest

from data_pipelines import sources
from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.errors import InputError
from data_pipelines.sources import Filtered
from data_pipelines.stages.source import own_options

WHERE = Where("folder/file.jsonl.gz", 7)
ID = "folder/file:7"


def convert(kind, row):
    return sources.load(kind).convert(row, WHERE)


def brief(conversation):
    """role letter, text, weight per turn; a bad answer is B."""
    letters = {"system": "S", "user": "U", "assistant": "A", "call": "C", "tool": "T", "text": "X", "special": "E"}
    return [(letters[t.role] if t.helpful else "B", t.text, t.weight) for t in conversation.turns]


def failure(kind, row):
    with pytest.raises(DataError) as caught:
        convert(kind, row)
    message = str(caught.value)
    assert message.startswith("folder/file.jsonl.gz, row 7")
    assert "found" in message and "expected" in message and "\n" not in message
    return caught.value


def chat(*turns):
    return {"conversations": [{"from": who, "value": said} for who, said in turns]}


Q, A = ("U", "ask", 0.0), ("A", "tell", 1.0)


@pytest.mark.parametrize("user", ["human", "user", "Human"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt", "bing", "bard"])
def test_sharegpt_speakers(user, assistant):
    (conversation,) = convert("sharegpt", chat((user, "ask"), (assistant, "tell")))
    assert (conversation.source, conversation.id, brief(conversation)) == ("sharegpt", ID, [Q, A])


@pytest.mark.parametrize("key", ["conversations", "messages", "items"])
def test_sharegpt_messages_and_parts(key):
    parts = [{"type": "text", "text": "as"}, {"type": "text", "value": "k"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "tell"}]
    (conversation,) = convert("sharegpt", {key: turns})
    assert brief(conversation) == [("U", "as\nk", 0.0), A]


def test_sharegpt_system():
    turns = [("human", "ask"), ("gpt", "tell")]
    for speaker in ("system", "developer"):
        assert brief(convert("sharegpt", chat((speaker, "be brief"), *turns))[0]) == [("S", "be brief", 0.0), Q, A]
    assert brief(convert("sharegpt", {**chat(*turns), "system": "be brief"})[0]) == [("S", "be brief", 0.0), Q, A]
    assert brief(convert("sharegpt", {**chat(*turns), "system": ""})[0]) == [Q, A]


@pytest.mark.parametrize(
    "key, given, weight", [("train", False, 0), ("train", True, 1), ("loss_weight", 0.5, 0.5), ("weight", 2, 2)]
)
def test_sharegpt_weight_of_a_turn(key, given, weight):
    row = chat(("human", "ask"), ("gpt", "tell"), ("human", "ask"), ("gpt", "tell"))
    row["conversations"][1][key] = given
    assert brief(convert("sharegpt", row)[0]) == [Q, ("A", "tell", weight), Q, A]


HU, AS = {"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}
SHAREGPT_BROKEN = [  # turns, reason, turn, part of the message
    ([HU, AS, AS], "not_alternating", 3, "assistant after a turn of the assistant"),
    ([HU, HU, AS], "not_alternating", 2, "user after a turn of the user"),
    ([HU, AS, {"from": "system", "value": "x"}], "not_alternating", 3, "system after"),
    ([AS, HU, AS], "starts_with_assistant", 1, "a first turn of the assistant"),
    ([HU, AS, HU], "ends_with_user", 3, "a last turn of the user"),
    ([HU], "no_exchange", None, "only turns of user"),
    ([], "no_exchange", None, "no turns"),
    ([{"from": "narrator", "value": "x"}, AS], "wrong_role", 1, "'narrator'"),
    ([{"from": 3, "value": "x"}, AS], "wrong_role", 1, "int 3"),
    ([HU, {"from": "gpt", "value": "  "}], "empty_text", 2, '"value" is empty'),
    ([HU, {"from": "gpt", "value": 5}], "wrong_type", 2, '"value" is int 5'),
    ([HU, {"from": "gpt"}], "wrong_keys", 2, 'an object with the keys "from"'),
    ([HU, "tell"], "wrong_type", 2, "'tell'"),
    ([HU, {"role": "assistant", "content": [{"type": "image_url"}]}], "not_text", 2, 'parts of the type "text"'),
    ([HU, {**AS, "train": "yes"}], "wrong_weight", 2, "true or false"),
    ([HU, {**AS, "train": True, "weight": 1}], "wrong_weight", 2, "train and weight"),
    ([HU, {**AS, "weight": float("nan")}], "wrong_type", 2, "finite number"),
    ([HU, {**AS, "weight": 10**400}], "wrong_type", 2, "finite number"),
    ("ask", "wrong_type", None, "'ask'"),
]


@pytest.mark.parametrize("turns, reason, turn, part", SHAREGPT_BROKEN)
def test_sharegpt_broken(turns, reason, turn, part):
    error = failure("sharegpt", {"conversations": turns})
    assert (error.reason, error.where.turn) == (reason, turn)
    assert part in str(error)


def test_sharegpt_repairs_cut_off_the_ends():
    repairs = sources.load("sharegpt").REPAIRS
    row = chat(("System", "s"), ("gpt", "hi"), ("human", "ask"), ("gpt", "tell"))
    assert failure("sharegpt", row).where.turn == 2
    assert brief(convert("sharegpt", repairs["starts_with_assistant"](row))[0]) == [("S", "s", 0.0), Q, A]
    row = chat(("human", "ask"), ("gpt", "tell"), ("human", "more?"))
    assert brief(convert("sharegpt", repairs["ends_with_user"](row))[0]) == [Q, A]


def test_hc3_one_conversation_an_answer():
    row = {"question": "ask", "human_answers": ["h1", "h2"], "chatgpt_answers": ["g"], "source": "x"}
    found = {conversation.id: brief(conversation) for conversation in convert("hc3", row)}
    assert found == {
        f"{ID}:human:1": [Q, ("A", "h1", 1.0)],
        f"{ID}:human:2": [Q, ("A", "h2", 1.0)],
        f"{ID}:chatgpt:1": [Q, ("A", "g", 1.0)],
    }


def test_hc3_csv_and_repair():
    (conversation,) = convert("hc3", {"text": "tell", "source": "x", "question": "ask", "label": "ai"})
    assert (conversation.id, brief(conversation)) == (ID, [Q, A])
    row = {"question": "ask", "human_answers": ["", "tell"], "chatgpt_answers": []}
    assert failure("hc3", row).reason == "empty_answer"
    repaired = sources.load("hc3").REPAIRS["empty_answer"](row)
    assert [brief(conversation) for conversation in convert("hc3", repaired)] == [[Q, A]]


@pytest.mark.parametrize(
    "text, turns",
    [
        ("<human>: ask\n<bot>: tell", [Q, A]),
        ("\n<human>:ask<bot>:tell\n<human>: ask\n<bot>: tell \n", [Q, A, Q, A]),
    ],
)
def test_oig(text, turns):
    assert brief(convert("oig", {"text": text, "metadata": {}})[0]) == turns


def test_alpaca():
    assert brief(convert("alpaca", {"instruction": "ask", "input": "", "output": "tell"})[0]) == [Q, A]
    row = {"instruction": "ask", "input": "this", "output": "tell", "history": [["ask", "tell"]]}
    assert brief(convert("alpaca", row)[0]) == [Q, A, ("U", "ask this", 0.0), A]


HH = {
    "chosen": "\n\nHuman: ask\n\nAssistant: tell\n\nHuman: my Human: x\n\nAssistant: good",
    "rejected": "\n\nHuman: ask\n\nAssistant: tell\n\nHuman: my Human: x\n\nAssistant: bad",
}


def test_hh_rlhf_only_the_last_answer_is_unhelpful():
    chosen, rejected = convert("hh_rlhf", HH)
    more = ("U", "my Human: x", 0.0)  # the bare word within a sentence is text
    assert (chosen.id, brief(chosen)) == (f"{ID}:chosen", [Q, A, more, ("A", "good", 1.0)])
    assert (rejected.id, brief(rejected)) == (f"{ID}:rejected", [Q, ("A", "tell", 0.0), more, ("B", "bad", 1.0)])


WEBGPT = {
    "question": {"id": "q1", "full_text": "ask"},
    "quotes_0": {"title": ["T1", "T2"], "extract": ["E1", "E2"]},
    "answer_0": "bad [1]",
    "score_0": -0.5,
    "quotes_1": {"title": [], "extract": []},
    "answer_1": "good",
    "score_1": 0.5,
}


def test_webgpt():
    module = sources.load("webgpt")
    chosen, rejected = convert("webgpt", WEBGPT)
    assert brief(chosen) == [Q, ("A", "good", 1.0)]
    (_, question, _), answer = brief(rejected)
    assert answer == ("B", "bad [1]", 1.0)
    phrase = question.removeprefix("ask ").removesuffix(" [1] title: T1 content: E1 [2] title: T2 content: E2")
    assert phrase in module.PHRASES
    assert convert("webgpt", WEBGPT)[1] == rejected
    others = [convert("webgpt", {**WEBGPT, "question": {"id": f"q{i}", "full_text": "ask"}}) for i in range(40)]
    used = {brief(pair[1])[0][1][4:].split(" [1]")[0] for pair in others}
    assert used == set(module.PHRASES)  # the id decides, so other ids get other phrases


def test_webgpt_ties_are_filtered_not_errors():
    with pytest.raises(Filtered) as caught:
        convert("webgpt", {**WEBGPT, "score_0": 0, "score_1": 0.0})
    assert caught.value.reason == "tie"


SUMMARIZE = {
    "info": {"id": "t3", "post": " a post\n", "article": None},
    "summaries": [{"text": " short"}, {"text": " wrong"}],
    "choice": 0,
}


@pytest.mark.parametrize("choice, good, bad", [(0, "short", "wrong"), (1, "wrong", "short")])
def test_summarize(choice, good, bad):
    chosen, rejected = convert("summarize", {**SUMMARIZE, "choice": choice})
    question = brief(chosen)[0][1]
    assert question.endswith(" a post") and question.removesuffix(" a post") in sources.load("summarize").PHRASES
    assert brief(chosen)[1:] == [("A", good, 1.0)]
    assert brief(rejected) == [("U", question, 0.0), ("B", bad, 1.0)]
    article = {**SUMMARIZE, "info": {"id": "t3", "post": None, "article": "news"}}
    assert brief(convert("summarize", article)[0])[0][1].endswith(" news")


def test_text_and_jsonl():
    assert brief(convert("text", {"text": "words"})[0]) == [("X", "words", 1.0)]
    assert brief(convert("jsonl", {"text": "words"})[0]) == [("X", "words", 1.0)]
    assert brief(convert("jsonl", chat(("human", "ask"), ("gpt", "tell")))[0]) == [Q, A]
    own = [["system", "s", 0.25, True], ["user", "ask", 0, True], ["assistant", "x", 1, False]]
    (conversation,) = convert("jsonl", {"source": "s", "id": "i", "turns": own})
    assert brief(conversation) == [("S", "s", 0.25), Q, ("B", "x", 1.0)]


ASKED, TOLD = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}


@pytest.mark.parametrize("prompt", ["ask", [ASKED]])
@pytest.mark.parametrize("completion", ["tell", [TOLD]])
def test_prompt_and_completion(prompt, completion):
    row = {"prompt": prompt, "completion": completion, "text": "no"}
    (conversation,) = convert("jsonl", row)
    assert (conversation.id, brief(conversation)) == (ID, [Q, A])
    assert brief(convert("jsonl", {**row, "system": "s"})[0]) == [("S", "s", 0.0), Q, A]


def test_what_is_learned_of_a_prompt():
    row = {"prompt": [ASKED, TOLD, ASKED], "completion": [TOLD, ASKED, TOLD]}
    read = ("A", "tell", 0.0)
    assert brief(convert("jsonl", row)[0]) == [Q, read, Q, A, Q, A]
    row = {"prompt": [ASKED, {**TOLD, "train": True}, ASKED], "completion": [{**TOLD, "weight": 0.5}]}
    assert brief(convert("jsonl", row)[0]) == [Q, A, Q, ("A", "tell", 0.5)]
    row["prompt"][1] = {**TOLD, "train": None}
    assert brief(convert("jsonl", row)[0]) == [Q, read, Q, ("A", "tell", 0.5)]
    (conversation,) = convert("jsonl", {"prompt": [ASKED, TOLD], "completion": []})
    with pytest.raises(DataError, match="no turn with a weight above 0"):
        sources.check(conversation, WHERE, 10)


def test_repairs_of_prompt_and_completion():
    repairs = sources.load("jsonl").REPAIRS
    for row, reason in (
        ({"prompt": [TOLD, ASKED], "completion": "tell"}, "starts_with_assistant"),
        ({"prompt": "ask", "completion": [TOLD, ASKED]}, "ends_with_user"),
    ):
        assert failure("jsonl", row).reason == reason
        assert brief(convert("jsonl", repairs[reason](row))[0]) == [Q, A]


def test_verdicts_and_pairs_are_not_taken_for_completions():
    row = {"prompt": "ask", "completion": "tell", "label": False}
    assert failure("jsonl", row).reason == "verdict"
    assert brief(convert("jsonl", {**row, "label": 3})[0]) == [Q, A]  # not what TRL means by a label
    (worse,), (better,) = convert("preference", row), convert("preference", {**row, "label": True})
    assert (worse.id, brief(worse)) == (f"{ID}:rejected", [Q, ("B", "tell", 1.0)])
    assert (better.id, brief(better)) == (f"{ID}:chosen", [Q, A])
    pair = {"prompt": "ask", "chosen": "tell", "rejected": "no"}
    assert failure("jsonl", pair).reason == "wrong_keys" and len(convert("preference", pair)) == 2
    assert failure("preference", {"prompt": "ask", "completion": "tell"}).reason == "wrong_keys"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("kind", ["sharegpt", "jsonl"])
def test_thoughts_are_not_lost_in_silence(kind, key):
    module, row = sources.load(kind), {"messages": [ASKED, {**TOLD, key: "hm"}]}
    with pytest.raises(DataError, match=f'turn 2: found "{key}" beside what is said; expected turns without') as caught:
        module.convert(row, WHERE)
    assert caught.value.reason == "reasoning"
    assert brief(module.convert(row, WHERE, reasoning="drop")[0]) == [Q, A]
    for nothing in (None, "", " \n", [], False):
        assert brief(module.convert({"messages": [ASKED, {**TOLD, key: nothing}]}, WHERE)[0]) == [Q, A]
    assert own_options(module) == ["reasoning"]
    with pytest.raises(InputError, match="reasoning: found 'keep'; expected one of reject, drop"):
        module.convert(row, WHERE, reasoning="keep")
    row["messages"].insert(0, row["messages"][1])
    assert failure(kind, row).reason == "reasoning"
    repaired = module.REPAIRS["starts_with_assistant"](row)  # with the option
    assert brief(module.convert(repaired, WHERE, reasoning="drop")[0]) == [Q, A]


def test_thoughts_of_pairs_and_completions():
    for kind, row in (
        ("preference", {"messages": [ASKED], "chosen": {**TOLD, "thinking": "hm"}, "rejected": "no"}),
        ("jsonl", {"prompt": "ask", "completion": [{**TOLD, "thinking": "hm"}]}),
    ):
        assert failure(kind, row).reason == "reasoning"
    assert brief(sources.load("jsonl").convert(row, WHERE, reasoning="drop")[0]) == [Q, A]


def test_yuan():
    line = lambda text: brief(convert("yuan", {"text": text})[0])
    assert line("<n>ask<n>more[SEP]tell<eod>") == [("U", "ask\nmore", 0.0), A]
    assert line("ask<sep>tell▃") == [Q, A] and line("a<n>b") == [("X", "a\nb", 1.0)]


BROKEN = [  # kind, row, reason, turn, part of the message
    ("sharegpt", {"text": "x"}, "wrong_keys", None, 'keys "text"; expected {"conversations"'),
    (
        "sharegpt",
        {**chat(("system", "a"), ("human", "b"), ("gpt", "c")), "system": "d"},
        "two_systems",
        None,
        "one system",
    ),
    ("hc3", {"question": "ask"}, "wrong_keys", None, 'without "human_answers" and "chatgpt_answers"'),
    ("hc3", {"question": "ask", "human_answers": [], "chatgpt_answers": []}, "no_answers", None, "without answers"),
    ("hc3", {"question": "ask", "human_answers": "h", "chatgpt_answers": []}, "wrong_type", None, "as a list"),
    (
        "hc3",
        {"question": " ", "human_answers": ["h"], "chatgpt_answers": []},
        "empty_text",
        None,
        '"question" is empty',
    ),
    ("hc3", {"text": "t", "question": "q", "label": "robot"}, "wrong_label", None, "'robot'"),
    ("oig", {"text": "Background: x\n<human>: a\n<bot>: b"}, "no_marker", None, "Background"),
    ("oig", {"text": "no marker"}, "no_marker", None, "no marker"),
    ("oig", {"text": "<human>: a\n<bot>:"}, "empty_text", 2, "what the bot says is empty"),
    ("oig", {"text": "<human>: a\n<bot>: b\n<human>: c"}, "ends_with_user", 3, "whole pairs"),
    ("oig", {"text": None}, "wrong_type", None, '"text" is null'),
    ("alpaca", {"instruction": "ask", "input": ""}, "wrong_keys", None, 'without "output"'),
    ("alpaca", {"instruction": "ask", "output": ""}, "empty_text", None, '"output" is empty'),
    ("alpaca", {"instruction": "ask", "output": ["a", "b"]}, "wrong_type", None, "a list of 2"),
    ("alpaca", {"instruction": "ask", "output": "tell", "history": ["x"]}, "wrong_type", 1, "pairs"),
    ("hh_rlhf", {"chosen": HH["chosen"]}, "wrong_keys", None, 'without "rejected"'),
    ("hh_rlhf", {**HH, "rejected": HH["chosen"]}, "identical_pair", None, "the same text"),
    ("hh_rlhf", {**HH, "rejected": HH["rejected"].replace("ask", "other")}, "different_prefix", None, "4 and 4 turns"),
    ("hh_rlhf", {**HH, "rejected": HH["rejected"] + "\n\nAssistant: again"}, "not_alternating", 5, '"rejected"'),
    ("hh_rlhf", {**HH, "rejected": HH["rejected"] + "\n\nHuman: bye"}, "ends_with_user", 5, "last turn of the user"),
    ("hh_rlhf", {**HH, "chosen": HH["chosen"].replace("tell", "")}, "empty_text", 2, '"chosen" is empty'),
    ("hh_rlhf", {**HH, "chosen": HH["chosen"].replace("tell", "tell.  Human: ok")}, "marker_in_turn", 2, '"Human:"'),
    ("hh_rlhf", {**HH, "chosen": HH["chosen"].replace("tell", "Human: ok")}, "marker_in_turn", 2, '"Human:"'),
    ("hh_rlhf", {**HH, "chosen": "Hello"}, "no_marker", None, "'Hello'"),
    ("yuan", {"text": "ask<sep>tell<sep>more"}, "several_sep", None, "2 times <sep>"),
    ("yuan", {"text": "ask<sep><n>"}, "empty_text", None, "the answer is empty"),
    ("webgpt", {**WEBGPT, "question": "ask"}, "wrong_keys", None, "'ask'"),
    ("webgpt", {**WEBGPT, "score_0": "high"}, "wrong_type", None, '"score_0"'),
    (
        "webgpt",
        {**WEBGPT, "quotes_0": {"title": ["T"], "extract": []}},
        "wrong_quotes",
        None,
        "1 titles and 0 extracts",
    ),
    ("webgpt", {**WEBGPT, "quotes_0": ["T"]}, "wrong_keys", None, "a list of 1"),
    ("webgpt", {**WEBGPT, "answer_0": "good"}, "identical_pair", None, "the same text"),
    ("summarize", {**SUMMARIZE, "info": {"post": None, "article": None}}, "null_post", None, "neither a post"),
    ("summarize", {**SUMMARIZE, "choice": 2}, "wrong_choice", None, "int 2"),
    ("summarize", {**SUMMARIZE, "choice": 1.0}, "wrong_choice", None, "float 1.0"),
    ("summarize", {**SUMMARIZE, "summaries": [{"text": "x"}]}, "wrong_summaries", None, "a list of 1"),
    ("text", {"words": "x"}, "wrong_keys", None, 'without "text"'),
    ("jsonl", {"words": "x"}, "wrong_keys", None, '"turns"'),
    ("jsonl", {"turns": []}, "no_exchange", None, "no turns"),
    ("jsonl", {"turns": [["user", "x", 0.0]]}, "wrong_type", 1, "a list of 3"),
    ("jsonl", {"turns": [["boss", "x", 0.0, True]]}, "wrong_role", 1, "'boss'"),
    ("jsonl", {"turns": [["user", "x", 0.0, 1]]}, "wrong_type", 1, "helpful is int 1"),
]


@pytest.mark.parametrize("kind, row, reason, turn, part", BROKEN)
def test_broken_rows(kind, row, reason, turn, part):
    error = failure(kind, row)
    assert (error.reason, error.where.turn) == (reason, turn)
    assert part in str(error)


@pytest.mark.parametrize(
    "turn, reason, part",
    [
        (Turn("assistant", " \n", 1.0), "empty_text", "an empty turn"),
        (Turn("assistant", "x" * 11, 1.0), "turn_too_long", "11 characters; expected max_turn_chars=10"),
        (Turn("assistant", "ab\ud800", 1.0), "half_surrogate", "U+D800) at character 2"),
        (Turn("assistant", "x", -1.0), "wrong_weight", "-1.0"),
        (Turn("assistant", "x", float("inf")), "wrong_weight", "inf"),
        (Turn("assistant", "x", 3.5e38), "wrong_weight", "3.5e+38; expected 0 or more, as far as float32 goes"),
        (Turn("tool", "x", 0.5), "wrong_weight", "the weight 0.5 of a turn of the tool; expected 0"),
    ],
)
def test_check(turn, reason, part):
    question = Turn("user", "ask", 0.0)
    sources.check(Conversation("s", "i", (question, Turn("assistant", "x" * 10, 1.0))), WHERE, 10)
    with pytest.raises(DataError) as caught:
        sources.check(Conversation("s", "i", (question, turn)), WHERE, 10)
    assert (caught.value.reason, caught.value.where.turn) == (reason, 2)
    assert part in str(caught.value)


@pytest.mark.parametrize("tools, reason", [("x" * 11, "turn_too_long"), ("a\udcff", "half_surrogate")])
def test_check_of_tools(tools, reason):
    with pytest.raises(DataError) as caught:
        sources.check(Conversation("s", "i", (Turn("assistant", "x", 1.0),), tools), WHERE, 10)
    assert caught.value.reason == reason


def test_check_wants_something_to_learn():
    with pytest.raises(DataError, match="no turn with a weight above 0"):
        sources.check(Conversation("s", "i", (Turn("user", "ask", 0.0),)), WHERE, 10)


def test_registry():
    koala = {"sharegpt", "hc3", "oig", "alpaca", "hh_rlhf", "webgpt", "summarize"}
    assert koala | {"text", "jsonl"} <= set(sources.names())
    for kind in sources.names():
        module = sources.load(kind)
        assert module.__doc__
        assert hasattr(module, "generate") or (module.FORMAT and module.ORIGIN and module.PATTERNS)
    with pytest.raises(ValueError, match="did you mean 'alpaca'"):
        sources.load("alpacca")
    with pytest.raises(ValueError, match="cannot be imported"):
        sources.load("no_such.module")
    with pytest.raises(ValueError, match="without convert or generate"):
        sources.load("json.decoder")


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLS = {
    "messages": [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "wait", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "assistant", "content": "tell", "weight": 0.5},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
}
REPLY = {"text": "b", "role": "assistant", "lang": "en", "rank": 0, "replies": []}
OASST = {"message_tree_id": "t", "prompt": {"text": "a", "role": "prompter", "lang": "en", "replies": [REPLY, REPLY]}}
JUNK = (None, True, 3, -1.5, float("nan"), 10**400, "", " ", "x", [], [None], [[]], {}, {"text": None}, "\ud800")


def mutated(value, rng):
    """A copy with junk in one place or more."""
    if rng.random() < 0.15:
        return rng.choice(JUNK)
    if isinstance(value, dict):
        return {key: mutated(each, rng) for key, each in value.items() if rng.random() < 0.95}
    return [mutated(each, rng) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "kind, row",
    [
        ("sharegpt", {**chat(("gpt", "a"), ("human", "b"), ("gpt", "c"), ("human", "d")), "system": "s"}),
        ("sharegpt", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "weight": 0.5}] * 2}),
        ("hc3", {"question": "ask", "human_answers": ["", "a"], "chatgpt_answers": ["b"], "source": "x"}),
        ("hc3", {"text": "a", "question": "b", "label": "ai"}),
        ("oig", {"text": "<human>: a\n<bot>: b"}),
        ("alpaca", {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}),
        ("hh_rlhf", HH),
        ("webgpt", WEBGPT),
        ("summarize", SUMMARIZE),
        ("text", {"text": "a"}),
        ("yuan", {"text": "a<sep>b"}),
        ("jsonl", {"turns": [["user", "a", 0.0, True], ["assistant", "b", 1.0, False]]}),
        (
            "jsonl",
            {"turns": [["call", '{"name": "f", "arguments": {}}', 1.0, True], ["special", "<|eos|>", 1.0, True]]},
        ),
        ("sharegpt", CALLS),
        (
            "jsonl",
            {"prompt": [ASKED, TOLD, ASKED], "completion": [{**TOLD, "weight": 0.5, "thinking": ""}], "label": 1},
        ),
        ("jsonl", {"prompt": "ask", "completion": [TOLD, ASKED]}),
        ("preference", {"prompt": [TOLD, ASKED], "completion": "tell", "label": False}),
        ("easylm", {"a": "x", "b": "y", "fields": "[a+b],b,<|eos|>"}),
        ("preference", {"conversations": [HU], "chosen": AS, "rejected": {"from": "gpt", "value": "x"}}),
        ("preference", {"instruction": "a", "input": "", "output": ["b", "c"], "history": [["d", "e"]]}),
        ("preference", {"messages": [HU, AS], "label": True}),
        ("oasst", OASST),
    ],
)
def test_junk_gives_data_errors_and_nothing_else(kind, row):
    module = sources.load(kind)
    rng = random.Random(kind)
    outcomes = set()
    for _ in range(400):
        junk = mutated(row, rng)
        for _ in range(3):
            try:
                for conversation in module.convert(junk, WHERE) if isinstance(junk, dict) else ():
                    sources.check(conversation, WHERE, 1000)
                outcomes.add("fits")
                break
            except DataError as error:
                outcomes.add(error.reason)
                assert "\n" not in str(error)
                repair = getattr(module, "REPAIRS", {}).get(error.reason)
                if repair is None:
                    break
                junk = repair(junk)
    assert len(outcomes) > 2


def test_values_in_messages_are_short_and_inert():
    error = failure("alpaca", {"instruction": "ask", "output": {"\x1b[31m" * 99: 1}})
    assert "\x1b" not in str(error)
    assert len(str(error)) < 300
    error = failure("sharegpt", chat(("\x1b]0;x\x07\n" * 99, "ask"), ("gpt", "tell")))
    assert "\x1b" not in str(error)
    assert len(str(error)) < 400
