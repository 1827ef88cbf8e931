"""Items of benchmarks are found in what holds them, and in nothing else."""

import csv
import gzip
import io
import json
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.contamination.eval_items import read_benchmark
from data_pipelines.contamination.index import build_index, prepared_index
from data_pipelines.contamination.ngrams import Words
from data_pipelines.contamination.overlap import Index, loaded
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.decontaminate import Decontaminate

REAL = Path(__file__).parents[3].parent / "shared/data"

DRAW = random.Random(0)
SYLLABLES = ("ka", "lo", "mi", "ter", "sun", "vel", "bri", "ox", "and", "qui", "zan", "fe", "go", "stri")
WORDS = ["".join(DRAW.choices(SYLLABLES, k=DRAW.randint(1, 3))) for _ in range(500)]
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 600)]


def sentence(draw, words):
    return " ".join(draw.choices(WORDS, k=words)).capitalize() + "?"


def han(draw, characters):
    text = "".join(draw.choices(HAN, k=characters))
    return f"{text[:9]}，{text[9:]}。"


ITEMS = [sentence(DRAW, DRAW.randint(16, 60)) for _ in range(60)] + [han(DRAW, DRAW.randint(24, 90)) for _ in range(40)]
CLEAN = [sentence(DRAW, 150) for _ in range(150)] + [han(DRAW, 250) for _ in range(50)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps({"question": text}) for text in ITEMS))
    return tmp_path


def stage(folder, benchmarks=None, index=None, **options):
    path = folder / "index.npz"
    digest = build_index(benchmarks or {"made": {"files": "items.jsonl", "layout": "gsm8k"}}, folder, index).save(path)
    return Decontaminate({"index": str(path), "sha256": digest, **options})


def chat(*turns, name="x"):
    return Conversation("s", name, tuple(Turn(role, text, float(role != "user")) for role, text in turns))


def dropped(stage, *texts, role="text"):
    """How many conversations of one turn are dropped, with the ledger."""
    ledger = Ledger()
    samples = [Sample(str(i), (chat((role, text), name=str(i)),)) for i, text in enumerate(texts)]
    assert len(list(stage(samples, ledger))) == ledger.left == len(texts) - sum(ledger.dropped.values())
    return sum(ledger.dropped.values()), ledger


def verbatim(text, draw):
    return text


def shouted(text, draw):
    return text.upper()


def punctuated(text, draw):
    return re.sub(
        r"\s+|(?<=[一-鿿])(?=[一-鿿])", lambda _: draw.choice((", ", " — ", "\n\n", " ", "  *", "_", "\u3000")), text
    )


def joined_by_nothing_seen(text, draw):
    return "\u200b".join(text[i : i + 7] for i in range(0, len(text), 7))


def wide(text, draw):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def cut(text, draw):
    """Of an item the 13 words, or 21 characters, in its middle."""
    words = Words(text)
    length = 21 if words.alone.all() else 13
    first = (len(words) - length) // 2
    return words.quote(first, first + length - 1)


CHANGES = (verbatim, shouted, punctuated, joined_by_nothing_seen, wide, cut)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("length", [0, 150])
def test_planted_items_are_all_found_by_13_grams(folder, change, length):
    draw, found = random.Random(1), stage(folder, rules=("13-gram",))
    around = [(sentence(draw, length), sentence(draw, length)) if length else ("", "") for _ in ITEMS]
    count, ledger = dropped(found, *(f"{a} {change(text, draw)}. {b}" for text, (a, b) in zip(ITEMS, around)))
    assert count == len(ITEMS)
    assert ledger.dropped == {"contaminated/made": len(ITEMS)}
    items = [f"items:{i}" for i in range(1, len(ITEMS) + 1)]
    assert ledger.seen["contamination_items/made"] == dict.fromkeys(items, 1)
    assert [drop["found"].split(": ")[0] for drop in ledger.drops] == items


def test_clean_text_and_shorter_runs_are_not_found(folder):
    assert dropped(stage(folder), *CLEAN)[0] == 0
    halves = []
    for text in ITEMS:  # every run one short, and not enough characters in a row
        words = Words(text)
        length = 20 if words.alone.all() else 12
        pieces = [words.quote(i, min(i + length, len(words)) - 1) for i in range(0, len(words), length)]
        halves.append(" other ".join(pieces))
    assert dropped(stage(folder, rules=("13-gram",)), *halves)[0] == 0


