"""Rows of every source's format, with the conversations that they should give, and the ways in which rows break.

A grammar is a strategy of (row, conversations), a conversation being (end of its id, turns as lists). A break is a
function from a good row to a bad one, and the reason that the bad one should be rejected for.
"""

import copy
import json

import numpy as np
from hypothesis import strategies as st

# No white space but single spaces, no controls; none of the characters that markers are made of.
WORD = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="<[▃:"), min_size=1, max_size=4
)
SAID = st.lists(WORD, min_size=1, max_size=3).map(" ".join)


def user(text):
    return ["user", text, 0.0, True]


def assistant(text, weight=1.0, helpful=True):
    return ["assistant", text, weight, helpful]


def pair(question, better, worse):
    return [(":chosen", [*question, assistant(better)]), (":rejected", [*question, assistant(worse, helpful=False)])]


@st.composite
def sharegpt(draw):
    who, said, names = draw(
        st.sampled_from([("from", "value", ("human", "gpt")), ("role", "content", ("user", "assistant"))])
    )
    turns, expected = [], []
    if draw(st.booleans()):
        expected = [["system", draw(SAID), 0.0, True]]
        turns = [{who: "system", said: expected[0][1]}]
    for question, answer in draw(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3)):
        expected += [user(question), assistant(answer)]
        turns += [{who: names[0], said: question}, {who: names[1], said: answer}]
    return {draw(st.sampled_from(["conversations", "messages", "items"])): turns}, [("", expected)]


@st.composite
def prompted(draw):
    """A prompt and its completion, each as text where it can be, or as messages."""
    *before, (question, answer) = draw(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=2))
    said = [{"role": ("user", "assistant")[i], "content": each[i]} for each in before for i in (0, 1)]
    prompt = [*said, {"role": "user", "content": question}]
    prompt = question if not before and draw(st.booleans()) else prompt
    completion = answer if draw(st.booleans()) else [{"role": "assistant", "content": answer}]
    turns = [turn for q, a in before for turn in (user(q), assistant(a, 0.0))]
    return {"prompt": prompt, "completion": completion}, [("", [*turns, user(question), assistant(answer)])]


@st.composite
def alpaca(draw):
    row = {"instruction": draw(SAID), "input": draw(st.one_of(st.just(""), SAID)), "output": draw(SAID)}
    earlier = draw(st.lists(st.tuples(SAID, SAID), max_size=1))
    if earlier:
        row["history"] = [list(each) for each in earlier]
    before = [turn for question, answer in earlier for turn in (user(question), assistant(answer))]
    question = f"{row['instruction']} {row['input']}" if row["input"] else row["instruction"]
    return row, [("", [*before, user(question), assistant(row["output"])])]


@st.composite
def hc3(draw):
    row = {"question": draw(SAID), "human_answers": draw(st.lists(SAID, max_size=2))}
    row["chatgpt_answers"] = draw(st.lists(SAID, min_size=1, max_size=2))
    return row, [
        (f":{author}:{i}", [user(row["question"]), assistant(answer)])
        for author in ("human", "chatgpt")
        for i, answer in enumerate(row[f"{author}_answers"], start=1)
    ]


@st.composite
def hc3_flat(draw):
    row = {"text": draw(SAID), "question": draw(SAID), "label": draw(st.sampled_from(["human", "ai", "chatgpt"]))}
    return row, [("", [user(row["question"]), assistant(row["text"])])]


