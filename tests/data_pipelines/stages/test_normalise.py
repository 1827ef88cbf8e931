"""Normalising: what is mended, what is left alone, that twice is once, and that nothing is slow."""

import contextlib
import gzip
import json
import random
import re
import time
from pathlib import Path

import ftfy
import pytest
from ftfy.badness import BADNESS_RE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.stages import characters, code_spans, detokenise
from data_pipelines.stages.base import Dropped
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.normalise import Normalise

REAL = Path(__file__).parents[4] / "shared/data/koala"


def chat(*turns):
    return Conversation("s", "i", tuple(Turn(role, text, float(role != "user")) for role, text in turns))


def normalise(conversation, **options):
    """(texts, what was changed)"""
    ledger = Ledger()
    after = Normalise(options).conversation(conversation, ledger)
    assert [(t.role, t.weight) for t in after.turns] == [(t.role, t.weight) for t in conversation.turns]
    assert (after is conversation) == (not ledger.changed)
    return [turn.text for turn in after.turns], dict(ledger.changed)


def one(text, role="assistant", **options):
    (after,), changed = normalise(chat((role, text)), **options)
    return after, set(changed)


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    (
        ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne", {"line_ends"}),
        ("a\x00b\x1b[1;31mred\x1b[0m\x7f", "abred", {"control"}),
        ("if (a\u202e) {", "if (a) {", {"bidi"}),
        ("so\ufeffft\u200b hy\xadphen", "soft hyphen", {"zero_width"}),
        ("hid\U000e0041\U000e0042den", "hidden", {"control"}),
        ("Wales \U0001f3f4\U000e0067\U000e0062\U000e007f", "Wales \U0001f3f4\U000e0067\U000e0062\U000e007f", set()),
        ("family 👩\u200d👧, नमस्\u200dते", "family 👩\u200d👧, नमस्\u200dते", set()),
        ("word\u200djoiner, 中\u200c文, x\u200d👧", "wordjoiner, 中文, x👧", {"zero_width"}),
        ("5\xa0km\u202f!", "5 km !", {"no_break_space"}),
        ("schÃ¶n, â€œquotedâ€\x9d itâ€™s", "schön, “quoted” it’s", {"mojibake"}),
        ("voilÃ\xa0 le cafÃ©", "voilà le café", {"mojibake"}),
        ("“It’s” — café, naïve Ångström 3 × 4 ± 1", "“It’s” — café, naïve Ångström 3 × 4 ± 1", set()),
        ("，“全角”！ＡＢＣ１２３　段落……——", "，“全角”！ＡＢＣ１２３　段落……——", set()),
        ("o\ufb03ce \ufb01nd", "office find", {"ligatures"}),
        ("cafe\u0301", "café", {"nfc"}),
        ("a  \nb\t\n\n\n\n\n\nc \n", "a\nb\n\n\nc", {"trailing_spaces", "blank_lines"}),
        ("\n\n  Hello", "Hello", {"trailing_spaces"}),
        ("\n    indented code", "    indented code", {"trailing_spaces"}),
        ("plain text, 5 < 6 & 7 > 3, <b> is bold, &lt; is an entity", ..., set()),
        ("lost \ufffd for good", ..., set()),
    ),
)
def test_prose(before, after, changed):
    assert one(before) == (before if after is ... else after, changed)