def naive_runs(text, length):
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_the_rules_against_sets_of_tuples(folder):
    """Texts made of pieces of items, by each rule as it is written down, for words with spaces."""
    draw = random.Random(3)
    items = [text for text in ITEMS if text.isascii()]
    texts = []
    for _ in range(150):
        words = draw.choice(items).split()
        for _ in range(draw.randint(0, 3)):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        first = draw.randrange(len(words))
        texts.append(sentence(draw, 5) + " " + " ".join(words[first : first + draw.randint(5, 70)]))
    (folder / "items.jsonl").write_text("\n".join(json.dumps({"question": text}) for text in items))
    build = {"index": {"rules": ("13-gram", "8-gram", "50-char")}}

    def check(expected, **options):
        found = stage(folder, **build, **options)
        hits = [bool(dropped(found, text)[0]) for text in texts]
        wanted = [any(expected(item, text) for item in items) for text in texts]
        assert hits == wanted
        assert 20 < sum(wanted) < 130  # both answers occur

    check(lambda item, text: naive_runs(item, 13) & naive_runs(text, 13), rules=("13-gram",))
    share = lambda item, text: len(naive_runs(item, 8) & naive_runs(text, 8)) / len(naive_runs(item, 8))
    check(lambda item, text: share(item, text) >= 0.2, rules=("8-gram",), share=0.2)
    check(lambda item, text: share(item, text) >= 0.5, rules=("8-gram",), share=0.5)

    def covered(item, text):
        words, runs = re.findall(r"[a-z]+", item.lower()), naive_runs(text, 8)
        starts = [i for i in range(len(words) - 7) if tuple(words[i : i + 8]) in runs]
        return len({i + k for i in starts for k in range(8)}) / len(words)

    check(lambda item, text: covered(item, text) >= 0.5, rules=("8-gram",), share=0.5, measure="words")

    def characters(item, text):
        item, text = (re.sub(r"[^a-z]", "", each.lower()) for each in (item, text))
        places = {*range(0, len(item) - 49, 50), len(item) - 50}
        return any(item[place : place + 50] in text for place in places)

    check(characters, rules=("50-char",))


def test_short_items(folder):
    rows = [
        {"question": q}
        for q in ("Who are you?", "Why is the sky above us so very blue?", "Hi there", "天空为什么是蓝色的")
    ]
    (folder / "items.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {"question": "以下哪一项最能说明天空是蓝色的原因"}]))
    )
    found = stage(folder, index={"min_words": 3})
    table = [  # text, found within another, found as a turn
        ("who are you", 0, 1),
        ("Who are YOU ?!", 0, 1),
        ("who are you two", 0, 0),
        ("why is the sky above us so very blue", 1, 1),
        ("why is the sky above us so very grey", 0, 0),
        ("hi there", 0, 0),
        ("天空为什么是蓝色的？", 0, 1),
        ("以下哪一项，最能说明天空是蓝色的原因", 1, 1),
        ("以下哪一项最能说明天空是灰色的原因", 0, 0),
    ]
    assert [(text, dropped(found, f"zip\n{text} zip")[0], dropped(found, text)[0]) for text, _, _ in table] == table


def test_choices_count_where_the_question_is_short(folder):
    header = "question,A,B,C,D,answer\n"
    long = "Which of these four colours is said by all of the books to be that of the sky above us?"
    (folder / "q.csv").write_text(
        header + f"Which one is it,the red one,the blue one,the green one,no one at all,A\n{long},red,blue,x,y,B\n"
    )
    found = stage(folder, {"ceval": "q.csv"})
    assert (
        dropped(found, "Which one is it? (A) the red one (B) the blue one (C) the green one (D) no one at all")[0] == 1
    )
    assert dropped(found, "Which one is it? The red one, the blue one, the green one, no one at all.")[0] == 1
    assert dropped(found, "the red one; the blue one")[0] == 0
    assert dropped(found, f"so: {long[20:]} red blue")[0] == 1