@st.composite
def oig(draw):
    turns = draw(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
    text = "\n".join(f"<human>: {question}\n<bot>: {answer}" for question, answer in turns)
    return {"text": text}, [("", [turn for q, a in turns for turn in (user(q), assistant(a))])]


@st.composite
def hh_rlhf(draw):
    before = draw(st.lists(st.tuples(SAID, SAID), max_size=2))
    question, better, worse = draw(SAID), draw(SAID), draw(SAID)
    worse += "." if worse == better else ""
    text = "".join(f"\n\nHuman: {q}\n\nAssistant: {a}" for q, a in before) + f"\n\nHuman: {question}\n\nAssistant: "
    good, bad = ([t for q, a in before for t in (user(q), assistant(a, weight))] for weight in (1.0, 0.0))
    chosen = [*good, user(question), assistant(better)]
    rejected = [*bad, user(question), assistant(worse, helpful=False)]
    return {"chosen": text + better, "rejected": text + worse}, [(":chosen", chosen), (":rejected", rejected)]


@st.composite
def webgpt(draw):
    better, worse = draw(SAID), draw(SAID)
    worse += "." if worse == better else ""
    row = {"question": {"id": "q", "full_text": draw(SAID)}, "answer_0": better, "score_0": 0.5, "quotes_0": None}
    row |= {"answer_1": worse, "score_1": -0.5}
    return row, pair([user(row["question"]["full_text"])], better, worse)


@st.composite
def summarize(draw):
    post, better, worse = draw(SAID), draw(SAID), draw(SAID)
    worse += "." if worse == better else ""
    choice = draw(st.integers(0, 1))
    texts = [{"text": better}, {"text": worse}]
    row = {"info": {"id": "t", "post": post}, "summaries": texts[:: 1 - 2 * choice], "choice": choice}
    return row, pair([user(f"{SUMMARIZE} {post}")], better, worse)


SUMMARIZE = "Condense this into its main points:"  # the phrase that the id "t" picks


@st.composite
def own(draw):
    read = st.tuples(st.sampled_from(["user", "tool"]), SAID, st.just(0.0), st.booleans())
    learned = st.tuples(st.sampled_from(["assistant", "text"]), SAID, st.sampled_from([0, 0.5, 2.0]), st.booleans())
    turns = map(list, draw(st.lists(st.one_of(read, learned), max_size=3)))
    turns = [["system", draw(SAID), 0.0, True], *turns, assistant(draw(SAID))]
    return {"source": "x", "id": "y", "turns": turns}, [("", turns)]


@st.composite
def yuan(draw):
    question, answer = draw(SAID), draw(SAID)
    if draw(st.booleans()):
        return {"text": f"{question}<n>{answer}"}, [("", [["text", f"{question}\n{answer}", 1.0, True]])]
    return {"text": f"{question}<sep>{answer}"}, [("", [user(question), assistant(answer)])]


@st.composite
def text(draw):
    document = "\n".join(draw(st.lists(SAID, min_size=1, max_size=3)))
    return {"text": document}, [("", [["text", document, 1.0, True]])]


@st.composite
def oasst(draw):
    """A tree in which one path is the best; beside each of its messages stand worse ones, and one that was deleted."""
    texts = draw(st.lists(SAID, min_size=2, max_size=5))
    replies = []
    for depth, said in reversed([*enumerate(texts)]):
        speaker = ("prompter", "assistant")[depth % 2]
        message = {"text": said, "role": speaker, "lang": "en", "replies": replies}
        worse = {"text": draw(SAID), "role": speaker, "rank": draw(st.sampled_from([None, 1, 2])), "replies": []}
        deleted = {"text": draw(SAID), "role": speaker, "rank": -1, "deleted": True, "replies": []}
        others = draw(st.lists(st.sampled_from([worse, deleted]), max_size=2))
        replies = draw(st.permutations([{**message, "rank": 0}, *others]))
    row = {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": message}
    said = [(assistant if depth % 2 else user)(each) for depth, each in enumerate(texts)]
    return row, [("", said if len(said) % 2 == 0 else said[:-1])]


@st.composite
def pairs(draw):
    """Two answers in each of the shapes that they come in."""
    question, better, worse = draw(SAID), draw(SAID), draw(SAID)
    worse += "." if worse == better else ""
    before = draw(st.lists(st.tuples(SAID, SAID), max_size=1))
    shape = draw(st.sampled_from(["turns", "texts", "outputs", "fields", "prompt"]))
    chosen, rejected = ({"from": "gpt", "value": each} for each in (better, worse))
    if shape in ("turns", "texts"):
        earlier = [(("human", "gpt")[i], each[i]) for each in before for i in (0, 1)]
        turns = [{"from": who, "value": said} for who, said in [*earlier, ("human", question)]]
        row = {"conversations": turns, "chosen": chosen, "rejected": rejected}
        row |= {"chosen": better, "rejected": worse} if shape == "texts" else {}
    elif shape == "prompt":
        row, before = {"prompt": question, "chosen": better, "rejected": worse}, []
    else:
        row = {"instruction": question, "input": "", "history": [list(each) for each in before]}
        row |= {"output": [better, worse]} if shape == "outputs" else {"chosen": better, "rejected": worse}
    good, bad = ([t for q, a in before for t in (user(q), assistant(a, weight))] for weight in (1.0, 0.0))
    return row, [
        (":chosen", [*good, user(question), assistant(better)]),
        (":rejected", [*bad, user(question), assistant(worse, helpful=False)]),
    ]


@st.composite
def verdict(draw):
    row, ((_, turns),) = draw(sharegpt())
    if row.setdefault("label", draw(st.booleans())):
        return row, [(":chosen", turns)]
    read = [[role, said, 0.0, helpful] for role, said, _, helpful in turns[:-1]]
    return row, [(":rejected", [*read, assistant(turns[-1][1], helpful=False)])]


@st.composite
def easylm(draw):
    """A document of parts, each of one text or several, read or learned."""
    texts = {name: draw(SAID) for name in ("a", "b", "c d")}
    names = st.lists(st.sampled_from([*texts]), min_size=1, max_size=2)
    parts = draw(st.lists(st.tuples(names, st.sampled_from([0.0, 1.0])), min_size=1, max_size=3))
    spelled = ["+".join(names) if weight else f"[{'+'.join(names)}]" for names, weight in parts]
    spelled = ["[<|bos|>]"] * draw(st.booleans()) + spelled + ["<|eos|>"] * draw(st.booleans())
    turns = [["text", " ".join(texts[name] for name in names), weight, True] for names, weight in parts]
    if len(turns) > 1 or not turns[0][2]:
        turns.append(["special", "<|eos|>", 1.0, True])
    return {**texts, "fields": ",".join(spelled)}, [("", turns)]


@st.composite
def koala(draw):
    """EasyLM's rows as Koala has them."""
    row, fields, turns = {"u": "USER:", "good": "GPT:", "bad": "An Unhelpful Answer:"}, [], []
    for i, (question, answer) in enumerate(draw(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))):
        helpful = draw(st.booleans())
        row |= {f"q{i}": question, f"a{i}": answer}
        fields += [f"[u+q{i}+{'good' if helpful else 'bad'}]", f"a{i}", "<|eos|>"]
        turns += [user(question), assistant(answer, helpful=helpful)]
    return {**row, "fields": ",".join(fields)}, [("", turns)]


ARGUMENTS = st.dictionaries(WORD, st.one_of(SAID, st.integers(-9, 9), st.none(), st.booleans()), max_size=1)
CALL = st.tuples(WORD, ARGUMENTS).map(lambda call: {"name": call[0], "arguments": call[1]})


@st.composite
def tools(draw):
    """A chat in which one tool or two are called at once, in ShareGPT's way or in OpenAI's; the list of tools is the
    last turn of what is expected."""
    question, words, answer = draw(SAID), draw(st.one_of(st.just(""), SAID)), draw(SAID)
    calls = draw(st.lists(CALL, min_size=1, max_size=2))
    came_back = draw(st.lists(SAID, min_size=len(calls), max_size=len(calls)))
    listed = [{"name": calls[0]["name"]}]
    if draw(st.booleans()):
        before = [("human", question), ("function_call", json.dumps(calls if len(calls) > 1 else calls[0]))]
        said = [*before, *(("observation", each) for each in came_back), ("gpt", answer)]
        row, words = {"conversations": [{"from": who, "value": each} for who, each in said]}, ""
        row["tools"] = json.dumps(listed)
    else:
        calls = [{"id": f"c{i}", **call} for i, call in enumerate(calls)]
        asked = [
            {"id": c["id"], "function": {"name": c["name"], "arguments": json.dumps(c["arguments"])}} for c in calls
        ]
        results = [{"role": "tool", "tool_call_id": f"c{i}", "content": each} for i, each in enumerate(came_back)]
        message = {"role": "assistant", "content": words or None, "tool_calls": asked}
        around = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        row = {"messages": [around[0], message, *draw(st.permutations(results)), around[1]]}
        row["tools"] = [{"type": "function", "function": each} for each in listed]
    turns = [user(question), *([assistant(words)] if words else [])]
    turns.append(["call", json.dumps(calls, ensure_ascii=False), 1.0, True])
    turns += [["tool", each, 0.0, True] for each in came_back]
    in_full = [{"type": "function", "function": each} for each in listed]
    return row, [("", [*turns, assistant(answer), ["tools", json.dumps(in_full, ensure_ascii=False)]])]


@st.composite
def tokens(draw, weights=(0, 1, 0.5, 2)):
    """Ids under any of their keys, with what is learned of them under any of its keys, or all of it."""
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=9))
    row = dict.fromkeys(draw(st.sets(st.sampled_from(["input_ids", "tokens", "inputs", "targets"]), min_size=1)), ids)
    if draw(st.booleans()):
        row["attention_mask"] = [1] * len(ids)
    name = draw(st.sampled_from(["", "labels", "loss_weights", "assistant_masks", "completion_mask", "loss_mask"]))
    every = st.lists(
        st.sampled_from(weights if name == "loss_weights" else (0, 1)), min_size=len(ids), max_size=len(ids)
    )
    learned = [1] * len(ids) if not name else draw(every.filter(lambda each: any(each[1:])))
    if name:
        row[name] = [i if w else -100 for i, w in zip(ids, learned)] if name == "labels" else learned
        if weights != FLOATS and "mask" in name and draw(st.booleans()):
            row[name] = [*map(bool, learned)]
    if weights != FLOATS and draw(st.booleans()):
        row |= {
            "position_ids": [*range(len(ids))],
            "segment_ids": [1] * len(ids),
            "completion_mask": row.get("completion_mask"),
        }
    turns = []
    for i, weight in zip(ids, learned):
        if turns and turns[-1][2] == weight:
            turns[-1][1] += f" {i}"
        else:
            turns.append(["ids", f"{i}", float(weight), True])
    return row, [("", turns)]


