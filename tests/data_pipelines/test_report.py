"""The page about prepared data: its figures are those of the data, and the data's text stays text."""

import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from tiny_tokenizers import tiny

from data_pipelines import datasets
from data_pipelines.batches.batch_stats import Item
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.inert import INERT, inert
from data_pipelines.mixing.mixture import Mixture
from data_pipelines.prepare import prepare
from data_pipelines.report import report
from data_pipelines.reporting import charts, mixing, numbers, page, rejects, rendered, runs, scan, views
from data_pipelines.reporting.accounts import read_accounts
from data_pipelines.reporting.encoding import Encoded, chosen, encode_sample
from data_pipelines.reporting.recipe import Recipe, learned_by
from data_pipelines.reporting.repeats import Repeats
from data_pipelines.templates.template import Example
from data_pipelines.workers import Workers

ROOT = Path(__file__).parents[2]
VOID = {"meta", "br"}
INLINE = {"bdi", "code"}


class Page(HTMLParser):
    """structure: tags with their attributes' names; tables: rows of texts; text: all of it."""

    def __init__(self, html):
        super().__init__()
        self.structure, self.attributes, self.tables, self.texts, self.open = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.structure.append((tag, *sorted(name for name, _ in attributes)))
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)
        if tag not in INLINE:
            self.texts.append(" ")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if {"style", "title"} & set(self.open):
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, *titles):
        """The rows of the table whose first row starts so, without it."""
        (found,) = [rows for rows in self.tables if tuple(rows[0][: len(titles)]) == titles]
        return [[cell.strip() for cell in row] for row in found[1:]]


def whole(text):
    return int(text.replace(",", "").replace("−", "-"))