def test_boilerplate_of_many_items_is_ignored(folder):
    opening = "Read the following passage with care and then answer the question that comes after it in one word"
    draw = random.Random(4)
    for count, found in ((20, 1), (21, 0)):
        rows = [{"question": f"{opening}: {sentence(draw, 20)}"} for _ in range(count)]
        (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
        made = stage(folder)
        assert dropped(made, f"{opening}: {sentence(draw, 20)}")[0] == found
        assert dropped(made, rows[0]["question"])[0] == 1
    passage = sentence(draw, 40)  # which is one text, however many items have it
    rows = [{"passage": passage, "question": sentence(draw, 20)} for _ in range(30)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ledger = dropped(stage(folder, {"agieval": "items.jsonl"}), passage)[1]
    assert len(ledger.seen["contamination_items/agieval"]) == 30


def test_several_benchmarks_turns_and_pairs(folder):
    both, only = ITEMS[0], ITEMS[1]
    (folder / "b.json").write_text(
        json.dumps([{"prompt": both}, {"prompt": "Write a very long poem about a small brown dog."}])
    )
    benchmarks = {
        "made": {"files": ["items.jsonl"], "layout": "gsm8k"},
        "other": {"files": "b.json", "question": ["{prompt}"]},
    }
    found = stage(folder, benchmarks)
    ledger = Ledger()
    with_both = chat(("user", "Hi!"), ("assistant", "Hello."), ("user", f"So: {both} {only}"), ("assistant", "Well."))
    good, bad = (
        chat(("user", "Hi!"), ("assistant", "Yes."), name="p:chosen"),
        chat(("user", "Hi!"), ("assistant", only), name="p:rejected"),
    )
    assert list(found([Sample("a", (with_both,)), Sample("p", (good, bad))], ledger)) == []
    assert ledger.dropped == {"contaminated/made": 2, "other_half_of_pair": 1}
    assert ledger.seen["contamination"] == {"made": 2, "other": 1}
    assert ledger.seen["contamination_items/made"] == {"items:1": 1, "items:2": 2}
    assert (ledger.drops[0]["turn"], ledger.drops[1]["turn"]) == (3, 2)
    assert ledger.drops[0]["found"].startswith("items:1: '") and both[:20].lower() in ledger.drops[0]["found"]

    report = stage(folder, benchmarks, report_only=True)
    ledger = Ledger()
    samples = [Sample("a", (with_both,)), Sample("p", (good, bad))]
    assert list(report(samples, ledger)) == samples
    assert (ledger.entered, ledger.left, ledger.dropped) == (3, 3, {})
    assert ledger.changed == {"contaminated": 2} and ledger.seen["contamination"] == {"made": 2, "other": 1}

    users = stage(folder, benchmarks, turns="user")
    assert list(users([Sample("t", (chat(("text", only)),))], Ledger()))  # none to look at
    assert list(users([Sample("p", (good, bad))], Ledger()))
    ledger = Ledger()
    assert not list(users([Sample("a", (with_both,))], ledger)) and ledger.drops[0]["turn"] == 3
    assert dropped(stage(folder, benchmarks, ignore=("made:items:1", "other:b:1")), both)[0] == 0
    assert dropped(stage(folder, benchmarks, ignore=("made:items:1",)), both)[1].dropped == {"contaminated/other": 1}


def test_runs_do_not_cross_turns(folder):
    words = ITEMS[0].split()
    ledger, found = Ledger(), stage(folder, rules=("13-gram",))
    parted = chat(("user", " ".join(words[:12])), ("assistant", " ".join(words[12:24])))
    assert list(found([Sample("a", (parted,))], ledger))
    assert (
        dropped(found, " ".join(words[:12]) + "\0" + " ".join(words[12:24]))[0] == 1
    )  # a zero byte of the text is a space


def test_the_file_is_the_same_every_time(folder):
    benchmarks = {"made": {"files": "items.jsonl", "layout": "gsm8k"}}
    rules = {"rules": ("13-gram", "8-gram", "50-char")}
    digests = {build_index(benchmarks, folder, rules).save(folder / f"{i}.npz") for i in range(2)}
    assert len(digests) == 1
    again = Index.load(folder / "0.npz")
    assert again.save(folder / "2.npz") in digests
    assert again.counts == {"made": {"items": 100, "texts": 100, "too_short": 0, "without_text": 0}}
    path, digest = prepared_index(benchmarks, folder, folder / "work", rules)
    assert {digest} == digests and prepared_index(benchmarks, folder, folder / "work", rules) == (path, digest)
    (folder / "items.jsonl").write_text(json.dumps({"question": ITEMS[0]}))
    assert prepared_index(benchmarks, folder, folder / "work", rules)[0] != path


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sha256": "00"}, "found the sha256 .*; expected 00"),
        ({"rules": ("9-gram",)}, "rules: found '9-gram'; expected one of the index's 13-gram, 50-char"),
        ({"share": 0}, "share: found 0"),
        ({"measure": "tokens"}, "measure: found 'tokens'; expected grams or words"),
        ({"turns": "assistant"}, "turns: found 'assistant'"),
        ({"report": True}, "did you mean 'report_only'"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(InputError, match=message):
        stage(folder, **options)


def test_a_file_that_is_no_index(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "b.npz", x=np.arange(3))
    np.savez(tmp_path / "c.npz", meta=np.array([{}], object), allow_pickle=True)
    for name in "abcd":  # d is not there
        with pytest.raises(InputError, match="found no index of benchmarks"):
            loaded(str(tmp_path / f"{name}.npz"), "")


def archive(folder, name, members):
    with zipfile.ZipFile(folder / name, "w") as file:
        for member, text in members.items():
            file.writestr(member, text)


def as_csv(*records):
    file = io.StringIO()
    csv.writer(file).writerows(records)
    return file.getvalue()


X, Y, W = "x" * 60, "y" * 50, "w" * 60
READ = [  # name, file, text, options, answers, the items
    ("gsm8k", "t.jsonl", '{"question": "q", "answer": "a"}', {}, False, [("t:1", ["q"])]),
    ("gsm8k", "t.jsonl", '{"question": "q", "answer": "a"}', {}, True, [("t:1", ["q", "a"])]),
    ("humaneval", "t.jsonl.gz", '{"prompt": "p", "canonical_solution": "s"}', {}, True, [("t:1", ["p", "s"])]),
    ("mt_bench", "t.jsonl", '{"turns": ["one", "two"]}', {}, False, [("t:1", ["one", "two"])]),
    (
        "self_instruct",
        "t.json",
        '[{"instruction": "do", "instances": [{"input": "it"}]}]',
        {},
        False,
        [("t:1", ["do it"])],
    ),
    ("agieval", "t.jsonl", '{"passage": null, "question": "q", "options": ["(A)x"]}', {}, False, [("t:1", ["q"])]),
    ("truthfulqa", "t.csv", 'Question,Best Answer\n"q, q","a ""b"""\n', {}, True, [("t:1", ["q, q", 'a "b"'])]),
    ("cmmlu", "t.csv", ",Question,A\n0,q,x\n", {}, False, [("t:1", ["q"])]),
    ("yuan", "t.txt", "q<n>r[SEP]a\n\nq2\n", {}, False, [("t:1", ["q\nr"]), ("t:2", ["q2"])]),
    ("own", "t.jsonl", '{"a": {"b": ["x", 5]}}', {"question": ["{a.b} {a.c}", "{c}"]}, False, [("t:1", ["x 5 "])]),
    ("own", "t.jsonl", json.dumps({"id": W, "a": X, "b": [Y, "z"], "answer": W}), {}, False, [("t:1", [X, Y])]),
    ("own", "t.jsonl", json.dumps({"a": "x", "b": {"c": "yy"}, "Answer": W}), {}, False, [("t:1", ["yy"])]),
    ("own", "t.jsonl", json.dumps({"a": "x", "Answer": W}), {}, True, [("t:1", [W])]),
]


@pytest.mark.parametrize("name, file, text, options, answers, expected", READ)
def test_reading_items(tmp_path, name, file, text, options, answers, expected):
    (tmp_path / file).write_bytes(gzip.compress(text.encode()) if file.endswith(".gz") else text.encode())
    items = list(read_benchmark(name, {"files": "*", **options}, tmp_path, answers=answers))
    assert [(item.id, list(item.texts)) for item in items] == expected


def test_reading_a_zip_without_headers(tmp_path):
    test, dev = as_csv(["q, r", "w", "x", "y", "z", "A"], ["q2", "1", "2", "3", "4", "B"]), as_csv(["d", *"wxyz", "A"])
    archive(tmp_path, "m.zip", {"data/test/b_test.csv": test, "data/dev/a_dev.csv": dev, "data/README.txt": "no"})
    items = list(read_benchmark("mmlu", "m.zip", tmp_path, answers=False))
    assert [(item.id, item.texts) for item in items] == [
        ("m.zip/data/dev/a_dev:1", ("d",)),
        ("m.zip/data/test/b_test:1", ("q, r",)),
        ("m.zip/data/test/b_test:2", ("q2",)),
    ]
    assert items[1].short == ("q, r w x y z", "q, r A w B x C y D z")
    (only,) = list(read_benchmark("mmlu", {"files": "m.zip", "members": "*/dev/*"}, tmp_path, answers=False))
    assert only.texts == ("d",)


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name}))
    assert [item.id for item in read_benchmark("gsm8k", ["*.jsonl", "b*"], tmp_path, answers=False)] == ["a:1", "b:1"]