FLOATS = (0.0, 1.0, 0.5, float(np.float32(0.1)))  # what a list of floats of a tf.train.Example can hold

# name -> (kind of the source, grammar, what the files may be)
JSON = ("json", "json.gz", "jsonl", "jsonl.gz")
GRAMMARS = {
    "sharegpt": ("sharegpt", sharegpt(), JSON),
    "alpaca": ("alpaca", alpaca(), JSON),
    "hc3": ("hc3", hc3(), ("jsonl", "jsonl.gz")),
    "hc3_flat": ("hc3", hc3_flat(), ("csv", "csv.gz", "jsonl")),
    "oig": ("oig", oig(), ("jsonl", "jsonl.gz")),
    "hh_rlhf": ("hh_rlhf", hh_rlhf(), ("jsonl", "jsonl.gz")),
    "webgpt": ("webgpt", webgpt(), JSON),
    "summarize": ("summarize", summarize(), JSON),
    "own": ("jsonl", own(), JSON),
    "messages": ("jsonl", sharegpt(), JSON),
    "json_text": ("jsonl", text(), JSON),
    "prompted": ("jsonl", prompted(), JSON),
    "oasst": ("oasst", oasst(), ("jsonl", "jsonl.gz")),
    "pairs": ("preference", pairs(), JSON),
    "verdict": ("preference", verdict(), JSON),
    "easylm": ("easylm", easylm(), JSON),
    "koala": ("easylm", koala(), JSON),
    "tools": ("sharegpt", tools(), JSON),
    "tokens": ("tokens", tokens(), JSON),
    "examples": ("tokens", tokens(FLOATS), ("array_record",)),
    "yuan": ("yuan", yuan(), ("txt", "txt.gz")),
    "text": ("text", text(), ("txt", "txt.gz")),
}


# --- what breaks a row ---


def put(row, *path_and_value):
    """The row with a value in a place; a key "TURNS" is whichever of the three names is there."""
    *path, value = path_and_value
    row = copy.deepcopy(row)
    here = row
    for key in path[:-1]:
        here = here[turns_key(here) if key == "TURNS" else key]
    key = turns_key(here) if path[-1] == "TURNS" else path[-1]
    if value is ...:
        del here[key]
    else:
        here[key] = value
    return row


def turns_key(row):
    return next(key for key in ("conversations", "messages", "items") if key in row)


def put_said(row, *path_and_value):
    """As `put`, for a turn's speaker ("WHO") or words ("SAID"), whatever these are called."""
    *path, key, value = path_and_value
    turn = row[turns_key(row)][path[0]]
    names = ("from", "value") if "from" in turn else ("role", "content")
    return put(row, "TURNS", path[0], names[key == "SAID"], value)


NOT_TEXT = {
    "null": None,
    "a number": 7,
    "a boolean": True,
    "a list": ["x"],
    "an object": {"x": "y"},
    "not a number": float("nan"),
}
NOT_A_LIST = {"null": None, "a number": 7, "text": "x", "an object": {"0": "x"}}
NOT_A_NUMBER = {
    "null": None,
    "text": "1",
    "a boolean": True,
    "a list": [1],
    "not a number": float("nan"),
    "infinity": float("inf"),
    "huge": 10**400,
}
EMPTY = {"empty text": "", "blank text": " \n\t\u3000"}
TOO_LONG, HALF = "x" * 201, "half \ud83d pair"

HI = {"role": "user", "content": "Hi"}

BREAKS = {}  # name -> [(grammar, function, reason)]


def breaks(grammar, name, function, reason):
    BREAKS.setdefault(name, []).append((grammar, function, reason))


def break_text(grammar, *path, setter=put, missing="wrong_keys", empty="empty_text", long=True):
    """All that can stand in the place of a text that is needed."""
    place = lambda value: lambda row: setter(row, *path, value)
    breaks(grammar, "a key is missing", place(...), missing)
    for name, value in NOT_TEXT.items():
        breaks(grammar, f"{name} for a text", place(value), "wrong_type")
    for name, value in EMPTY.items():
        breaks(grammar, name, place(value), empty)
    if long:
        breaks(grammar, "a text that is too long", place(TOO_LONG), "turn_too_long")
        breaks(grammar, "half a surrogate pair", place(HALF), "half_surrogate")