@pytest.mark.parametrize(
    ("options", "before", "after", "changed"),
    (
        ({"repair": False}, "schÃ¶n o\ufb03ce", ..., set()),
        ({"nfc": False}, "cafe\u0301", ..., set()),
        ({"trailing_spaces": False}, " a \n b ", ..., set()),
        ({"max_blank_lines": 0}, "a\n\n\nb\nc", "a\nb\nc", {"blank_lines"}),
        ({"max_blank_lines": -1}, "a" + "\n" * 9 + "b", ..., set()),
        ({"entities": True}, "Q&amp;A &amp;amp;lt; 5 &euro; &nosuch; &#x4e2d;", "Q&A < 5 € &nosuch; 中", {"entities"}),
        ({"entities": True}, "&#" + "9" * 5000 + ";", ..., set()),
        ({"escaped_newlines": True}, r"\nOne.\n\n2. Two", "One.\n\n2. Two", {"escaped_newlines", "trailing_spaces"}),
        ({"escaped_newlines": True}, r"with \neq and \nabla", ..., set()),
        ({"escaped_newlines": True}, "real\nones, and '\\n'", ..., set()),
        ({"detokenise": True}, 'He said , " it \'s 5 % ( or so ) " .', 'He said, "it\'s 5% (or so)".', {"detokenised"}),
        ({"detokenise": True}, "I ca n't , wo n’t ! They 're 3 :)", "I can't, won’t! They're 3 :)", {"detokenised"}),
        ({"detokenise": True}, "[ see ] ( URL_0 ) cost $ 20 . . .", "[see](URL_0) cost $20...", {"detokenised"}),
        ({"detokenise": True}, 'a " b " and a .5 inch - wide 5 " pipe', ..., set()),
        ({"code": True}, "x = 'schÃ¶n'  \n\n\n\n\n    e\u0301 &amp; \n", ..., set()),
        ({"code": True}, "x\u202e = 1 \r\n", "x = 1 \n", {"bidi", "line_ends"}),
        ({"page_leftovers": True}, "2 / 3\n\nSure.", "Sure.", {"page_counter"}),
        ({"page_leftovers": True}, "2 / 3Sure.\nCopy12 chars / 3 words", "Sure.", {"page_counter", "trailing_spaces"}),
        ({"page_leftovers": True}, "Sure.\n\n12 chars / 3 words\nCopy", "Sure.", {"page_counter", "trailing_spaces"}),
        ({"page_leftovers": True}, "3 / 4 + 1 / 4 is 1", ..., set()),
        ({"page_leftovers": True}, "5 / 4\nis more than one", ..., set()),
        ({"page_leftovers": True}, "1 / 2", ..., set()),
        ({"page_leftovers": True}, "so:\n\npython\nCopy code\nx = 1", "so:\n\npython\n\nx = 1", {"copy_code"}),
        ({"page_leftovers": True}, "press Copy code to copy", ..., set()),
        ({"page_leftovers": True}, "```\npythonCopy code\nx_y = 1\n```", "```python\nx_y = 1\n```", {"copy_code"}),
        ({"page_leftovers": True}, "```\n\nbashCopy codels -l\ncd\n```", "```bash\nls -l\ncd\n```", {"copy_code"}),
        ({"page_leftovers": True}, "```c++Copy code\nint x;\n```", "```c++\nint x;\n```", {"copy_code"}),
        ({"page_leftovers": True}, "```python\nCopy code\nx\n```", "```python\nx\n```", {"copy_code"}),
        ({"page_leftovers": True}, "a\n```\nCopy code\n```\nb", "a\n\nb", {"copy_code"}),
        ({"page_leftovers": True}, '```html\n<button>Copy code</button>\n```', ..., set()),
        ({"page_leftovers": True}, "```\nCopy code to clipboard\n```", ..., set()),
        ({}, "2 / 3\n\nCopy code\nx", ..., set()),
    ),
)  # fmt: skip
def test_options(options, before, after, changed):
    assert one(before, **options) == (before if after is ... else after, changed)


@pytest.mark.parametrize(
    "code",
    (
        "```\nschÃ¶n  \n\n\n\n\n&amp; e\u0301 ' , '\n```",
        "~~~ python\nschÃ¶n\t\n~~~",
        "1. do\n\n   ```diff\n   \n   -a \n   ```",
        "> ```\n> schÃ¶n \n> ```",
        "```\nnever closed: schÃ¶n \nx",
        "say `schÃ¶n e\u0301 &amp; ( x )` now",
        "say ``a ` schÃ¶n`` now",
    ),
)
def test_code_is_left_alone(code):
    everything = {"entities": True, "detokenise": True, "page_leftovers": True, "escaped_newlines": True}
    assert one(code, **everything) == (code, set())
    prose = code.replace("`", "").replace("~", "")
    assert "mojibake" in one(prose, **everything)[1] or "trailing_spaces" in one(prose)[1]


