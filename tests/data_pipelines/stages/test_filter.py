"""Filtering: every rule drops what it is for, names the turn, and leaves alone what comes near."""

import collections
import gzip
import io
import json
import re
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.stages import filter as filters
from data_pipelines.stages import refusals
from data_pipelines.stages.base import Dropped
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.filter import ORIGINS, Filter
from data_pipelines.stages.language import language
from data_pipelines.stages.repetition import repetition

REAL = Path(__file__).parents[4] / "shared/data"

ENGLISH = "The cat sat on the mat and looked out of the window for most of the day."
GERMAN = "Die Katze saß auf der Matte und schaute den größten Teil des Tages aus dem Fenster."
CHINESE = "猫坐在垫子上，大部分时间都在看着窗外。"
ERROR = "Too many requests in 1 hour. Try again later."


def chat(*texts, roles=("user", "assistant")):
    return Conversation("s", "i", tuple(Turn(roles[i % len(roles)], text, 1.0) for i, text in enumerate(texts)))


def document(text):
    return chat(text, roles=("text",))


def filtered(conversation, **options):
    """The conversation, or (reason, turn)."""
    try:
        return Filter(options).conversation(conversation, Ledger())
    except Dropped as dropped:
        assert dropped.found
        return dropped.reason, dropped.turn


@pytest.mark.parametrize(
    ("options", "conversation", "outcome"),
    (
        ({}, chat("", "x", ERROR), None),
        ({"min_turns": 2}, chat("a"), ("too_few_turns", None)),
        ({"max_turns": 2}, chat("a", "b", "c"), ("too_many_turns", None)),
        ({"min_turns": 2, "max_turns": 2}, chat("a", "b"), None),
        ({"min_chars": 16}, chat("a" * 7, "b" * 8), ("too_short", None)),
        ({"min_chars": 16}, chat("a" * 8, "b" * 8), None),
        ({"max_chars": 5}, chat("abc", "def"), ("too_long", None)),
        ({"min_turn_chars": 2}, chat("ab", "c"), ("turn_too_short", 2)),
        ({"max_turn_chars": 2}, chat("abc", "c"), ("turn_too_long", 1)),
        ({"origins": ORIGINS}, chat("hi", "I am ChatGPT."), ("names_its_origin", 2)),
        ({"origins": ORIGINS}, chat("Is GPT-3 by OPEN AI?", "x"), ("names_its_origin", 1)),
        ({"origins": ORIGINS}, chat("an open aisle", "x"), ("names_its_origin", 1)),  # as Koala has it
        ({"origins": ORIGINS}, chat("an opening", "gpt"), None),
        ({"phrases": ("Vicuna",)}, chat("hi", "as VICUNA said"), ("phrase", 2)),
        ({"refusals": "drop"}, chat("hi", "I'm sorry, but I cannot help."), ("refusal", 2)),
        ({"refusals": "drop"}, chat("I'm sorry, but I cannot come.", "Fine."), None),
        ({"refusals": "flag"}, chat("hi", "I'm sorry, but I cannot help."), None),
        ({"identity": "drop"}, chat("hi", "Well, as an AI language model, I see."), ("ai_identity", 2)),
        ({"max_turn_chars": 5}, chat("abc", '[{"name": "f"}]', "def", roles=("user", "call", "tool")), None),
        ({"max_turn_chars": 5}, chat("abc", "f", "defdef", roles=("user", "call", "tool")), ("turn_too_long", 3)),
        ({"broken_lists": True}, chat("x", "So:\n1. a\n1. b"), ("broken_list", 2)),
        ({"broken_lists": True}, chat("x", "So:\n1. a\n2. b\n1. c\n2. d\n1. e"), None),
        ({"repeated_digits": True}, chat("x", "it is 7777777777"), ("repeated_digits", 2)),
        ({"repeated_digits": True}, chat("x", "`0x000000000000` and 11111111"), None),
        ({"languages": ("en",)}, chat(ENGLISH * 3, GERMAN), None),
        ({"languages": ("en",)}, chat("Frage", GERMAN), ("language", None)),
        ({"languages": ("en", "zh")}, chat("问", CHINESE), None),
        ({"languages": ("en",)}, chat("问", CHINESE), ("language", None)),
        ({"languages": ("en",)}, chat("Hola", "¿Qué tal?"), None),  # too short to tell
        ({"languages": ("en",)}, chat("ok", f"```\n# {GERMAN}\n```"), None),  # code
        ({"repetition": True}, document("the same line again and again\n" * 30), ("repetition", 1)),
        ({"repetition": True}, chat("x", "the same line again and again\n" * 30), None),
        ({"chinese": {}}, document(ENGLISH), ("not_chinese", 1)),
        ({"chinese": {}}, chat(ENGLISH, ENGLISH), None),
        ({"page_errors": True}, chat("a", "b", "c", ERROR, "d", "e"), chat("a", "b")),
        ({"page_errors": True}, chat("a", "b", "c", ERROR + " "), chat("a", "b")),
        ({"page_errors": True}, chat("a", ERROR), ("page_error", 2)),
        ({"page_errors": True}, chat("Why does it say " + ERROR, "It says " + ERROR), None),
    ),
)
def test_rules(options, conversation, outcome):
    assert filtered(conversation, **options) == (conversation if outcome is None else outcome)