def break_list(grammar, *path, empty, missing="wrong_keys"):
    place = lambda value: lambda row: put(row, *path, value)
    breaks(grammar, "a key is missing", place(...), missing)
    for name, value in NOT_A_LIST.items():
        breaks(grammar, f"{name} for a list", place(value), "wrong_type")
    if empty:
        breaks(grammar, "an empty list", place([]), empty)


for grammar in ("sharegpt", "messages", "verdict", "tools"):
    for key in ("reasoning_content", "reasoning", "thinking"):
        for value in ("hm", ["hm"], {"x": "y"}, True):
            place = lambda row, key=key, value=value: put(row, "TURNS", -1, key, value)
            breaks(grammar, "what was thought", place, "reasoning")
for grammar in ("sharegpt", "messages"):
    break_list(grammar, "TURNS", empty="no_exchange")
    for name, value, reason in (
        ("null for a turn", None, "wrong_type"),
        ("text for a turn", "Hi", "wrong_type"),
        ("a list for a turn", ["human", "Hi"], "wrong_type"),
        ("an empty object for a turn", {}, "wrong_keys"),
    ):
        breaks(grammar, name, lambda row, value=value: put(row, "TURNS", -1, value), reason)
    breaks(grammar, "a key is missing", lambda row: put_said(row, -1, "WHO", ...), "wrong_keys")
    breaks(grammar, "a key is missing", lambda row: put_said(row, -1, "SAID", ...), "wrong_keys")
    for name, value in {**NOT_TEXT, "an unknown speaker": "narrator", "an empty speaker": ""}.items():
        breaks(grammar, f"{name} for a speaker", lambda row, value=value: put_said(row, -1, "WHO", value), "wrong_role")
    for name, value, reason in (
        ("null for a text", None, "wrong_type"),
        ("a number for a text", 0, "wrong_type"),
        ("a boolean for a text", False, "wrong_type"),
        ("an object for a text", {"text": "x"}, "wrong_type"),
        ("an empty list of parts", [], "empty_text"),
        ("parts that are no text", [{"type": "image_url", "image_url": "x"}], "not_text"),
        ("parts that are no objects", ["x"], "not_text"),
        ("a part without text", [{"type": "text"}], "wrong_type"),
        ("empty text", "", "empty_text"),
        ("blank text", "\u2003 \n", "empty_text"),
        ("a text that is too long", TOO_LONG, "turn_too_long"),
        ("half a surrogate pair", HALF, "half_surrogate"),
    ):
        breaks(grammar, name, lambda row, value=value: put_said(row, -1, "SAID", value), reason)
    breaks(grammar, "swapped roles", lambda row: put(row, "TURNS", row[turns_key(row)][-2:][::-1]), "no_exchange")
    breaks(
        grammar,
        "the same speaker twice",
        lambda row: put(row, "TURNS", [*row[turns_key(row)], row[turns_key(row)][-1]]),
        "not_alternating",
    )
    breaks(grammar, "one speaker alone", lambda row: put(row, "TURNS", row[turns_key(row)][-1:]), "no_exchange")
    breaks(
        grammar,
        "a system turn at the end",
        lambda row: put(row, "TURNS", [*row[turns_key(row)], {"from": "system", "value": "x"}]),
        "not_alternating",
    )
    breaks(
        grammar,
        "two system prompts",
        lambda row: {**put(row, "TURNS", [{"from": "system", "value": "x"}, *row[turns_key(row)][-2:]]), "system": "y"},
        "two_systems",
    )
    for name, value in {
        "text": "no",
        "a negative number": -1,
        "not a number": float("nan"),
        "infinity": float("inf"),
        "a huge number": 10**400,
        "a list": [],
    }.items():
        reason = "wrong_weight" if value == -1 else "wrong_type"
        breaks(grammar, f"{name} for a weight", lambda row, value=value: put(row, "TURNS", -1, "weight", value), reason)
    breaks(
        grammar,
        "two weights in a turn",
        lambda row: put(put(row, "TURNS", -1, "weight", 1), "TURNS", -1, "train", True),
        "wrong_weight",
    )
    breaks(grammar, "text for a switch", lambda row: put(row, "TURNS", -1, "train", "yes"), "wrong_weight")
    breaks(
        grammar,
        "nothing to learn",
        lambda row: put(row, "TURNS", [{**each, "weight": 0} for each in row[turns_key(row)]]),
        "nothing_to_learn",
    )

for key in ("instruction", "output"):
    break_text("alpaca", key)
for name in ("a number", "a boolean", "a list", "an object"):
    breaks("alpaca", f"{name} for a text", lambda row, value=NOT_TEXT[name]: put(row, "input", value), "wrong_type")
for name, value in {"zero": 0, "false": False, "an empty list": []}.items():
    breaks("alpaca", f"{name} for a text", lambda row, value=value: put(row, "input", value), "wrong_type")
for name, value in {
    "text": "x",
    "a number": 0,
    "an object": {},
    "a list of texts": ["x"],
    "a list of triples": [["x", "y", "z"]],
    "pairs of numbers": [[1, 2]],
}.items():
    breaks("alpaca", f"{name} for earlier turns", lambda row, value=value: put(row, "history", value), "wrong_type")
breaks("alpaca", "an empty earlier turn", lambda row: put(row, "history", [["x", " "]]), "empty_text")

break_text("hc3", "question")
break_list("hc3", "human_answers", empty=None)
break_list("hc3", "chatgpt_answers", empty=None)
for name, value in NOT_TEXT.items():
    breaks("hc3", f"{name} for a text", lambda row, value=value: put(row, "human_answers", ["x", value]), "wrong_type")
breaks("hc3", "no answers", lambda row: {**row, "human_answers": [], "chatgpt_answers": []}, "no_answers")
breaks("hc3", "empty answers alone", lambda row: {**row, "human_answers": [""], "chatgpt_answers": [" "]}, "no_answers")
break_text("hc3_flat", "text")
break_text("hc3_flat", "question")
for name, value in {
    "null": None,
    "an unknown text": "dog",
    "a list": ["human"],
    "a number": 1,
    "empty text": "",
}.items():
    breaks("hc3_flat", f"{name} for a label", lambda row, value=value: put(row, "label", value), "wrong_label")