def test_what_is_code():
    kinds = lambda text: [(piece.kind, piece.text) for piece in code_spans.pieces(text)]
    assert kinds("a `b` c") == [("prose", "a "), ("code", "`b`"), ("prose", " c")]
    assert kinds("a `b\n\nc` d") == [("prose", "a `b\n\nc` d")]  # another paragraph
    assert kinds("```x``` y") == [("code", "```x```"), ("prose", " y")]
    assert kinds("a\n````\n```\n````\nb") == [("prose", "a\n"), ("fence", "````\n```\n````"), ("prose", "\nb")]
    assert kinds("~~~\n```\n~~~") == [("fence", "~~~\n```\n~~~")]
    assert code_spans.prose("one `two` three\n```\nfour\n```") == "one  three\n"


@given(st.text("`~\n> x-1.", max_size=60))
def test_pieces_are_the_text(text):
    assert "".join(piece.text for piece in code_spans.pieces(text)) == text


def test_a_turn_of_nothing_drops_the_conversation():
    for text in ("\u200b\u202e", " \n\t", "\x00"):
        with pytest.raises(Dropped) as caught:
            normalise(chat(("user", "ask"), ("assistant", text)))
        assert (caught.value.reason, caught.value.turn) == ("empty_after_normalise", 2)
    sample = Sample(
        "i", (chat(("user", "\ufeff"), ("assistant", "tell")), chat(("user", "ask"), ("assistant", "tell")))
    )
    ledger = Ledger()
    assert len(Normalise({}).sample(sample, ledger).conversations) == 1
    assert (ledger.entered, ledger.left, ledger.dropped) == (2, 1, {"empty_after_normalise": 1})


def test_what_is_no_text_stays():
    call = '[{"name": "f",\u202e "arguments": {"a": "schÃ¶n  "}}] '
    conversation = chat(("user", "ask "), ("call", call), ("tool", "schÃ¶n"), ("assistant", "so"))
    assert normalise(conversation)[0] == ["ask", call, "schön", "so"]
    parts = chat(("text", "Q:  x "), ("special", "<|eos|>"), ("text", " A \n y\n"))
    assert normalise(parts)[0] == ["Q:  x ", "<|eos|>", " A\n y\n"]  # what is between the parts counts
    assert normalise(chat(("text", " A \n y\n")))[0] == ["A\n y"]


def test_a_comparison_of_the_same_answers_goes():
    answers = {"chosen": "It’s  fine", "rejected": "It\u200b’s  fine \n"}
    halves = [Conversation("s", f"i:{end}", chat(("user", "x"), ("assistant", a)).turns) for end, a in answers.items()]
    ledger = Ledger()
    assert Normalise({}).sample(Sample("i", tuple(halves)), ledger) is None
    assert (ledger.entered, ledger.left, ledger.dropped) == (2, 0, {"identical_pair": 2})
    assert Normalise({"trailing_spaces": False}).sample(Sample("i", tuple(halves)), Ledger()) is not None


def test_changes_are_counted_once_a_conversation():
    ledger = Ledger()
    Normalise({}).conversation(chat(("user", "a \nb"), ("assistant", "c \nd \ufffd")), ledger)
    assert (ledger.changed, ledger.seen) == ({"trailing_spaces": 1}, {"characters": {"U+FFFD": 1}})


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"trailing_space": True}, "did you mean 'trailing_spaces'"),
        ({"html": True}, 'html: found True; expected "page", "fragment" or False'),
        ({"nfc": 1}, "nfc: found 1; expected True or False"),
        ({"max_blank_lines": -2}, "max_blank_lines: found -2"),
        ({"chinese": "mandarin"}, "chinese: found 'mandarin'"),
    ),
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Normalise(options)


