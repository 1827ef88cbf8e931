"""How often cleaning is right, and how fast it is: languages, scripts, rules and stages on real texts.

    python benchmarks/cleaning.py --data=../shared/data             # ours
    python benchmarks/cleaning.py --data=../shared/data --peers     # and lingua, and OpenCC for traditional script

The peers live in an environment of their own: pip install lingua-language-detector opencc, beside the requirements.
Times are CPU seconds of one thread, the least of three.
"""

import collections
import csv
import gzip
import html
import io
import json
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from data_pipelines import sources
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.files.folder import Folder
from data_pipelines.preparing import settings
from data_pipelines.stages import chinese, language, refusals, repetition
from data_pipelines.stages.base import Stage
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.filter import ORIGINS, Filter
from data_pipelines.stages.normalise import Normalise
from data_pipelines.stages.read import Reader

DATA = flags.DEFINE_string("data", None, "folder of real data", required=True)
PEERS = flags.DEFINE_bool("peers", False, "measure lingua, and convert with OpenCC")

# Of the Universal Declaration of Human Rights in the corpus of NLTK: the file, and the language it is in.
DECLARATIONS = {
    "Afrikaans-Latin1": "af", "Arabic_Alarabia-Arabic": "ar", "Basque_Euskara-Latin1": "eu",
    "Bulgarian_Balgarski-Cyrillic": "bg", "Catalan-Latin1": "ca", "Chinese_Mandarin-UTF8": "zh",
    "Croatian_Hrvatski-UTF8": "hr", "Czech_Cesky-UTF8": "cs", "Danish_Dansk-Latin1": "da",
    "Dutch_Nederlands-Latin1": "nl", "English-Latin1": "en", "Esperanto-UTF8": "eo",
    "Estonian_Eesti-Latin1": "et", "Farsi_Persian-UTF8": "fa", "Finnish_Suomi-Latin1": "fi",
    "French_Francais-Latin1": "fr", "German_Deutsch-Latin1": "de", "Greek_Ellinika-UTF8": "el",
    "Hebrew_Ivrit-UTF8": "he", "Hindi_web-UTF8": "hi", "Hungarian_Magyar-UTF8": "hu",
    "Icelandic_Yslenska-Latin1": "is", "Indonesian-Latin1": "id", "Italian-Latin1": "it",
    "Japanese_Nihongo-UTF8": "ja", "Korean_Hankuko-UTF8": "ko", "Latvian-UTF8": "lv",
    "Norwegian_Norsk-Bokmal-Latin1": "no", "Polish-Latin2": "pl", "Portuguese_Portugues-Latin1": "pt",
    "Romanian_Romana-Latin2": "ro", "Russian-UTF8": "ru", "Serbian_Srpski-UTF8": "sr",
    "Slovak_Slovencina-Latin2": "sk", "Slovenian_Slovenscina-Latin2": "sl", "Spanish-Latin1": "es",
    "Swahili_Kiswahili-Latin1": "sw", "Swedish_Svenska-Latin1": "sv", "Turkish_Turkce-UTF8": "tr",
    "Ukrainian-UTF8": "uk", "Vietnamese-UTF8": "vi", "Welsh_Cymraeg-Latin1": "cy",
}  # fmt: skip
CODECS = {"Latin1": "latin-1", "Latin2": "latin2", "UTF8": "utf-8", "Arabic": "cp1256", "Cyrillic": "cp1251"}
DENSE = ("zh", "ja", "ko")  # a third of the letters say as much

Classify = Callable[[str], str]


def seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return max(min(times), 1e-9)


def rows(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()] if ".jsonl" in path.name else json.loads(text)


############################################# Languages ##############################################


def pieces(size: int) -> Iterator[tuple[str, str]]:
    """(language, text): the declaration cut into pieces of about `size` letters, 30 a language at most."""
    with zipfile.ZipFile(Path(DATA.value) / "pretrain/nltk_udhr/udhr.zip") as files:
        for name, code in DECLARATIONS.items():
            if f"udhr/{name}" not in files.namelist():
                continue
            raw = files.read(f"udhr/{name}").decode(CODECS[name.rpartition("-")[2]], "ignore")
            text, length = " ".join(raw.split()), size // 3 if code in DENSE else size
            for start in range(0, min(len(text) - length, 30 * length), length):
                yield code, text[start : start + length]


def identifiers() -> dict[str, Classify]:
    same = {"nb": "no", "nn": "no"}
    found: dict[str, Classify] = {
        "ours": lambda text: language.language([text]),
        "py3langid": lambda text: same.get(code := language._identifier().classify(text)[0], code),
    }
    if PEERS.value:
        from lingua import LanguageDetectorBuilder

        detector = LanguageDetectorBuilder.from_all_languages().with_preloaded_language_models().build()

        def lingua(text: str) -> str:
            guess = detector.detect_language_of(text)
            code = "und" if guess is None else guess.iso_code_639_1.name.lower()
            return same.get(code, code)

        found["lingua"] = lingua
    return found