break_text("oig", "text", long=False)
for name, value, reason in (
    ("no markers", "Hi there", "no_marker"),
    ("text before the first marker", "Hi <human>: a\n<bot>: b", "no_marker"),
    ("the same speaker twice", "<human>: a\n<human>: b\n<bot>: c", "not_alternating"),
    ("the other speaker first", "<bot>: a\n<human>: b\n<bot>: c", "starts_with_assistant"),
    ("no answer at the end", "<human>: a\n<bot>: b\n<human>: c", "ends_with_user"),
    ("one speaker alone", "<human>: a", "no_exchange"),
    ("an empty turn", "<human>: \n<bot>: b", "empty_text"),
    ("a marker within a text", "<human>: say <bot>: to me\n<bot>: b", "not_alternating"),
    ("a text that is too long", f"<human>: {TOO_LONG}\n<bot>: b", "turn_too_long"),
    ("half a surrogate pair", f"<human>: {HALF}\n<bot>: b", "half_surrogate"),
):
    breaks("oig", name, lambda row, value=value: {"text": value}, reason)

START = "\n\nHuman: Hi\n\nAssistant:"
for key in ("chosen", "rejected"):
    break_text("hh_rlhf", key, long=False)
for name, better, worse, reason in (
    ("the same answer twice", f"{START} x", f"{START} x", "identical_pair"),
    ("the same answer but for spaces", f"{START} x", f"{START}  x \n", "identical_pair"),
    ("other turns before the answers", f"{START} x", f"\n\nHuman: Ho{START} y", "not_alternating"),
    ("another question", f"{START} x", "\n\nHuman: Ho\n\nAssistant: y", "different_prefix"),
    ("no markers", "Hi", f"{START} x", "no_marker"),
    ("text before the first marker", f"Hi{START} x", f"{START} x", "no_marker"),
    ("the other speaker first", "\n\nAssistant: x", f"{START} x", "no_exchange"),
    ("no answer at the end", f"{START} x\n\nHuman: y", f"{START} x", "ends_with_user"),
    ("a marker within a text", f"{START} x. Human: y", f"{START} x", "marker_in_turn"),
    ("a marker after spaces", f"{START} x {' ' * 5000} Human: y", f"{START} x", "marker_in_turn"),
    ("an empty turn", f"{START} ", f"{START} x", "empty_text"),
    ("a text that is too long", f"{START} {TOO_LONG}", f"{START} x", "turn_too_long"),
    ("half a surrogate pair", f"{START} {HALF}", f"{START} x", "half_surrogate"),
):
    breaks("hh_rlhf", name, lambda row, b=better, w=worse: {"chosen": b, "rejected": w}, reason)

break_text("webgpt", "question", "full_text")
break_text("webgpt", "answer_0")
for name, value in {"null": None, "a number": 7, "text": "x", "a list": [], "an empty object": {}}.items():
    breaks("webgpt", f"{name} for an object", lambda row, value=value: put(row, "question", value), "wrong_keys")
for name, value in NOT_A_NUMBER.items():
    breaks("webgpt", f"{name} for a number", lambda row, value=value: put(row, "score_1", value), "wrong_type")
breaks("webgpt", "a key is missing", lambda row: put(row, "score_0", ...), "wrong_keys")
breaks("webgpt", "a tie", lambda row: {**row, "score_0": 0, "score_1": -0.0}, "tie")
breaks("webgpt", "the same answer twice", lambda row: {**row, "answer_1": row["answer_0"]}, "identical_pair")
for name, value, reason in (
    ("text for an object", "x", "wrong_keys"),
    ("a key is missing", {"title": []}, "wrong_keys"),
    ("text for a list", {"title": "x", "extract": ["y"]}, "wrong_type"),
    ("lists of different lengths", {"title": ["x"], "extract": []}, "wrong_quotes"),
    ("null for a text", {"title": [None], "extract": ["x"]}, "wrong_type"),
    ("empty text", {"title": ["x"], "extract": [""]}, "empty_text"),
):
    breaks("webgpt", name, lambda row, value=value: put(row, "quotes_0", value), reason)

for key in ("info", "summaries", "choice"):
    breaks("summarize", "a key is missing", lambda row, key=key: put(row, key, ...), "wrong_keys")
for name, value in {"null": None, "a number": 7, "text": "x", "a list": []}.items():
    breaks("summarize", f"{name} for an object", lambda row, value=value: put(row, "info", value), "wrong_type")
break_text("summarize", "info", "post", missing="null_post", long=True)
BREAKS["null for a text"] = [each for each in BREAKS["null for a text"] if each[0] != "summarize"]
breaks("summarize", "null for the only text", lambda row: put(row, "info", "post", None), "null_post")
for name, value in NOT_A_LIST.items():
    breaks("summarize", f"{name} for a list", lambda row, value=value: put(row, "summaries", value), "wrong_type")
for name, value, reason in (
    ("an empty list", [], "wrong_summaries"),
    ("one of two", [{"text": "x"}], "wrong_summaries"),
    ("three of two", [{"text": "x"}, {"text": "y"}, {"text": "z"}], "wrong_summaries"),
    ("texts for objects", ["x", "y"], "wrong_summaries"),
    ("a key is missing", [{"text": "x"}, {}], "wrong_summaries"),
    ("null for a text", [{"text": "x"}, {"text": None}], "wrong_type"),
    ("empty text", [{"text": "x"}, {"text": ""}], "empty_text"),
    ("the same answer twice", [{"text": "x"}, {"text": " x"}], "identical_pair"),
):
    breaks("summarize", name, lambda row, value=value: put(row, "summaries", value), reason)
for name, value in {
    "null": None,
    "text": "0",
    "a boolean": True,
    "a fraction": 0.0,
    "a number out of range": 2,
    "a negative number": -1,
    "a list": [0],
}.items():
    breaks("summarize", f"{name} for a choice", lambda row, value=value: put(row, "choice", value), "wrong_choice")