def test_of_several_reasons_the_first_counts():
    conversation = chat(GERMAN, "ChatGPT")
    assert filtered(conversation, languages=("en",), origins=ORIGINS)[0] == "names_its_origin"
    assert filtered(conversation, languages=("en",))[0] == "language"


def test_tables():
    ledger = Ledger()
    stage = Filter({"languages": ("en",), "refusals": "flag", "identity": "flag"})
    for i, texts in enumerate(((ENGLISH, "As an AI, I like it."), (GERMAN, GERMAN), ("x", "Sorry, I can't."))):
        stage.sample(Sample(str(i), (chat(*texts),)), ledger)
    assert ledger.seen == {"refusals": {"ai_identity": 1, "refusal": 1}, "language": {"en": 1, "de": 1, "und": 1}}
    assert (ledger.entered, ledger.left, ledger.dropped) == (3, 2, {"language": 1})
    assert ledger.drops[0]["found"] == "de; expected en"


def test_only_what_stays_counts_as_changed():
    ledger = Ledger()
    stage = Filter({"page_errors": True, "languages": ("en",), "identity": "flag"})
    for i, text in enumerate((ENGLISH, GERMAN)):
        stage.sample(Sample(str(i), (chat(text, f"{text} As an AI, I agree.", text, ERROR),)), ledger)
    assert (ledger.changed, ledger.dropped) == ({"page_error": 1}, {"language": 1})
    assert ledger.seen["refusals"] == {"ai_identity": 1}


def test_a_pair_goes_as_a_whole():
    halves = tuple(
        Conversation("s", f"i:{end}", chat("x", text).turns) for end, text in (("chosen", "a"), ("rejected", "ChatGPT"))
    )
    ledger = Ledger()
    assert Filter({"origins": ORIGINS}).sample(Sample("i", halves), ledger) is None
    assert ledger.dropped == {"names_its_origin": 1, "other_half_of_pair": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"language": ("en",)}, "did you mean 'languages'"),
        ({"languages": "en"}, "languages: found 'en'; expected a list of texts"),
        ({"phrases": ("",)}, "phrases: found ('',)"),
        ({"refusals": True}, 'refusals: found True; expected "drop", "flag" or False'),
        ({"min_chars": -1}, "min_chars: found -1; expected a whole number or None"),
        ({"repetition": "gopher"}, "repetition: found 'gopher'; expected True or False"),
        ({"chinese": True}, "chinese: found True; expected its options"),
        ({"chinese": {"min_hann": 1}}, "chinese: found the key 'min_hann'"),
        ({"chinese": {"script": "han"}}, "chinese.script: found 'han'"),
        ({"chinese": {"min_han": "30 %"}}, "chinese.min_han: found '30 %'; expected a number"),
    ),
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Filter(options)