def test_chinese_without_opencc_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opencc", None)
    with pytest.raises(InputError, match="pip install opencc"):
        Normalise({"chinese": "simplified"})


def test_chinese_is_converted_by_words():
    pytest.importorskip("opencc")
    assert one("這裏的頭髮，皇后在後面。", chinese="simplified") == ("这里的头发，皇后在后面。", {"chinese"})
    assert one("这里的头发，皇后在后面。", chinese="traditional")[0] == "這裏的頭髮，皇后在後面。"


# --- twice is once ---

BITS = [
    *("`", "``", "```", "```python\n", "\n```\n", "~~~\n", "Copy code", "\nCopy code\n", "pythonCopy code", "1 / 2\n"),
    *('<div class="markdown prose">', '<div class="x whitespace-pre-wrap">', "</div>", "<p>", "</p>", "<ol>", "<li>"),
    *("</li></ol>", "<pre>", '<code class="language-c">', "</code></pre>", '<span class="katex">', "<annotation>"),
    *("</annotation>", "</span>", "<br>", "<!--", "-->", "<", ">", "&lt;", "&amp;", "&amp;lt;", "&#60;", "\\n"),
    *("é", "e\u0301", "\ufb01", "schÃ¶n", "â€™", "Ã", "Â ", "ï»¿", "\u1fef", "\u037e", "word", "Word", "中文，。"),
    *(' " ', ' "', " ,", " .", " n't", " 's", "( ", " )", "[ x ] ( URL_0 )", "Copy12 chars / 3 words"),
    *(
        " ",
        "\n",
        "\n\n\n\n",
        " \n",
        "\t\n",
        "\r",
        "\x85",
        "\xa0",
        "\xad",
        "\u200b",
        "\u200d",
        "\u202e",
        "\x1b[0m",
        "\x00",
    ),
]
TEXT = st.lists(st.one_of(st.sampled_from(BITS), st.text(max_size=3)), max_size=16).map("".join)
FLAGS = ("repair", "page_leftovers", "entities", "escaped_newlines", "detokenise", "nfc", "trailing_spaces")
OPTIONS = st.fixed_dictionaries(
    {flag: st.booleans() for flag in FLAGS}
    | {"html": st.sampled_from(["page", "fragment", False]), "max_blank_lines": st.integers(-1, 2)}
)
EVERYTHING = {
    "html": "fragment",
    "page_leftovers": True,
    "entities": True,
    "escaped_newlines": True,
    "detokenise": True,
}


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(TEXT, TEXT, OPTIONS)
def test_twice_is_once(asked, told, options):
    stage, ledger = Normalise(options), Ledger()
    try:
        once = stage.conversation(chat(("user", asked), ("assistant", told)), Ledger())
    except Dropped as dropped:
        assert dropped.reason == "empty_after_normalise"
        return
    assert stage.conversation(once, ledger) is once
    assert not ledger.changed


@pytest.mark.parametrize(
    "text",
    (
        "1 / 2\n1 / 2\nx",
        '1 / 2\n<div class="markdown prose"><p>x</p></div>',
        "&lt;div class='x'&gt;&#38;lt;",
        "\ufeff" + '<div class="markdown prose">x</div>',
        "` ï»¿ `` a ``` x",
    ),
)
def test_one_round_alone_would_not_do(text):
    """The control for the test above."""
    round_ = lambda text: Normalise(EVERYTHING).round(Turn("assistant", text, 1.0), True, set()).strip()
    unstable = round_(round_(text)) != round_(text)
    once = one(text, **EVERYTHING)[0]
    assert unstable and one(once, **EVERYTHING) == (once, set())


def test_what_never_settles_is_dropped():
    with pytest.raises(Dropped) as caught:
        one("1 / 2\n" * 20, page_leftovers=True)
    assert caught.value.reason == "no_stable_form"


# --- nothing is slow ---