for key in ("prompt", "completion"):
    breaks("prompted", "a key is missing", lambda row, key=key: put(row, key, ...), "wrong_keys")
    for name, value, reason in (
        *((name, value, "wrong_type") for name, value in NOT_TEXT.items()),
        *((name, value, "empty_text") for name, value in EMPTY.items()),
        ("a text that is too long", TOO_LONG, "turn_too_long"),
        ("half a surrogate pair", HALF, "half_surrogate"),
        ("a list of null", [None], "wrong_type"),
        ("an empty object for a turn", [{}], "wrong_keys"),
        ("an unknown speaker for a speaker", [{"role": "boss", "content": "x"}], "wrong_role"),
    ):
        breaks("prompted", name, lambda row, key=key, value=value: put(row, key, value), reason)
breaks("prompted", "an empty list", lambda row: put(row, "prompt", []), "no_exchange")
breaks("prompted", "nothing at all", lambda row: {"prompt": [], "completion": []}, "no_exchange")
breaks("prompted", "the same speaker twice", lambda row: put(row, "completion", [HI]), "not_alternating")
breaks("prompted", "a weight for what is read", lambda row: put(row, "prompt", [{**HI, "weight": 1}]), "wrong_weight")
breaks("prompted", "two weights", lambda row: put(row, "prompt", [{**HI, "train": True, "weight": 1}]), "wrong_weight")
for name, value in {"a verdict": True, "a verdict against it": False}.items():
    breaks("prompted", name, lambda row, value=value: {**row, "label": value}, "verdict")

break_list("own", "turns", empty="no_exchange")
break_text("json_text", "text")
for name, value, reason in (
    ("null for a turn", None, "wrong_type"),
    ("text for a turn", "Hi", "wrong_type"),
    ("an object for a turn", {"role": "user"}, "wrong_type"),
    ("a turn with too little", ["user", "Hi", 1.0], "wrong_type"),
    ("a turn with too much", ["user", "Hi", 1.0, True, 5], "wrong_type"),
    ("an unknown speaker for a speaker", ["human", "Hi", 1.0, True], "wrong_role"),
    ("null for a speaker", [None, "Hi", 1.0, True], "wrong_role"),
    ("a list for a speaker", [["user"], "Hi", 1.0, True], "wrong_role"),
    ("null for a text", ["user", None, 1.0, True], "wrong_type"),
    ("empty text", ["user", "", 1.0, True], "empty_text"),
    ("a text that is too long", ["user", TOO_LONG, 1.0, True], "turn_too_long"),
    ("half a surrogate pair", ["user", HALF, 1.0, True], "half_surrogate"),
    ("a negative number for a weight", ["user", "Hi", -0.5, True], "wrong_weight"),
    ("a weight for what is read", ["user", "Hi", 1.0, True], "wrong_weight"),
    ("a number for a switch", ["user", "Hi", 1.0, 1], "wrong_type"),
    ("null for a switch", ["user", "Hi", 1.0, None], "wrong_type"),
    *((f"{name} for a weight", ["user", "Hi", value, True], "wrong_type") for name, value in NOT_A_NUMBER.items()),
):
    breaks("own", name, lambda row, value=value: put(row, "turns", 0, value), reason)
breaks("own", "nothing to learn", lambda row: put(row, "turns", [["text", "x", 0, True]]), "nothing_to_learn")
breaks("own", "the keys of no format", lambda row: {"txet": "x"}, "wrong_keys")
breaks("json_text", "the keys of no format", lambda row: {}, "wrong_keys")

for name, value, reason in (
    ("two separators", "a<sep>b[SEP]c", "several_sep"),
    ("an empty turn", "<n><sep>b", "empty_text"),
    ("nothing but an end", "<eod>", "empty_text"),
    ("a text that is too long", TOO_LONG, "turn_too_long"),
):
    breaks("yuan", name, lambda row, value=value: {"text": value}, reason)
breaks("text", "a text that is too long", lambda row: {"text": TOO_LONG}, "turn_too_long")

break_text("oasst", "prompt", "text", missing="wrong_type")
for key in ("message_tree_id", "prompt"):
    breaks("oasst", "a key is missing", lambda row, key=key: put(row, key, ...), "wrong_keys")
for name, value in {"null": None, "a number": 7, "text": "x", "a list": [], "an empty object": {}}.items():
    breaks("oasst", f"{name} for an object", lambda row, value=value: put(row, "prompt", value), "wrong_keys")
    breaks("oasst", f"{name} for a turn", lambda row, value=value: put(row, "prompt", "replies", [value]), "wrong_keys")
for name, value in {**NOT_TEXT, "an unknown speaker": "human", "an empty speaker": ""}.items():
    if not isinstance(value, list | dict):
        place = lambda row, value=value: put(row, "prompt", "role", value)
        breaks("oasst", f"{name} for a speaker", place, "wrong_keys")
for name, value in {"a number": 7, "text": "x", "an object": {"0": "x"}}.items():
    breaks("oasst", f"{name} for a list", lambda row, value=value: put(row, "prompt", "replies", value), "wrong_type")
for name, value in {"an empty list": [], "null for a list": None}.items():
    breaks("oasst", name, lambda row, value=value: put(row, "prompt", "replies", value), "no_exchange")
breaks("oasst", "the same speaker twice", lambda row: put(row, "prompt", "role", "assistant"), "not_alternating")
for name, value in {"another state": "growing", "null for a state": None, "a list for a state": []}.items():
    breaks("oasst", name, lambda row, value=value: put(row, "tree_state", value), "tree_state")

PAIR = {"prompt": "x", "chosen": "good", "rejected": "bad"}
TURNS = {"conversations": [{"from": "human", "value": "x"}], "chosen": "good", "rejected": "bad"}
for key in PAIR:
    for name, value in NOT_TEXT.items():
        breaks("pairs", f"{name} for a text", lambda row, key=key, value=value: {**PAIR, key: value}, "wrong_type")
    for name, value, reason in (
        *((name, value, "empty_text") for name, value in EMPTY.items()),
        ("a text that is too long", TOO_LONG, "turn_too_long"),
        ("half a surrogate pair", HALF, "half_surrogate"),
    ):
        breaks("pairs", name, lambda row, key=key, value=value: {**PAIR, key: value}, reason)
    breaks("pairs", "a key is missing", lambda row, key=key: put(PAIR, key, ...), "wrong_keys")