@given(st.lists(st.sampled_from(["\n1. ", "\n2. ", "1. ", "\n", "a2", "b", "\n1."])).map("".join))
def test_broken_lists_are_those_of_the_published_expression(text):
    assert filters._broken_list(text) == bool(re.search(r"\n1\. [^2]*\n1\. ", text))


# --- refusals ---


@pytest.mark.parametrize(
    ("answer", "declines", "itself"),
    (
        ("I'm sorry, but I cannot fulfil this request.", True, False),
        ("I’m sorry, but as an AI language model, I don’t have access to that.", True, True),
        ("Unfortunately, I am not able to provide that.", True, False),
        ("I apologize, but I can't help with that.", True, False),
        ("I cannot provide you with illegal content.", True, False),
        ("很抱歉，作为一个人工智能语言模型，我无法回答这个问题。", True, True),
        ("抱歉，我不能提供这样的信息。", True, False),
        ("我是一个由某公司训练的大型语言模型。", False, True),
        ("Hello! I'm an AI language model. How can I help?", False, True),
        ("I'm sorry to hear that. It must be hard.", False, False),
        ("Sorry about that! Here is the text.", False, False),
        ("I can't get enough of this film.", False, False),
        ("The letter says: I'm sorry, but I cannot attend.", False, False),
        ("As an air hostess, I fly. As an aide I work.", False, False),
        ("Language models such as AI assistants learn from text. He works as an AI researcher.", False, False),
        ("抱歉让您久等了，这是您要的菜谱。", False, False),
        ("人工智能可以作为一个工具。", False, False),
    ),
)
def test_refusals(answer, declines, itself):
    assert (refusals.refusal(answer) is not None, refusals.identity(answer) is not None) == (declines, itself)


# --- language ---


@pytest.mark.parametrize(
    ("text", "code"),
    (
        (ENGLISH, "en"),
        (GERMAN, "de"),
        (CHINESE, "zh"),
        ("Le chat était assis sur le tapis et regardait par la fenêtre toute la journée.", "fr"),
        ("El gato estaba sentado en la alfombra y miraba por la ventana todo el día.", "es"),
        ("Кошка сидела на коврике и большую часть дня смотрела в окно.", "ru"),
        ("고양이는 매트 위에 앉아 하루 종일 창밖을 바라보았습니다. 날씨가 좋았습니다.", "ko"),
        ("猫はマットの上に座って、一日中窓の外を眺めていました。", "ja"),
        ("貓坐在墊子上，大部分時間都在看著窗外。", "zh"),
        (f"请翻译：{ENGLISH[:30]} {CHINESE}", "zh"),
        ("ok", "und"),
        ("8 * 7 = 56, 9 * 6 = 54, 12345", "und"),
        ("", "und"),
        (f"```\n{GERMAN}\n```\n{ENGLISH}", "en"),
        ("https://example.org/die/katze/sitzt/auf/der/matte/und/schaut " + ENGLISH, "en"),
    ),
)
def test_language(text, code):
    assert language([text]) == code


def test_languages_can_be_counted_without_dropping_any():
    texts = ("Der Hund läuft schnell durch den großen, grünen Garten.", "The dog runs fast through the big garden.")
    ledger, counting = Ledger(), Filter({"languages": ("any",)})
    kept = [counting.conversation(document(text), ledger) for text in texts]
    assert [c.turns[0].text for c in kept] == list(texts) and ledger.seen["language"] == {"de": 1, "en": 1}
    assert filtered(document(texts[0]), languages=("en",)) == ("language", None)


def test_language_is_that_of_all_turns():
    assert language([ENGLISH, *[GERMAN] * 9]) == "de"  # most of it, though not its start
    assert language([ENGLISH, *[GERMAN] * 9], looked_at=10**6) == "de"
    assert language(["ja", "nein"], min_letters=2, looked_at=400) in ("de", "und")


# --- repetition ---