def languages() -> None:
    print("\n| pieces of letters | by | right | undecided | Chinese right | ms |\n| --- " * 1 + "| --- " * 5 + "|")
    for size in (20, 50, 100, 200, 500):
        cut = list(pieces(size))
        for name, classify in identifiers().items():
            took = seconds(lambda classify=classify, cut=cut: [classify(text) for _, text in cut])
            verdicts = [(code, classify(text)) for code, text in cut]
            right = sum(code == said for code, said in verdicts) / len(verdicts)
            unsure = sum(said == "und" for _, said in verdicts) / len(verdicts)
            han = [said == "zh" for code, said in verdicts if code == "zh"]
            print(f"| {size} ({len(cut)}) | {name} | {right:.3f} | {unsure:.3f} | {sum(han)} of {len(han)} | "
                  f"{1000 * took / len(cut):.2f} |")  # fmt: skip
    print("\n| chats | by | called so | called something else |\n| --- | --- | --- | --- |")
    for file, code in (("alpaca_data_cleaned_1000", "en"), ("code_alpaca_2k", "en"), ("alpaca_zh_demo", "zh")):
        chats = [
            " ".join((r["instruction"], r["input"] or "", r["output"])) for r in rows(koala(f"alpaca/{file}.json.gz"))
        ]
        for name, classify in identifiers().items():
            said = collections.Counter(classify(text[:1000]) for text in chats)
            other = len(chats) - said[code] - said["und"]
            print(f"| {file}, {code} | {name} | {said[code] / len(chats):.4f} | {other / len(chats):.4f} |")


############################################### Texts ################################################


def koala(name: str) -> Path:
    return Path(DATA.value) / "koala" / name


def chinese_texts() -> dict[str, list[str]]:
    data = Path(DATA.value)
    poems: list[str] = []
    for path in sorted((data / "pretrain/chinese_poetry").glob("*.csv.gz")):
        text = gzip.decompress(path.read_bytes()).decode()
        poems += [row["内容"] for row in list(csv.DictReader(io.StringIO(text)))[:800]]
    return {
        "news": [row["text"] for row in rows(data / "eval/skywork/zh_general.jsonl.gz")],
        "Alpaca": [row["output"] for row in rows(koala("alpaca/alpaca_zh_demo.json.gz"))],
        "OASST": [row["output"] for row in rows(koala("sharegpt/oasst_sft_zh.json.gz"))],
        "poems": poems,
    }


def scripts() -> None:
    """By characters that tell, of texts cut to so many Han characters; OpenCC writes them in traditional script."""
    converted: dict[str, Callable[[str], str]] = {"as written": str}
    if PEERS.value:
        import opencc

        converted |= {name: opencc.OpenCC(name).convert for name in ("s2t", "s2tw", "s2hk")}
    print("\n| texts | Han characters | script | simplified | traditional | mixed | undecided |\n" + "| --- " * 7 + "|")
    for name, texts in chinese_texts().items():
        for size in (20, 50):
            cut = [text[:size] for whole in texts if len(text := "".join(chinese._HAN.findall(whole))) >= size]
            for script, convert in converted.items():
                said = collections.Counter(chinese.script(convert(text)) for text in cut)
                counts = " | ".join(str(said[verdict]) for verdict in ("simplified", "traditional", "mixed", None))
                print(f"| {name} | {size} ({len(cut)}) | {script} | {counts} |")


def rules() -> None:
    print("\n| documents | there | repeated | flaws of Chinese pages | boilerplate lines |\n" + "| --- " * 5 + "|")
    c4 = [row["text"] for row in rows(Path(DATA.value) / "pretrain/c4_demo/c4_demo.jsonl.gz")]
    for name, texts in {**chinese_texts(), "C4, English": c4}.items():
        long = [text for text in texts if len(repetition._WORD.findall(text)) >= repetition.WORDS]
        again = sum(repetition.repetition(text) is not None for text in long)
        flaws, lines = "", 0
        if "C4" not in name:
            found = (chinese.flaw(text, {**chinese.OPTIONS, "script": "simplified"}) for text in texts)
            flaws = ", ".join(f"{n} {why}" for why, n in collections.Counter(f[0] for f in found if f).most_common())
            lines = sum(chinese.is_boilerplate(line) for text in texts for line in text.split("\n"))
        print(f"| {name} | {len(texts)} | {again} of {len(long)} | {flaws} | {lines} |")


