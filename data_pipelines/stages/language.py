"""Which language a text is in, by ISO 639 code, or "und" where that cannot be told.

Chinese is told by its script: a text is "zh" (Cantonese and Wu as well) if its Han characters, each of which counts
for HAN letters, are no fewer than its other letters, and "ja" if a tenth of them is kana. For the rest py3langid
decides (A. Barbaresi's fork of M. Lui and T. Baldwin, "langid.py", ACL 2012: naive Bayes on byte n-grams, 139
languages, 4 MB of model in the package, nothing to download). "und" is a text of fewer letters than are asked for,
one whose language is less than SURE by py3langid's own measure, and what is no language ("zxx").

Why py3langid and not lingua (all 75 languages, high accuracy), measured on the Universal Declaration of Human Rights
in 42 languages cut into pieces, and on chats (benchmarks/cleaning.py):

                                                      here     py3langid 0.4.0     lingua 2.1.1
    right, pieces of 100 letters                      0.960    0.983               0.984
    right, pieces of 200 letters                      0.988    0.984               0.975
    English taken for another language: Alpaca        0.002    0.002               0.008
    English taken for another language: CodeAlpaca    0.003    0.005               0.040
    Chinese, pieces of 200 letters                    30/30    25/30               30/30
    CPU per piece of 100 and of 500 letters, ms       0.1, 0.3 0.1, 0.2            3.0, 2.0
    CPU to load, s                                    0.6      0.6                 15

(What is missing here at 100 letters is undecided, not wrong.) The fastText model of CCNet and FineWeb, lid.176, would
have to be downloaded.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any

from data_pipelines.stages import code_spans

HAN = 3  # letters that a Han character stands for: a Chinese text has about a third of the letters of its translation
SURE = 0.3
_STRETCHES = 4

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa\uff66-\uff9d]")
_LETTER = re.compile(r"[^\W\d_]")
_ADDRESS = re.compile(r"https?://\S+")
_SAME = {"nb": "no", "nn": "no", "wuu": "zh", "yue": "zh", "zxx": "und"}


def language(texts: Iterable[str], min_letters: int = 30, looked_at: int = 400) -> str:
    """The language of the texts together, without code and addresses.

    Of longer ones `looked_at` characters are read, in stretches spread evenly over them. Below `min_letters` letters
    (a Han character is several) the language is "und".
    """
    text = _ADDRESS.sub("", "\n".join(map(code_spans.prose, texts)))
    if len(text) > looked_at:
        size = looked_at // _STRETCHES
        step = (len(text) - size) // (_STRETCHES - 1)
        text = "\n".join(text[i * step : i * step + size] for i in range(_STRETCHES))
    return _decided(text, min_letters)


def _decided(text: str, min_letters: int) -> str:
    han = kana = 0
    if not text.isascii():
        han, kana = len(_HAN.findall(text)), len(_KANA.findall(text))
    others = len(_LETTER.findall(text)) - han - kana
    if HAN * (han + kana) + others < min_letters:
        return "und"
    if HAN * (han + kana) >= others:
        return "ja" if 10 * kana > han + kana else "zh"
    found, sureness = _identifier().classify(text)
    return _SAME.get(found, found) if sureness >= SURE else "und"


@functools.cache
def _identifier() -> Any:
    """Loaded once in a process, on first use: half a second."""
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