UNITS = (
    "<", "<p>", "<li>", "<ul>", "<pre>", '<span class="katex">', "<button>", "<!--", "<a href='", "&", "&amp;", "&#1",
    " ", "\n", " \n", "x ", "`", "` `` ", "```\n", "```x\n````\n", '" ', " .", "( ", "\u200d", "\u0915\u200d", "\x1b[",
    "Ã©", "Ãƒ", "Copy code\n", "```\nCopy code", "1 chars / 1 words", "\\n", "- ", "e\u0301",
)  # fmt: skip


def seconds(function, text):
    start = time.process_time()
    function(text)
    return time.process_time() - start


def growth(function, unit, size=8_000):
    """How much longer four times the text takes; 4 if time is linear, 16 if it is quadratic."""
    short, long = ((unit * (n // len(unit) + 1))[:n] for n in (size, 4 * size))
    return min(seconds(function, long) for _ in range(2)) / max(min(seconds(function, short) for _ in range(2)), 1e-4)


def attempt(text):
    with contextlib.suppress(Dropped):
        one(text, **EVERYTHING)


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear(unit):
    for wrap in (str, lambda text: f'<div class="markdown prose">{text}</div>'):
        run = lambda text, wrap=wrap: attempt(wrap(text))
        assert growth(run, unit) < 9 or growth(run, unit) < 9  # once more, for a machine that was busy


def test_quadratic_time_would_be_seen():
    assert growth(lambda text: re.sub(r"[ \t]+$", "", text + "x", flags=re.MULTILINE), " ", 2000) > 9


def test_a_megabyte_of_one_character():
    for character in "< `":
        assert seconds(attempt, character * 10**6) < 20


# --- the short cut past ftfy ---

MOJIBAKE = sorted({character for character in BADNESS_RE.pattern if character > "\x7f"})


@settings(max_examples=700, deadline=None)
@given(st.text(st.sampled_from([*MOJIBAKE, *"aZ .\n", "中", "\x9d"]), max_size=7))
def test_whatever_ftfy_would_mend_is_shown_to_it(text):
    whole = ftfy.fix_text(text, characters._ENCODING_ALONE)
    assert characters.mended(text, set()) == whole.translate(characters._LIGATURES)


def test_the_short_cut_is_taken():
    clean = ("It’s “fine” — naïve café", "全角，“引号”。", "Привет, мир", "½ ± 3°")
    assert [bool(characters._SUSPECT.search(text)) for text in clean] == [False, False, True, False]


# --- real files ---


def rows(name):
    raw = gzip.decompress((REAL / name).read_bytes()).decode()
    return [json.loads(line) for line in raw.splitlines()] if "jsonl" in name else json.loads(raw)


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")
def test_answers_that_are_html_on_purpose_stay():
    """Of 2,017 answers of CodeAlpaca 100 or so are HTML without a fence; "fragment" would take some for a page."""
    answers = [row["output"] for row in rows("alpaca/code_alpaca_2k.json.gz") if row["output"].strip()]
    assert sum(answer.lstrip().startswith("<") for answer in answers) > 80
    assert not [answer for answer in answers if "html" in one(answer, page_leftovers=True)[1]]
    assert [answer for answer in answers if "html" in one(answer, html="fragment")[1]]  # the control


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")
def test_hc3_reads_as_written():
    questions = rows("hc3/hc3_en_native_subset.jsonl.gz")
    apart = re.compile(r"\w [.,?!](?: |$)| n't\b|\\n\\n")
    before = [answer for row in questions for answer in row["human_answers"] + row["chatgpt_answers"] if answer.strip()]
    after = [one(text, detokenise=True, escaped_newlines=True)[0] for text in random.Random(0).sample(before, 2000)]
    assert sum(bool(apart.search(text)) for text in before) > 0.7 * len(before)
    assert sum(bool(apart.search(text)) for text in after) < 0.005 * len(after)
    assert (
        detokenise.detokenised('It works. Don\'t: (really) "so" 5% [x](y)')
        == 'It works. Don\'t: (really) "so" 5% [x](y)'
    )
