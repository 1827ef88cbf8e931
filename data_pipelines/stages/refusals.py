"""Answers that decline, and answers in which the assistant says that it is a machine, in English and Chinese.

Both came into instruction data with the answers of ChatGPT, and a model learns them fast: to decline what it could
answer, and to say of itself what is true of another model. Published recipes leave them out by lists of phrases
(UltraChat as filtered for Zephyr, arXiv 2310.16944; the "unfiltered" copies of Vicuna's data). Lists catch what they
list: `refusal` wants an apology and "I cannot" at the start of the answer, `identity` the assistant speaking of itself
as an AI anywhere in it. Answers that only regret ("I'm sorry to hear that") or speak of AI in general are neither.
"""

import re

_START = 240  # characters in which an answer that declines says so

_AM = r"i(?:'m| am)"
_SORRY = (
    rf"(?:unfortunately|regrettably|sorry|i apologi[sz]e|(?:my )?apologies"
    rf"|{_AM} (?:so |very |really |truly |deeply )?(?:sorry|afraid))\b"
)
_REASON = r"(?:(?:that|as an?|since|because)\b[^.\n]{0,80}?,? )?"
_CANNOT = (
    r"(?:i (?:can ?not|can't|could ?n[o']t|won't|will not|must decline|do not have|don't have|do not feel comfortable)"
    rf"|{_AM} (?:just |only |still )?(?:not (?:able|allowed|programmed|capable|comfortable|going)|unable|incapable))\b"
)
_TASK = (
    r"(?:help|assist|provide|answer|fulfil|comply|engage|generate|create|write|give|offer|discuss)\b[^.\n]{0,40}?"
    r"\b(?:with|that|this|you|such|any|illegal|harmful|inappropriate|request)\b"
)
_ENGLISH = re.compile(
    rf"{_SORRY}[,.!:]?(?: but)?,? {_REASON}{_CANNOT}|(?:as an?\b[^.\n]{{0,60}}?, ?)?{_CANNOT} (?:to )?{_TASK}"
)
_CHINESE = re.compile(
    r"(?:很|非常|十分|真的)?(?:抱歉|对不起|不好意思|遗憾)[，,。！! ]{0,2}(?:但是?)?[^。\n]{0,24}?"
    r"(?:我|作为|本(?:AI|模型))[^。\n]{0,24}?(?:无法|不能|没有?办法|不会|没有(?:能力|权限)|做不到)"
)

_AI = r"(?:ai|a\.i\.|artificial intelligence|(?:large )?language model|chatbot|computer program)"
_SELF = re.compile(
    rf"\bas an? (?:\w+ )?{_AI}\b[^.,\n]{{0,30}}?,? (?:i|my)\b"
    rf"|\b{_AM} (?:just |only |merely |simply )?an? (?:\w+ )?{_AI}\b"
    r"|\bmy (?:knowledge cutoff|training data (?:only )?goes)\b"
)
_MACHINE = r"(?:大型?|大?规模)?(?:AI|人工智能|语言模型|聊天机器人|虚拟助手)"
_SELF_CHINESE = re.compile(
    rf"作为(?:一[个名位款种])?{_MACHINE}[^。，,\n]{{0,14}}[，,]? ?我"
    rf"|我(?:只|仅仅?)?是(?:一[个名位款种])?(?:由[^。，,\n]{{1,14}})?{_MACHINE}"
)


def refusal(answer: str) -> str | None:
    """What declines, for a person to read; None if nothing does."""
    start = answer[:_START].lstrip().replace("’", "'")
    found = _ENGLISH.match(start.lower()) or _CHINESE.match(start)
    return found[0] if found else None


def identity(answer: str) -> str | None:
    """Where the assistant calls itself an AI; None if it does nowhere."""
    answer = answer.replace("’", "'")
    found = _SELF.search(answer.lower()) or (None if answer.isascii() else _SELF_CHINESE.search(answer))
    return found[0] if found else None