for name, value, reason in (
    ("null for a text", None, "wrong_type"),
    ("an empty object for a turn", {}, "wrong_keys"),
    ("the same speaker twice", {"from": "human", "value": "good"}, "not_alternating"),
    ("an unknown speaker for a speaker", {"from": "narrator", "value": "good"}, "wrong_role"),
    ("empty text", {"from": "gpt", "value": ""}, "empty_text"),
    ("a list for a text", ["good"], "wrong_type"),
):
    breaks("pairs", name, lambda row, value=value: {**TURNS, "chosen": value}, reason)
breaks("pairs", "the same answer twice", lambda row: {**PAIR, "rejected": "good"}, "identical_pair")
breaks("pairs", "one speaker alone", lambda row: {**TURNS, "conversations": []}, "no_exchange")
breaks("pairs", "null for a list", lambda row: {**TURNS, "conversations": None}, "wrong_type")
for name, value, reason in (
    ("null for a list", None, "wrong_type"),
    ("text for a list", "good", "wrong_type"),
    ("an empty list", [], "wrong_outputs"),
    ("one of two", ["good"], "wrong_outputs"),
    ("three of two", ["good", "bad", "worse"], "wrong_outputs"),
    ("the same answer twice", ["good", "good"], "identical_pair"),
    ("null for a text", ["good", None], "wrong_type"),
):
    breaks("pairs", name, lambda row, value=value: {"instruction": "x", "output": value}, reason)
for name, value in {"null": None, "text": "good", "a number": 1, "a list": [True], "an object": {}}.items():
    for grammar in ("pairs", "verdict"):
        breaks(grammar, f"{name} for a label", lambda row, value=value: {**row, "label": value}, "wrong_label")
breaks("verdict", "a key is missing", lambda row: {"label": row["label"]}, "wrong_keys")
breaks("verdict", "one speaker alone", lambda row: put(row, "TURNS", row[turns_key(row)][-1:]), "no_exchange")
breaks("verdict", "empty text", lambda row: put_said(row, -1, "SAID", ""), "empty_text")

for grammar in ("easylm", "koala"):
    break_text(grammar, "fields", long=False)
    for name, value, reason in (
        ("a field that is not there", "zzz", "wrong_keys"),
        ("a part of a field that is not there", "[zzz+fields]", "wrong_keys"),
        ("a comma too many", "fields,", "wrong_keys"),
        ("ids for a field", "<|123|>", "raw_tokens"),
        ("packed ids for a field", "fields,{ids}", "raw_tokens"),
        ("nothing but tokens", "<|bos|>,[<|eos|>]", "empty_text"),
    ):
        breaks(grammar, name, lambda row, value=value: put(row, "fields", value), reason)
    for name, value in NOT_TEXT.items():
        place = lambda row, value=value: {"x": value, "fields": "[fields],x"}
        breaks(grammar, f"{name} for a text", place, "wrong_type")
    for name, value, reason in (
        *((name, value, "empty_text") for name, value in EMPTY.items()),
        ("a text that is too long", TOO_LONG, "turn_too_long"),
        ("half a surrogate pair", HALF, "half_surrogate"),
    ):
        breaks(grammar, name, lambda row, value=value: {"x": value, "fields": "x"}, reason)


def calling(call, **others):
    """A chat with this call."""
    said = [("human", "x"), ("function_call", call), ("observation", "y"), ("gpt", "z")]
    return {"conversations": [{"from": who, "value": each} for who, each in said], **others}


GOOD_CALL = '{"name": "f", "arguments": {}}'
for name, value in {
    **NOT_TEXT,
    "empty text": "",
    "text that is no JSON": "f(x)",
    "JSON that is cut off": GOOD_CALL[:-1],
    "an empty list": "[]",
    "a list of numbers": "[7]",
    "no name": '{"arguments": {}}',
    "an empty name": '{"name": " ", "arguments": {}}',
    "a number for a name": '{"name": 7, "arguments": {}}',
    "no arguments": '{"name": "f"}',
    "null for arguments": '{"name": "f", "arguments": null}',
    "a list for arguments": '{"name": "f", "arguments": []}',
    "arguments that are no JSON": '{"name": "f", "arguments": "x=1"}',
    "arguments that are JSON of a list": '{"name": "f", "arguments": "[1]"}',
    "an argument that is no number": '{"name": "f", "arguments": {"x": NaN}}',
    "nested too deeply": '{"name": "f", "arguments": ' + '{"x":' * 9999 + "1" + "}" * 10000,
}.items():
    breaks("tools", f"{name}, for a call", lambda row, value=value: calling(value), "wrong_call")
for name, value in {
    "a number": 7,
    "a boolean": True,
    "text that is no JSON": "[f]",
    "an object": {"name": "f"},
    "a list of texts": ["f"],
    "a list of null": [None],
    "a tool without a name": [{"description": "x"}],
    "a tool with an empty name": [{"function": {"name": ""}}],
    "a tool with a number that JSON does not have": [{"name": "f", "parameters": {"x": float("inf")}}],
}.items():
    for grammar in ("tools", "sharegpt", "pairs"):
        breaks(grammar, f"{name}, for tools", lambda row, value=value: {**row, "tools": value}, "wrong_tools")
for name, value, reason in (
    ("a text that is too long", TOO_LONG, "turn_too_long"),
    ("half a surrogate pair", HALF, "half_surrogate"),
):
    breaks("tools", name, lambda row, value=value: {**row, "tools": [{"name": value}]}, reason)
    call = json.dumps({"name": value, "arguments": {}})
    breaks("tools", name, lambda row, call=call: calling(call), reason)