def recipe(kind="sentencepiece", template="koala", length=64, **options):
    return Recipe(str(tiny(kind).path), template, length, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three sources, as `prepare` writes them, with rows that do not fit."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("alpaca", "sharegpt", "text"):
        (folder / "in" / name).mkdir(parents=True)
    rows = [{"instruction": f"ask {i // 2}", "input": "", "output": "" if i % 9 == 4 else "tell " * (i % 40 + 1)}
            for i in range(200)]  # fmt: skip
    (folder / "in/alpaca/a.json").write_text(json.dumps(rows))
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is the moon."}]
    chats = [turns * (i % 5 + 1) for i in range(40)] + [turns[1:]] * 3 + [turns[1:] + turns] * 2
    (folder / "in/sharegpt/s.jsonl").write_text("\n".join(json.dumps({"conversations": chat}) for chat in chats))
    (folder / "in/text/t.txt").write_text("\n\n".join(f"document {i} about bees " * (i + 1) for i in range(12)))
    sources = {"alpaca": {}, "sharegpt": {"weight": 3}, "mine": {"kind": "text", "patterns": ("text/*",), "weight": 1}}
    sources["alpaca"] = {"weight": 5}
    prepare(ConfigDict({"sources": sources, "heldout": 0.2}), folder / "in", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def shown(prepared):
    """The page about it, with tokens."""
    return Page(report(prepared, recipe=recipe(), sample=0))


def conversation(question, answer, i=0, source="chat"):
    return Conversation(source, f"file:{i}", (Turn("user", question, 0.0), Turn("assistant", answer, 1.0)))


def write(folder, train, heldout=(), stages=None, rejected=None, drops=(), source="chat", **others):
    """A prepared folder of one source with stages as they are given, for what no configuration makes."""
    folder.mkdir()
    splits = datasets.write_source(
        folder, source, [*datasets.records_of("train", train), *datasets.records_of("heldout", heldout)]
    )
    count, rejected = len(train) + len(heldout), rejected or {}
    plain = {"entered": count, "left": count, "dropped": {}, "changed": {}, "seen": {}}
    stages = {name: {**plain, **stage} for name, stage in (stages or {}).items()} | {"split": plain}
    rows = next(iter(stages.values()))["entered"]
    entry = {"kind": "text", "licence": "none", "weight": 0, "files": [], "rows": rows + sum(rejected.values())}
    entry |= {"kept_rows": rows, "rejected": rejected, "repaired": {}, "stages": stages, "splits": splits, **others}
    manifest = {"sources": {source: entry}, "missing": {}, "tokenizer": None, "config": {}}
    (folder / "rejects.jsonl").write_text("".join(json.dumps({"source": source, **drop}) + "\n" for drop in drops))
    datasets.write_manifest(folder, manifest)
    return folder


################################################ Accounts #################################################


def test_the_table_of_what_came_in_and_what_is_left(prepared, shown):
    sources = datasets.read_manifest(prepared)["sources"]
    _, *rows, total = shown.table("source", "rows")
    assert len(rows) == len(sources) == 3
    for name, *counts, adds_up in rows:
        entry = sources[name]
        read, lost, kept, made, train, heldout = map(whole, counts)
        assert (read, lost, kept) == (entry["rows"], sum(entry["rejected"].values()), entry["kept_rows"])
        assert (train, heldout) == tuple(entry["splits"][split]["examples"] for split in ("train", "heldout"))
        assert read == lost + kept and made == train + heldout and adds_up == "yes"
    assert [whole(cell) for cell in total[1:-1]] == [
        sum(map(whole, column)) for column in zip(*(r[1:-1] for r in rows))
    ]
    assert f"Manifest {datasets.read_manifest(prepared)['hash']}" in shown.text


def test_stages_and_tables_that_nobody_knows_are_shown(tmp_path):
    chats = [conversation(f"q{i}", "a", i) for i in range(6)]
    stages = {
        "filter": {"entered": 11, "left": 9, "dropped": {"language": 2}, "seen": {"language": {"en": 9, "de": 2}}},
        "polish": {
            "entered": 9, "left": 8, "dropped": {"too_shiny": 1}, "changed": {"buffed": 4},
            "seen": {"gloss": {"high": 7}},
        },
        "decontaminate": {
            "entered": 8, "left": 6, "dropped": {"contaminated": 2},
            "seen": {"contamination": {"gsm8k": 2}, "contamination_items/gsm8k": {"test/7": 2, "test/9": 1}},
        },
    }  # fmt: skip
    folder = write(tmp_path / "p", chats, stages=stages, rejected={"empty_text": 4})
    manifest = datasets.read_manifest(folder)
    manifest["config"] = {"stages": {"decontaminate": {"benchmarks": {"mbpp": "mbpp.jsonl", "gsm8k": "g.jsonl"}}}}
    datasets.write_manifest(folder, manifest)
    shown = Page(report(folder))
    heads, row, _ = shown.table("source", "rows")
    assert heads == ["read", "left out", "kept", "filter", "polish", "decontaminate", "train", "held out"]
    lost = dict(zip(heads, row[1:4] + row[5:]))
    assert (lost["left out"], lost["filter"], lost["polish"], lost["decontaminate"]) == ("4", "2", "1", "2")
    assert row[-1] == "yes"
    assert shown.table("benchmark") == [["gsm8k", "2", "2", "chat 2"], ["mbpp", "0", "0", ""]]
    assert [["en", "", "9", "82 %"], ["de", "", "2", "18 %"]] in shown.tables
    assert [["high", "", "7", "78 %"]] in shown.tables
    for told in ("Polish: 1 of 9 conversations left out", "too shiny", "polish: buffed 4 changed", "contaminated 2"):
        assert told in shown.text
    assert "duplicates left out – stage not used" in shown.text


@pytest.mark.parametrize("wrong", ({"left": 5}, {"entered": 8}, {"dropped": {"language": 3}}))
def test_accounts_that_do_not_add_up_are_told(tmp_path, monkeypatch, wrong):
    chats = [conversation(f"q{i}", "a", i) for i in range(6)]
    right = {"entered": 7, "left": 6, "dropped": {"language": 1}}
    monkeypatch.setattr(datasets, "check_accounts", lambda name, entry: None)
    for name, stage, adds_up in (("right", right, "yes"), ("wrong", {**right, **wrong}, "no")):
        shown = Page(report(write(tmp_path / name, chats, stages={"filter": stage}, kept_rows=7, rows=7)))
        assert shown.table("source", "rows")[1][-1] == adds_up


def test_without_filter_tokenizer_rejects_and_with_an_empty_split(tmp_path):
    shown = Page(report(write(tmp_path / "a", [conversation("ask me", "well, no")])))
    assert "Not looked at: the filter stage was not used." in shown.text
    assert "No tokenizer was given, so lengths are in characters" in shown.text
    assert "words to train on 4" in shown.text and "tokens to train on" not in shown.text
    folder = write(tmp_path / "b", [], [conversation("ask", "tell")])
    (folder / "rejects.jsonl").unlink()
    for shown in (Page(report(folder)), Page(report(folder, recipe=recipe()))):
        assert "No example to train on." in shown.text and "No source has an example to train on." in shown.text
        assert "There is no rejects.jsonl" in shown.text
    with pytest.raises(InputError, match="no such folder"):
        report(tmp_path / "nothing")


################################################ Drops ####################################################


def drop(reason, i, stage="read", **others):
    return {"stage": stage, "file": "a", "row": i, "turn": None, "reason": reason, "found": f"f{i}", **others}


def test_samples_of_drops_come_from_all_over_the_file(tmp_path, monkeypatch):
    drops = [drop("often", i) for i in range(500)] + [drop("once", 7)]
    folder = write(tmp_path / "p", [conversation("q", "a")], rejected={"often": 500, "once": 1, "lost": 2}, drops=drops)
    with open(folder / "rejects.jsonl", "a") as file:
        file.write('{"oops\n[1]\n{"source": "chat", "stage": "read", "reason": "unheard_of"}\n')
        file.write(json.dumps({"source": "chat", **drop("often", 1, found="x" * 3_000_000)}) + "\n")
    accounts = read_accounts(datasets.read_manifest(folder))
    found = rejects.read_rejects(folder / "rejects.jsonl", accounts)
    assert found.counts == {("chat", "read", "often"): 500, ("chat", "read", "once"): 1}
    assert found.unreadable == 4  # the long line, too: it is cut off
    assert found.differing(accounts) == {("chat", "read", "lost"): (0, 2)}
    picked = [sample["row"] for sample in found.samples["chat", "read", "often"]]
    assert len(picked) == 3 and picked == sorted(picked) and picked != [0, 1, 2]
    assert picked == [
        s["row"] for s in rejects.read_rejects(folder / "rejects.jsonl", accounts).samples["chat", "read", "often"]
    ]
    shown = Page(report(folder))
    assert "4 lines of rejects.jsonl say nothing about this data" in shown.text
    assert "chat, read, lost: rejects.jsonl has 0, the manifest 2." in shown.text
    assert f"chat: a, row {picked[0]} found f{picked[0]}" in shown.text


def test_copies_of_what_was_kept_are_counted(tmp_path):
    via, near = "of chat/f:1, by way of chat/f:2", " (estimated Jaccard 0.87)"
    names = ["of chat/f:1", via, via + near, f"of chat/f:9{near}"]
    drops = [drop("near_duplicate", i, "dedupe", found=name) for i, name in enumerate(names)]
    stages = {"dedupe": {"entered": 5, "left": 1, "dropped": {"near_duplicate": 4}}}
    folder = write(tmp_path / "p", [conversation("q", "a")], stages=stages, drops=drops)
    shown = Page(report(folder))
    assert "Of the samples that were kept in their place, 1 had 1 copy, 1 had 3 copies." in shown.text
    assert "duplicates left out 4 near duplicate 4" in shown.text


################################################ Untrusted text ###########################################

EVIL = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\u202ereversed\u2066x",
    "a\0b\x1b[31m\x7f\x85c",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></textarea></bdi></td><!--",
    "{{ 7*7 }}{% if %}",
    "w" * 5000,
    "line\n\n" * 60,
    "&lt;b&gt;&amp;",
    "\U000e0041\ufeff\u200f",
    "javascript:alert(1)",
)


def full_of(texts, folder):
    """A prepared folder with the texts wherever a text can stand."""
    count = len(texts)
    chats = [conversation(text, f"{text}{text[::-1]}", i) for i, text in enumerate(texts)]
    chats += [Conversation("chat", f"{text}:{i}", (Turn(text, text, 1.0, False),)) for i, text in enumerate(texts)]
    seen = {"language": dict.fromkeys(texts, 2), texts[0]: dict.fromkeys(texts, 1)}
    contamination = {"contamination": dict.fromkeys(texts, 1)} | {f"contamination_items/{t}": {t: 1} for t in texts}
    dropped = dict.fromkeys(texts, 1)
    stages = {
        "filter": {"entered": 3 * count, "left": 2 * count, "dropped": dropped, "seen": seen, "changed": dropped},
        "decontaminate": {"seen": contamination},
        texts[1]: {"changed": dict.fromkeys(texts, 1)},
    }
    drops = [drop(t, i, "filter", found=t, expected=t, excerpt=t, file=t) for i, t in enumerate(texts)]
    drops += [drop(t, i, file=f"\ud800{t}", found=f"\ud800{t}") for i, t in enumerate(texts)]
    files = [{"path": text, "bytes": 1, "sha256": text} for text in texts]
    described = {"licence": texts[0], "files": files, "kind": texts[1], "repaired": dropped}
    write(folder, chats, stages=stages, drops=drops, rejected=dropped, **described)
    manifest = datasets.read_manifest(folder)
    manifest["missing"] = {text: {} for text in texts}
    manifest["config"] = {text: text for text in texts}
    datasets.write_manifest(folder, manifest)
    run = folder / "run"
    (run / "checkpoints/7/meta").mkdir(parents=True)
    row = {"step": 7, **{f"eval/loss/{text}": 1.0 for text in texts}}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "evaluation.json").write_text(json.dumps(dict.fromkeys(texts, 0.5)))
    section = {"tokenizer": texts[0], "template": texts[1], "length": 8, "batch_size": 4, "sources": list(texts)}
    meta = {"config": {"data": section, "train": {"steps": 7}}, "data_hash": texts[0]}
    (run / "checkpoints/7/meta/metadata").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two folders alike but for their texts: evil ones, and harmless ones that are as long."""
    folder = tmp_path_factory.mktemp("pair")
    return full_of(EVIL, folder / "evil"), full_of([re.sub("[^a-z0-9]", "x", t) for t in EVIL], folder / "plain")


def both(pair, **options):
    return [report(folder, run_folders=[folder / "run"], examples=30, **options) for folder in pair]


def test_text_stays_text(pair):
    evil, plain = both(pair)
    assert Page(evil).structure == Page(plain).structure
    assert not set(evil) & {chr(code) for code in INERT}
    parsed = Page(evil)
    for text in EVIL:
        clean = inert(text)
        assert " ".join(clean[:160].split()) in parsed.text, text
    tokens = Page(both(pair, recipe=recipe("bytes", length=4096))[0])
    ours = {name for element in Page(plain).structure for name in element} | {"b", "i", "u", "dir", "title", "class"}
    assert {name for element in tokens.structure for name in element} <= ours
    assert {value for tag, name, value in tokens.attributes if name == "href"} <= {
        f"#{anchor}"
        for anchor in ("flow", "sources", "dropped", "contamination", "mixture", "rows", "examples", "runs")
    }


@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)))
def test_an_element_holds_any_text(content, value):
    html = str(charts.tag("text", content, class_=value))
    parsed = Page(html)
    assert parsed.structure == [("text", "class")]
    assert parsed.attributes == [("text", "class", inert(value))]
    assert "".join(parsed.texts) == " " + inert(content)
    assert not set(html) & {chr(code) for code in INERT}


@pytest.mark.parametrize("broken", ("escape", "inert"))
def test_that_test_can_fail(pair, monkeypatch, broken):
    if broken == "escape":
        made = page.environment()
        made.autoescape = False
        monkeypatch.setattr(page, "environment", lambda: made)
    else:
        monkeypatch.setattr(page, "inert", lambda text: text)
    evil, plain = both(pair)
    try:
        same = Page(evil).structure == Page(plain).structure
    except AssertionError:  # tags that do not match
        same = False
    assert not same or set(evil) & {chr(code) for code in INERT}


def test_the_policy_allows_its_own_style_and_nothing_else(shown, prepared):
    html = report(prepared)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [v for tag, name, v in Page(html).attributes if tag == "meta" and name == "content" and "-src" in v]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert (
        "style" not in {name for _, name, _ in shown.attributes} and "url(http" not in style and "@import" not in style
    )
    assert not {tag for tag, *_ in shown.structure} & {"script", "link", "img", "iframe", "object", "form", "base"}


def test_the_same_input_gives_the_same_bytes(prepared):
    options = {"recipe": recipe(), "sample": 20}
    assert report(prepared, **options) == report(prepared, **options)
    assert report(prepared, **options) != report(prepared, **{**options, "sample": 21})


################################################ Counts ###################################################


def test_tokens_are_those_that_the_trainer_counts(prepared, shown):
    accounts, made = read_accounts(datasets.read_manifest(prepared)), recipe()
    with Workers(1) as pool:
        everything = encode_sample(prepared, accounts, made, 0, pool)
        sampled = encode_sample(prepared, accounts, made, 60, pool)
        scans = scan.scan_all(prepared, accounts, pool)
    template, missed = learned_by(made), 0
    for account in accounts:
        conversations = datasets.open_source(prepared, account.name, "train")
        examples = [template(conversation) for conversation in conversations]
        tokens = sum(example.positions for example in examples if example)
        loss_tokens = sum(int((example.weights[1:] > 0).sum()) for example in examples if example)
        found, counted = everything[account.name], scans[account.name]
        assert (found.tokens, found.loss_tokens) == (tokens, loss_tokens)
        assert found.total("tokens", counted.examples, counted.characters) == (tokens, 0)
        assert found.cut == sum(example.cut > 0 for example in examples if example)
        assert (
            counted.characters
            == account.splits["train"]["characters"]
            == sum(len(turn.text) for conversation in conversations for turn in conversation.turns)
        )
        value, margin = sampled[account.name].total("tokens", counted.examples, counted.characters)
        assert (margin > 0) == (account.train > 60)
        missed += not value - margin <= tokens <= value + margin
        facts = f"tokens {tokens:,} learned tokens {loss_tokens:,}"
        assert facts in shown.text
    assert missed == 0
    assert everything["mine"].cut > 0  # there is a document longer than a row


def test_the_margin_holds_the_truth_as_often_as_it_says():
    """95 of 100 samples; a margin half as wide holds it less often."""
    lengths = [(5 + i * 37 % 400, (5 + i * 37 % 400) // 4 + i % 7) for i in range(400)]
    characters, tokens = (sum(column) for column in zip(*lengths))
    held = Counter()
    for trial in range(300):
        counts = Encoded()
        for index in chosen(f"trial {trial}", len(lengths), 60):
            length, count = lengths[index]
            counts.add(length, Item(0, "", Example(range(count + 1), ()), 0))
        value, margin = counts.total("tokens", len(lengths), characters)
        for width in (1, 0.5):
            held[width] += abs(value - tokens) <= width * margin
    assert held[1] > 0.92 * 300 and held[0.5] < 0.8 * 300


def test_turns_roles_and_repeated_questions(prepared, shown):
    conversations = list(datasets.open_source(prepared, "sharegpt", "train"))
    turns = Counter(len(conversation.turns) for conversation in conversations)
    table = [[str(n), "", f"{turns[n]}", numbers.share(turns[n] / len(conversations))] for n in range(2, 10)]
    last = ["10 or more", "", f"{turns[10]}", numbers.share(turns[10] / len(conversations))]
    assert [*table, last] in shown.tables
    alpaca = Counter(c.turns[0].text for c in datasets.open_source(prepared, "alpaca", "train"))
    often = sum(count for count in alpaca.values() if count > 1)
    told = f"Repeated questions: {numbers.share(often / alpaca.total())} of the rows ask what another one asks"
    assert told in shown.text and often
    assert f"{len(alpaca)} different first questions" in shown.text


def test_repeats_of_many_keys_are_a_sample_of_the_keys():
    keys = [f"key {i % 3000}" for i in range(6000)] + ["key 7"] * 50
    exact, small, parts = Repeats(), Repeats(100), [Repeats(100) for _ in range(3)]
    for place, key in enumerate(keys):
        exact.add(key, place)
        small.add(key, place)
        parts[place * 3 // len(keys)].add(key, place)
    assert exact.one_in == 1 and exact.sizes() == {2: 2999, 52: 1} and exact.top(1) == [(52, 7)]
    assert small.one_in > 1 and 30 < small.sizes().total() <= 100
    assert set(small.sizes()) <= {2, 52}  # each key that is counted is counted exactly
    assert abs(small.sizes().total() * small.one_in / 3000 - 1) < 0.3
    for order in itertools.permutations(parts):
        merged = Repeats(100)
        for part in order:
            merged.merge(part)
        assert merged._found == small._found


def test_a_source_in_parts_counts_as_in_one(tmp_path, monkeypatch):
    """Rows with several answers lie across the borders of parts."""
    chats = [Conversation("chat", f"f:{i // 3}:{i % 3}", conversation(f"q{i // 6}", "a" * i).turns) for i in range(40)]
    folder = write(tmp_path / "p", chats)
    accounts, scans = read_accounts(datasets.read_manifest(folder)), []
    for smallest in (8192, 7, 1):
        monkeypatch.setattr(scan, "RANGE", smallest)
        with Workers(1) as pool:
            scans.append(scan.scan_all(folder, accounts, pool)["chat"])
    assert [part.stop for part in scan.parts(100, 7)][-2:] == [98, 100] and len(scan.parts(10**6, 7)) == 64
    assert scans[0].prompts.sizes() == {2: 7}
    for other in scans[1:]:
        assert (other.lengths, other.turns, other.words) == (scans[0].lengths, scans[0].turns, scans[0].words)
        assert other.prompts._found == scans[0].prompts._found


@pytest.mark.parametrize(
    ("identity", "row"), (("a/b:7", "a/b:7"), ("a/b:7:chosen", "a/b:7"), ("a:3:human:1", "a:3"), ("free", "free"))
)
def test_the_answers_of_a_row_count_once(identity, row):
    assert scan.row_of(identity) == row


def test_quantiles():
    assert [scan.quantile(Counter({1: 50, 7: 45, 90: 5}), share) for share in (0.5, 0.51, 0.95, 0.96, 1)] == [
        1,
        7,
        7,
        90,
        90,
    ]
    assert scan.quantile(Counter(), 0.5) == 0


def test_half_octaves():
    for value in range(1, 5000):
        place = charts.bin_of(value)
        assert 2**place <= value * value < 2 ** (place + 1)
        assert charts.bin_start(place) <= value < charts.bin_start(place + 1)
    picture = str(charts.histogram({3: 2, 300: 5, 3000: 3}, (0, 24), "tokens", "s1", (2048, "row")))
    counts = re.findall(r": ([\d,]+) examples, (\d+) %", picture)
    assert counts == [("2", "20"), ("5", "50"), ("3", "30")]
    assert re.findall(r'class="(s1|over)"', picture) == ["s1", "s1", "over"]  # what is longer than a row is marked


@pytest.mark.parametrize(
    ("form", "value", "text"),
    (
        (numbers.short, 9_999, "9,999"), (numbers.short, 12_345, "12.3 k"), (numbers.short, 999_960, "1 M"),
        (numbers.share, 0, "0 %"), (numbers.share, 1e-9, "< 0.1 %"), (numbers.share, 0.99999, "> 99.9 %"),
        (numbers.share, 1, "100 %"), (numbers.share, 0.054, "5.4 %"), (numbers.share, 0.54, "54 %"),
        (numbers.about, (12_345_678, 0), "12,345,678"), (numbers.about, (12_345_678, 123_456), "≈ 12.3 M ± 1.0 %"),
        (numbers.number, -1234, "−1,234"), (numbers.power, 2048, "2k"), (numbers.size, 1536, "1.5 KiB"),
    ),
)  # fmt: skip
def test_numbers_as_they_stand(form, value, text):
    assert form(value) == text


############################################## Examples, rows #############################################


@pytest.mark.parametrize("kind", ("sentencepiece", "bytes"))
def test_pieces_are_the_tokens_with_what_is_learned(kind):
    tokenizer = tiny(kind)
    answer = "琵琶湖 é and\n bees 🐝"
    example = learned_by(recipe(kind, length=400))(conversation("What is the moon?", answer))
    pieces = list(rendered.pieces(example, tokenizer))
    spelled = lambda kinds: "".join(piece.text for piece in pieces if piece.kind in kinds)
    assert spelled(("learned", "read")) == tokenizer.decode(example.ids, skip_special=False)
    assert spelled(("learned",)).strip() == answer + tokenizer.decode([tokenizer.eos_id], False)
    ids = [int(i) for piece in pieces for i in piece.hint.removeprefix("id ").split(", ")]
    assert ids == example.ids.tolist()
    weights = [piece.kind == "learned" for piece in pieces for _ in piece.hint.split(", ")]
    assert weights == (example.weights > 0).tolist()
    assert {piece.text for piece in pieces if piece.special} == {
        tokenizer.decode([i], False) for i in (example.ids[0], tokenizer.eos_id)
    }
    other = list(rendered.pieces(Example(example.ids, 1 - example.weights), tokenizer))
    assert [p.kind for p in other] != [p.kind for p in pieces]


def test_long_stretches_are_shortened_in_the_middle():
    pieces = [
        rendered.Piece(f"{i} ", kind, False, "") for kind, n in (("read", 20), ("learned", 500)) for i in range(n)
    ]
    short = list(rendered.shortened(iter(pieces)))
    assert short[:80] == pieces[:80] and short[-20:] == pieces[-20:]
    assert [piece.hint for piece in short if piece.kind == "gap"] == ["420 tokens"]
    many = [rendered.Piece("x", "read" if i % 2 else "learned", False, "") for i in range(60)]
    assert [piece.hint for piece in list(rendered.shortened(iter(many)))[24:]] == ["36 tokens"]


def test_examples_on_the_page(prepared, shown):
    (account,) = [a for a in read_accounts(datasets.read_manifest(prepared)) if a.name == "mine"]
    examples = rendered.show(prepared, account, recipe(), 3)
    assert len({example.index for example in examples}) == 3
    for example in examples:
        assert f"{example.id}: {example.tokens:,} tokens, {example.loss_tokens:,} of them learned" in shown.text
        cut = f"the row ends here: {example.cut:,} tokens are cut off"
        assert (cut in shown.text) == bool(example.cut)
    assert any(example.cut for example in examples)


def test_what_the_template_refuses_or_cannot_learn_is_told(tmp_path):
    tool = Conversation("chat", "f:1", (Turn("user", "a", 0.0), Turn("tool", "b", 0.0), Turn("assistant", "c", 1.0)))
    silent = Conversation("chat", "f:2", (Turn("user", "a", 0.0), Turn("assistant", "b", 0.0)))
    folder = write(tmp_path / "p", [conversation("a", "b"), tool, silent, conversation("c", "d")])
    shown = Page(report(folder, recipe=recipe()))
    assert "The template refuses 25 % of the examples, which stops a run; the first: chat/f:1" in shown.text
    assert "nothing to learn 25 %" in shown.text
    assert "2 of the draws gave no example" in shown.text


def test_the_picture_of_rows(prepared, shown):
    folder = views.open_folder(prepared, "p", datasets.read_manifest(prepared))
    (_, mixed, _) = views.mixings([folder], [], [], recipe(), 1.0, 0)[0]
    packed = mixed.packed
    assert packed.draws == min(4096, sum(share.size for share in mixed.shares))
    assert all(sum(item.example.positions for item in row) <= 64 for row in packed.rows)
    assert packed.tokens.total() == sum(item.example.positions for row in packed.rows for item in row)
    padding = 1 - packed.tokens.total() / (64 * len(packed.rows))
    assert f"{numbers.share(padding)} of the {len(packed.rows)} rows" in shown.text
    assert sum(mixed.measured_share(share.name, "tokens") for share in mixed.shares) == pytest.approx(1)


################################################ Mixture, runs ############################################


def test_the_mixture_is_that_of_the_draws(prepared, shown):
    manifest = datasets.read_manifest(prepared)
    sizes = {name: entry["splits"]["train"]["examples"] for name, entry in manifest["sources"].items()}
    mixture = Mixture(sizes, {"alpaca": 5, "sharegpt": 3, "mine": 1})
    draws = sum(sizes.values())
    drawn = Counter(mixture.names[mixture.draw(k).source] for k in range(draws))
    rows = {row[0]: row[1:] for row in shown.table("source", "asked for")}
    for name, weight in (("alpaca", 5), ("sharegpt", 3), ("mine", 1)):
        share, realised, _, count, furthest, size, epochs, *_ = rows[name]
        assert (share, whole(count), whole(size)) == (numbers.share(weight / 9), drawn[name], sizes[name])
        assert realised == numbers.share(drawn[name] / draws) and epochs == f"{drawn[name] / sizes[name]:.2f}"
        ends = [draws * i // (draws // 50) for i in range(draws // 50 + 1)]
        so_far = [sum(mixture.names[mixture.draw(k).source] == name for k in range(end)) for end in ends]
        distances = [abs(count - end * weight / 9) for count, end in zip(so_far, ends)]
        assert furthest == f"{max(distances):.2f}" and 0 < max(distances) < 1
    mixed = mixing.mix(prepared, manifest, ["alpaca=1", "mine=9"], None, mixing.Length(2.0), 0)
    assert {name: sum(counts) for name, counts in mixed.windows.items()} == {s.name: s.drawn for s in mixed.shares}
    assert sum(s.drawn for s in mixed.shares) == mixed.draws == mixed.ends[-1] == 2 * (sizes["alpaca"] + sizes["mine"])
    with pytest.raises(InputError, match=r"sources: found 'alpca'"):
        report(prepared, sources=["alpca"])


def run_folder(folder, prepared, losses, made=None, steps=30, **data):
    """The log of a run on the prepared data, as the trainer writes it."""
    made = made or recipe()
    meta = folder / "checkpoints" / str(steps) / "meta"
    meta.mkdir(parents=True)
    identity = (
        datasets.read_manifest(prepared)["hash"],
        tiny("sentencepiece").fingerprint,
        learned_by(made).fingerprint,
    )
    section = {"tokenizer": made.tokenizer, "template": made.template, "length": made.length, "packing": "best_fit"}
    section |= {"pool": 256, "batch_size": 4, "sources": ["alpaca=2", "mine=1"], **data}
    config = {"data": section, "train": {"steps": steps, "epochs": 0.0, "tokens": 0, "seed": 3}}
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()
    (meta / "metadata").write_text(json.dumps({"schema": 1, "config": config, "data_hash": digest}))
    rows = [{"step": step, "loss": 5.0 - step / 10} for step in range(1, steps + 1)]
    for step, values in losses.items():
        mean = sum(values.values()) / len(values)
        rows.append({"step": step, "eval/loss": mean, **{f"eval/loss/{name}": value for name, value in values.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "eval/lo')
    return folder


def test_runs_side_by_side(tmp_path, prepared):
    one = run_folder(tmp_path / "one", prepared, {0: {"alpaca": 9, "mine": 8}, 30: {"alpaca": 2.5, "mine": 3.25}})
    two = run_folder(tmp_path / "two", prepared, {0: {"alpaca": 9}, 30: {"alpaca": 2.25}}, sources=["alpaca"])
    (two / "evaluation.json").write_text('{"eval/loss/alpaca": 2.125, "note": "text", "nan": NaN}')
    shown = Page(report(prepared, run_folders=[one, two]))
    assert shown.table("held-out loss") == [
        ["alpaca", "2.5000", "2.2500", "−0.2500"],
        ["mine", "3.2500", "–", "–"],
        ["all its sources", "2.8750", "2.2500", "–"],
    ]
    assert views.difference([2.875, 2.25], True) == "−0.6250"
    assert shown.table("figure") == [["eval/loss/alpaca", "–", "2.1250"]]
    assert [row[-1] for row in shown.table("run")] == ["out", "out"]
    read = [runs.read_run(folder, folder.name) for folder in (one, two)]
    folder = views.open_folder(prepared, "out", datasets.read_manifest(prepared))
    (_, first, _), (_, second, _) = views.mixings([folder], read, [], None, 1.0, 0)
    assert [(share.name, share.weight) for share in first.shares] == [("alpaca", 2 / 3), ("mine", 1 / 3)]
    assert [share.name for share in second.shares] == ["alpaca"]
    assert first.steps == 30 and first.draws == round(30 * 4 * first.packed.draws / len(first.packed.rows))


@pytest.mark.parametrize("change", ("data", "template", "tokenizer"))
def test_a_run_on_other_data_is_told_apart(tmp_path, prepared, change):
    run = run_folder(tmp_path / "run", prepared, {30: {"alpaca": 2.5}})
    meta = run / "checkpoints/30/meta/metadata"
    if change == "data":
        meta.write_text(meta.read_text().replace('"data_hash": "', '"data_hash": "0'))
    elif change == "template":
        meta.write_text(meta.read_text().replace('"length": 64', '"length": 65'))
    else:
        (run / "checkpoints/tokenizer").mkdir()
        tiny("control").save(run / "checkpoints/tokenizer")
    shown = Page(report(prepared, run_folders=[run]))
    assert shown.table("run")[0][-1] == "other data, or encoded otherwise"
    assert "It was trained on other data, or encoded otherwise, so its mixture is not shown." in shown.text


def test_curves_are_thinned_and_damaged_lines_left_out(tmp_path):
    rows = [{"step": step, "loss": 1 / step, "eval/loss/a": None if step % 2 else 2.0} for step in range(1, 5001)]
    lines = [json.dumps(row) for row in rows] + [
        "[]",
        '{"loss": 3}',
        '{"step": 5001, "loss": "x"}',
        '{"step": 5002, "l',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    read = runs.read_run(tmp_path, "r")
    curve = read.curves["loss"]
    assert len(curve) <= 2 * runs.POINTS + 1 and curve[0] == (1, 1.0) and curve[-1] == (5000, 1 / 5000)
    assert len({b - a for (a, _), (b, _) in itertools.pairwise(curve[:-1])}) == 1
    assert set(read.heldout) == {"a"} and {value for _, value in read.heldout["a"]} == {2.0}
    assert read.config is None and read.recipe() is None
    with pytest.raises(InputError, match="no metrics"):
        runs.read_run(tmp_path / "nothing", "n")


def test_folders_side_by_side(tmp_path, prepared):
    chats = [conversation("ask", "tell", i, "alpaca") for i in range(3)]
    other = write(tmp_path / "other", chats, source="alpaca")
    shown = Page(report(prepared, compare=[other]))
    rows = {row[0]: row[1:] for row in shown.table("source", "out")}
    entry = datasets.read_manifest(prepared)["sources"]["alpaca"]
    kept = sum(split["examples"] for split in entry["splits"].values())
    assert rows["alpaca"][:3] == ["200", f"{sum(entry['rejected'].values())} + 0", str(kept)]
    assert rows["alpaca"][4:] == ["3", "0 + 0", "3", "21", "no"]
    assert rows["mine"][-1] == "in one only"
    same = Page(report(prepared, compare=[prepared])).tables[-1]
    assert [row[-1] for row in same[2:]] == ["yes"] * 3


################################################ The command ##############################################


def command(*arguments):
    line = [sys.executable, "-m", "data_pipelines.report", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command(tmp_path, prepared):
    tokenizer, output = tiny("sentencepiece").path, tmp_path / "r.html"
    flags = (f"--output={output}", "--template=koala", f"--tokenizer={tokenizer}", "--length=64", "--sample=0")
    done = command(prepared, *flags, "--workers=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: ")
    assert output.read_text("utf-8") == report(prepared, recipe=recipe(), sample=0)
    wrong = command(tmp_path, f"--output={output}")
    assert wrong.returncode == 1 and "found no file; expected the manifest" in wrong.stderr
    assert "Traceback" not in wrong.stderr