################################################ Speed ###############################################


def conversations(name: str) -> list[Conversation]:
    """Of a source as configs/data/koala.py has it."""
    patterns = {
        "sharegpt": ("sharegpt/*.json*", "!sharegpt/identity*", "!sharegpt/oasst_*", "!sharegpt/*toolcall*"),
        "hc3": ("hc3/*.jsonl*", "!hc3/hc3plus_*", "!hc3/upstream_*"),
        "alpaca": ("alpaca/*.json*", "!alpaca/seed_tasks*"),
    }.get(name, sources.load(name).PATTERNS)
    config = {"sources": {name: {"patterns": patterns}}, "stages": {}, "heldout": 0.0}
    reader = Reader(settings.plan(name, config, Folder(str(koala("")))), 200_000, False)
    return [c for samples, _ in reader.chunks() for sample in samples for c in sample.conversations]


def as_page(conversation: Conversation) -> Conversation:
    """With answers as the HTML of a chat page: paragraphs, and what is indented as a code block."""

    def page(text: str) -> str:
        parts = []
        for part in text.split("\n\n"):
            words = html.escape(part, quote=False)
            spans = re.sub(r"\b(\w+)\b", r'<span class="hljs-x">\1</span>', words)
            code = f'<pre><div class="x"><span>py</span><button>Copy code</button></div><code>{spans}</code></pre>'
            parts.append(code if "\n  " in part else f"<p>{words}</p>")
        return f'<div class="markdown prose">{"".join(parts)}</div>'

    turns = tuple(Turn(t.role, page(t.text), t.weight) if t.role == "assistant" else t for t in conversation.turns)
    return Conversation(conversation.source, conversation.id, turns)


def speed() -> None:
    print(
        "\n| source | conversations | characters each | stage | a second | characters a second |\n" + "| --- " * 6 + "|"
    )
    english = {"origins": ORIGINS, "languages": ("en",), "page_errors": True}
    stages: dict[str, Stage] = {
        "normalise": Normalise({}),
        "filter: origins": Filter({"origins": ORIGINS}),
        "filter as ShareGPT": Filter(english),
        "filter, refusals and lists": Filter({"refusals": "flag", "identity": "flag", "broken_lists": True}),
    }
    sets = {name: conversations(name) for name in ("sharegpt", "hc3", "oig", "alpaca", "hh_rlhf")}
    for name, chats in sets.items():
        own = (
            {"normalise, detokenise": Normalise({"detokenise": True, "escaped_newlines": True})}
            if name == "hc3"
            else {}
        )
        for stage, made in {**stages, **own}.items():
            show_speed(name, chats, stage, made)
    show_speed("HTML of alpaca", [as_page(c) for c in sets["alpaca"][:3000]], "normalise", stages["normalise"])
    news = [Conversation("s", "i", (Turn("text", text, 1.0),)) for text in chinese_texts()["news"]]
    show_speed("news", news, "normalise", stages["normalise"])
    show_speed("news", news, "filter: chinese", Filter({"languages": ("zh",), "chinese": {"script": "simplified"}}))
    show_speed("news", news, "filter: repetition", Filter({"repetition": True}))


def show_speed(name: str, chats: Sequence[Conversation], stage: str, made: Stage) -> None:
    samples = [Sample(str(i), (c,)) for i, c in enumerate(chats)]
    took = seconds(lambda: exhaust(made(samples, Ledger())))
    characters = sum(len(turn.text) for c in chats for turn in c.turns)
    print(f"| {name} | {len(chats):,} | {characters // len(chats):,} | {stage} | {len(chats) / took:,.0f} | "
          f"{characters / took:,.0f} |")  # fmt: skip


def exhaust(samples: Iterable[Sample]) -> None:
    collections.deque(samples, maxlen=0)


def answers() -> None:
    print(
        "\n| source | answers | refusals | calls itself an AI | conversations naming an origin |\n" + "| --- " * 5 + "|"
    )
    for name in ("sharegpt", "hc3", "oig", "alpaca", "hh_rlhf"):
        chats = conversations(name)
        said = [turn.text for c in chats for turn in c.turns if turn.role == "assistant"]
        declined = sum(refusals.refusal(text) is not None for text in said)
        itself = sum(refusals.identity(text) is not None for text in said)
        named = sum(any(o in t.text.lower() for t in c.turns for o in ORIGINS) for c in chats)
        print(f"| {name} | {len(said):,} | {declined} | {itself} | {named} of {len(chats):,} |")


def main(argv: list[str]) -> None:
    languages()
    scripts()
    rules()
    answers()
    speed()


if __name__ == "__main__":
    app.run(main)