def test_repetition():
    words = [f"w{i}" for i in range(60)]
    assert repetition(" ".join(words)) is None
    assert repetition("spam " * 49) is None  # too short to judge
    assert "lines" in repetition("\n".join([" ".join(words), *["menu"] * 3, "x"]))
    assert "lines repeated in" in repetition("\n".join(["-".join(words)] * 2 + [str(i) for i in range(9)]))
    assert "paragraphs" in repetition("\n\n".join(["menu", "menu", "\n".join(words), "menu"]))
    assert "'of the' makes up" in repetition(" ".join(f"of the {w}" for w in words))
    sentence = "one two three four five six seven eight nine ten eleven"
    assert "5-grams" in repetition(" ".join([*words, sentence, "x", sentence, "y", sentence]))
    again = "今天天气很好我们去公园散步"
    varied = "".join(map(chr, range(0x4E00, 0x4E00 + 200)))
    assert repetition(varied) is None
    assert repetition(f"{varied}{again}一{again}二{again}三{again}四{again}") is not None


# --- real files ---

DECLARATIONS = {
    "English-Latin1": "en", "French_Francais-Latin1": "fr", "German_Deutsch-Latin1": "de", "Spanish-Latin1": "es",
    "Italian-Latin1": "it", "Portuguese_Portugues-Latin1": "pt", "Dutch_Nederlands-Latin1": "nl",
    "Swedish_Svenska-Latin1": "sv", "Finnish_Suomi-Latin1": "fi", "Polish-Latin2": "pl", "Czech-UTF8": "cs",
    "Russian-UTF8": "ru", "Greek_Ellinika-UTF8": "el", "Turkish_Turkce-UTF8": "tr", "Hebrew_Ivrit-UTF8": "he",
    "Japanese_Nihongo-UTF8": "ja", "Korean_Hankuko-UTF8": "ko", "Chinese_Mandarin-UTF8": "zh", "Vietnamese-UTF8": "vi",
}  # fmt: skip
CODECS = {"Latin1": "latin-1", "Latin2": "latin2", "UTF8": "utf-8"}

real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")


def declarations():
    """(language, text) of the Universal Declaration of Human Rights."""
    with zipfile.ZipFile(REAL / "pretrain/nltk_udhr/udhr.zip") as files:
        for name, code in DECLARATIONS.items():
            if f"udhr/{name}" in files.namelist():
                text = files.read(f"udhr/{name}").decode(CODECS[name.rpartition("-")[2]], "ignore")
                yield code, " ".join(text.split())


@pytest.mark.real_data
@real
def test_languages_of_the_declaration():
    """Pieces of about 200 Latin letters."""
    right, seen = collections.Counter(), collections.Counter()
    for code, text in declarations():
        size = 70 if code in ("zh", "ja", "ko") else 200
        for start in range(0, min(len(text) - size, 20 * size), size):
            right[code] += language([text[start : start + size]]) == code
            seen[code] += 1
    assert len(seen) > 12 and right.total() >= 0.98 * seen.total()
    assert right["en"] == seen["en"] and right["zh"] == seen["zh"]


@pytest.mark.real_data
@real
def test_hardly_any_english_chat_is_taken_for_another_language():
    raw = gzip.decompress((REAL / "koala/alpaca/alpaca_data_cleaned_1000.json.gz").read_bytes())
    found = collections.Counter(language([r["instruction"], r["input"], r["output"]]) for r in json.loads(raw))
    assert found["en"] + found["und"] >= 995


@pytest.mark.real_data
@real
def test_origins_on_real_chats():
    raw = gzip.decompress((REAL / "koala/sharegpt/fastchat_dummy_conversation.json.gz").read_bytes())
    chats = [chat(*(turn["value"] for turn in row["conversations"])) for row in json.load(io.BytesIO(raw))]
    naming = [c for c in chats if any(o in t.text.lower() for t in c.turns for o in ORIGINS)]
    gone = [c for c in chats if filtered(c, origins=ORIGINS) != c]
    assert 0 < len(gone) < len(chats) and gone == naming