@pytest.mark.parametrize(
    "name, file, text, options, message",
    [
        ("gsm8k", "t.jsonl", "", {"files": "none.jsonl"}, "benchmarks.gsm8k.files: found no file none.jsonl"),
        ("gsm8k", "t.jsonl", '{"q": "x"}', {}, 'row 1: found an object with the keys "q"; expected one of question'),
        ("own", "t.json", "{'query': 'x'}", {}, "t.json, row 1: .*rewrite Python's dicts"),
        ("own", "t.jsonl", "{'query': 'x'}", {}, "t.jsonl, row 1: .*rewrite Python's dicts"),
        ("own", "t.jsonl", "{}\n{", {}, "t.jsonl, row 2: found invalid JSON"),
        ("own", "t.zip", "PK", {}, "t.zip: found an archive that cannot be read"),
        ("own", "t.jsonl", "{}", {"fields": ["a"]}, "benchmarks.own: found the key 'fields'"),
        ("own", "t.jsonl", "{}", {"layout": "gsm"}, "benchmarks.own.layout: found 'gsm'"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path, name, file, text, options, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_benchmark(name, {"files": file, **options}, tmp_path, answers=False))


def test_wrong_index_options(folder):
    for options, message in (({"rule": ()}, "found the key 'rule'"), ({"rules": ("12-gram",)}, "found '12-gram'")):
        with pytest.raises(InputError, match=message):
            build_index({"made": "items.jsonl"}, folder, options)


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")
def test_real_leaks(tmp_path):
    """Yuan 2.0's GSM8K is the test set in another order; derived OIG and Skywork's pt_train are the train set."""
    benchmarks = {"gsm8k": "gsm8k/test.jsonl.gz", "train": {"files": "gsm8k/train.jsonl.gz", "layout": "gsm8k"}}
    path, digest = prepared_index(benchmarks, REAL / "eval", tmp_path)
    found = Decontaminate({"index": str(path), "sha256": digest})
    with gzip.open(REAL / "eval/yuan2/GSM8K/gsm8k_En.txt.gz", "rt") as lines:
        count, ledger = dropped(found, *(line.partition("[SEP]")[0] for line in lines))
    assert (count, len(ledger.seen["contamination_items/gsm8k"])) == (1319, 1319)
    with gzip.open(REAL / "pretrain/skywork_pt_train/pt_train.jsonl.gz", "rt") as lines:
        count, ledger = dropped(found, *[json.loads(line)["text"] for line in lines][:500])
    assert count == 500
    with gzip.open(REAL / "pretrain/wikitext2/wiki.valid.tokens.gz", "rt") as file:
        text = file.read(500_000)
    assert dropped(found, *(text[i : i + 1000] for i in range(0, len(text), 1000)))[0] == 0