breaks("tools", "an answer without a call", lambda row: {"items": calling("")["conversations"][2:3]}, "no_exchange")
breaks(
    "tools",
    "an answer before its call",
    lambda row: {"items": [calling(GOOD_CALL)["conversations"][i] for i in (0, 2, 1, 3)]},
    "not_alternating",
)
breaks(
    "tools",
    "two calls",
    lambda row: {"items": [calling(GOOD_CALL)["conversations"][i] for i in (0, 1, 1, 2)]},
    ("not_alternating"),
)
breaks(
    "tools",
    "a call of the user",
    lambda row: {
        "messages": [{"role": "user", "tool_calls": [json.loads(GOOD_CALL)]}, {"role": "tool", "content": "x"}]
    },
    "wrong_call",
)
breaks(
    "tools",
    "an answer to another call",
    lambda row: {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [{"id": "c1", **json.loads(GOOD_CALL)}]},
            {"role": "tool", "tool_call_id": "c2", "content": "y"},
        ]
    },
    "wrong_call",
)
breaks(
    "tools",
    "a weight for what is read",
    lambda row: put(calling(GOOD_CALL), "TURNS", 2, "weight", 1),
    "wrong_weight",
)

SOME = {"input_ids": [5, 6, 7]}
for grammar in ("tokens", "examples"):  # rows that a tf.train.Example can hold
    for name, value, reason in (
        ("the keys of no format", {"x": [1]}, "wrong_keys"),
        ("nothing at all", {}, "wrong_keys"),
        ("an empty list", {"tokens": []}, "empty_ids"),
        ("texts for ids", {"input_ids": ["5", "6"]}, "wrong_type"),
        ("fractions for ids", {"targets": [5.0, 6.0]}, "wrong_type"),
        ("a negative id", {"input_ids": [5, -1]}, "wrong_ids"),
        ("an id that int32 cannot hold", {"inputs": [5, 2**31]}, "wrong_ids"),
        ("different ids", {"inputs": [5, 6], "targets": [6, 7]}, "ambiguous_ids"),
        ("too few labels", {**SOME, "labels": [5, 6]}, "wrong_length"),
        ("too many weights", {**SOME, "loss_weights": [1.0] * 4}, "wrong_length"),
        ("an empty list of weights", {**SOME, "loss_mask": []}, "wrong_length"),
        ("labels that are shifted", {**SOME, "labels": [6, 7, -100]}, "wrong_labels"),
        ("another label for what is not learned", {**SOME, "labels": [-1, 6, 7]}, "wrong_labels"),
        ("fractions for labels", {**SOME, "labels": [5.0, 6.0, 7.0]}, "wrong_type"),
        ("a text for a weight", {**SOME, "assistant_masks": ["1", "1", "1"]}, "wrong_type"),
        ("not a number for a weight", {**SOME, "loss_weights": [1.0, float("nan"), 1.0]}, "wrong_type"),
        ("infinity for a weight", {**SOME, "loss_weights": [1.0, float("inf"), 1.0]}, "wrong_type"),
        ("a negative number for a weight", {**SOME, "loss_weights": [0.0, 1.0, -0.5]}, "wrong_weight"),
        ("padding", {**SOME, "attention_mask": [1, 1, 0]}, "padding"),
        ("padding", {"inputs": [5, 6, 0], "inputs_segmentation": [1, 1, 0]}, "padding"),
        ("padding", {**SOME, "segment_ids": [1, 2, 0]}, "padding"),
        ("several examples in a row", {"targets": [5, 6, 7], "targets_segmentation": [1, 1, 2]}, "packed"),
        ("several examples in a row", {**SOME, "inputs_position": [0, 1, 0]}, "packed"),
        ("several examples in a row", {**SOME, "position_ids": [0, 0, 1]}, "packed"),
        ("several examples in a row", {**SOME, "seq_lengths": [2, 1]}, "packed"),
        ("text for a list of positions", {**SOME, "position_ids": ["0"]}, "wrong_type"),
        ("too few weights", {**SOME, "assistant_masks": [1] * 3, "completion_mask": [1] * 2}, "wrong_length"),
        ("one id alone", {"input_ids": [5]}, "nothing_to_learn"),
        ("nothing to learn", {**SOME, "labels": [-100] * 3}, "nothing_to_learn"),
        ("nothing to learn but the first id", {**SOME, "loss_mask": [1, 0, 0]}, "nothing_to_learn"),
        ("too many ids", {"tokens": [5] * 201}, "turn_too_long"),
    ):
        breaks(grammar, name, lambda row, value=value: value, reason)
for key in ("input_ids", "labels", "loss_weights", "completion_mask", "attention_mask", "position_ids", "seq_lengths"):
    for name, value in NOT_A_LIST.items():
        if value is not None:
            breaks("tokens", f"{name} for a list", lambda row, key=key, value=value: {**SOME, key: value}, "wrong_type")
breaks("tokens", "null for a list", lambda row: {"input_ids": None}, "wrong_keys")
for key in ("assistant_masks", "completion_mask", "loss_mask", "attention_mask"):
    place = lambda row, key=key: {**SOME, key: [True, 1, True]}
    breaks("tokens", "a boolean among numbers", place, "wrong_type")
breaks("tokens", "booleans for weights", lambda row: {**SOME, "loss_weights": [True] * 3}, "wrong_type")
breaks("tokens", "booleans for padding", lambda row: {**SOME, "attention_mask": [True, True, False]}, "padding")
for name, value in NOT_A_NUMBER.items():
    reason = "wrong_ids" if name == "huge" else "wrong_type"
    breaks("tokens", f"{name} for an id", lambda row, value=value: {"input_ids": [5, value]}, reason)
    breaks(
        "tokens", f"{name} for a weight", lambda row, value=value: {**SOME, "loss_mask": [1, value, 1]}, "wrong_type"
    )
breaks("tokens", "a weight that float32 cannot hold", lambda row: {**SOME, "loss_mask": [1, 1e39, 1]}, "wrong_weight")

for name, value, reason in (
    ("a weight that float32 cannot hold", ["assistant", "Hi", 1e39, True], "wrong_weight"),
    ("ids beside other turns", ["ids", "5 6", 1.0, True], "mixed_ids"),
    ("text for ids", ["ids", "five six", 1.0, True], "wrong_ids"),
    ("ids with two spaces between", ["ids", "5  6", 1.0, True], "wrong_ids"),
    ("a negative id", ["ids", "-5 6", 1.0, True], "wrong_ids"),
    ("an id that int32 cannot hold", ["ids", "2147483648", 1.0, True], "wrong_ids"),
):
    breaks("own", name, lambda row, value=value: put(row, "turns", 0, value), reason)
