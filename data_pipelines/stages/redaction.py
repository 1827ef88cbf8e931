"""Takes what identifies or admits somebody out of a text: addresses, numbers and keys of particular people.

What is taken out is replaced by a value that a standard reserves for documentation, where there is one, because such a
text reads as before and a model that learned it writes something harmless: email@example.com (RFC 2606), 192.0.2.1
(RFC 5737), 2001:db8::1 (RFC 3849), 555-0100 (the North American numbers for fiction). datatrove's PIIFormatter does so
for addresses. Nothing is reserved for the others, and a made-up key is one more key: they become <SECRET>, <CARD> and
<ID>, in the manner of StarCoder (Li et al. 2023, section 4). What is reserved or for everybody stays as it is:
example.com, private networks, 8.8.8.8, AWS's key that ends in EXAMPLE, card numbers for tests, numbers that are free of
charge (hotlines, which a chat model had better know).

Rules are narrow: a number is a phone number if it is written as one ("+44 20 …", "(212) 456-…") or called one, a card
number if it passes Luhn's check and is grouped or called one. A name or a street is not recognised at all; that takes
a model. So this is a floor, not a promise of anonymity.

Every pattern's repetitions are bounded or cannot overlap, so the time is linear in the text whatever it holds. What
comes out is a fixed point: redacting it again changes nothing.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

PLACEHOLDERS = {
    "secret": "<SECRET>",
    "email": "email@example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "card": "<CARD>",
    "cn_id": "<ID>",
    "cn_mobile": "555-0100",
    "phone": "555-0100",
}
ROUNDS = 4  # a replacement may bring two things together that were none apart

ASCII = re.ASCII  # letters of other scripts may stand right beside a number
Found = re.Match[str]


class Rule(NamedTuple):
    """What `pattern` finds is replaced if `holds`; its group "value", if it has one, alone. `hint` is quicker to look
    for, and occurs in every text in which there is something to find."""

    pattern: re.Pattern[str]
    holds: Callable[[Found], bool] = lambda found: True
    hint: re.Pattern[str] = re.compile("")


def redacted(text: str, kinds: Iterable[str], by: Mapping[str, str] = PLACEHOLDERS) -> tuple[str, Counter[str]]:
    """The text without what is of these kinds, and how many there were of each."""
    counts: Counter[str] = Counter()
    for _ in range(ROUNDS):
        before = text
        for kind in kinds:
            for rule in RULES[kind]:
                if rule.hint.search(text):
                    text, count = replaced(text, rule, by[kind])
                    counts[kind] += count
        if text == before:
            break
    return text, +counts


def replaced(text: str, rule: Rule, by: str) -> tuple[str, int]:
    parts: list[str] = []
    at = 0
    group = "value" if "value" in rule.pattern.groupindex else 0
    for found in rule.pattern.finditer(text):
        if found[group] != by and rule.holds(found):
            parts += (text[at : found.start(group)], by)
            at = found.end(group)
    return "".join([*parts, text[at:]]), len(parts) // 2


def before(found: Found, characters: int) -> str:
    return found.string[max(0, found.start() - characters) : found.start()]


# --- secrets ---

NAME = re.compile(
    r"(?i)(?:passw(?:or)?d|pwd|secret|credential|api[_-]?key|(?:access|auth|private|secret|account)[_-]?key|token)"
    r"[\"']?[ \t]{0,4}:?$"
)
KEYS = (  # what is in the keys that these issue, and in nothing else
    r"gh[pousr]_[A-Za-z0-9]{36,255}",  # GitHub
    r"github_pat_[A-Za-z0-9_]{22,255}",
    r"glpat-[A-Za-z0-9_-]{20,64}",  # GitLab
    r"xox[abeoprs]-[0-9]{6,}-[A-Za-z0-9-]{10,128}",  # Slack
    r"AIza[A-Za-z0-9_-]{35}",  # Google
    r"ya29\.[A-Za-z0-9_-]{20,255}",
    r"[rs]k_live_[A-Za-z0-9]{16,128}",  # Stripe
    r"npm_[A-Za-z0-9]{36}",
    r"hf_[A-Za-z]{34}",  # Hugging Face
    r"pypi-AgE[A-Za-z0-9_-]{50,255}",
    r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",  # SendGrid
    r"eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,2000}",  # JSON Web Token
    r"(?<=hooks\.slack\.com/services/)T[A-Z0-9]{6,16}/B[A-Z0-9]{6,16}/[A-Za-z0-9]{16,32}",
)
NO_SECRET = re.compile(
    r"(?i)your|my[_-]|example|sample|dummy|test|placeholder|change|replace|insert|redacted|secret|passw|xxx|\*\*\*|\.\.\.|"
    r"1234|abcd|env|config|get|input|token|hash|key|https?:|user|null|none|true|false|\$\{|^[$%&{@]"
)


def varied(value: str, bits: float = 3.5) -> bool:
    """Whether a text looks drawn at random: digits and letters, of an entropy of so many bits a character."""
    counts = Counter(value)
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())
    return entropy >= bits and any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


def random_value(found: Found) -> bool:
    return varied(found["value"]) and not NO_SECRET.search(found["value"])


def assigned(found: Found) -> bool:
    return random_value(found) and bool(NAME.search(before(found, 32)))


def password(found: Found) -> bool:
    return not NO_SECRET.search(found["value"])


def mixed_case(found: Found) -> bool:
    """Unlike "sk-toggleable__label"."""
    return sum(map(str.isdigit, found[0])) >= 3 and sum(map(str.isupper, found[0])) >= 3


SECRETS = (
    Rule(
        re.compile(
            r"(?<=PRIVATE KEY-----)(?P<value>(?:\\n|\s){1,8}(?:[A-Za-z-]{1,30}: [^\n]{0,200}(?:\\n|\n)){0,6}\s{0,8}"
            r"(?:[ \t]{0,16}[A-Za-z0-9+/=]{20,8192}[ \t]{0,16}(?:\\n|\r?\n|\Z|(?=-)))+"
            r"(?:[ \t]{0,16}[A-Za-z0-9+/=]{1,20}[ \t]{0,16}(?:\\n|\r?\n|(?=-)))?)"
        ),
        hint=re.compile("PRIVATE KEY-----"),
    ),
    Rule(re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(KEYS)})(?![A-Za-z0-9])")),
    Rule(
        re.compile(r"(?<![A-Za-z0-9])A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])"),
        lambda found: not found[0].endswith("EXAMPLE"),
        re.compile("A[KS]IA"),
    ),
    Rule(re.compile(r"(?<![A-Za-z0-9-])sk-[A-Za-z0-9_-]{20,255}(?![A-Za-z0-9])"), mixed_case, re.compile("sk-")),
    Rule(
        re.compile(r"[Bb]earer[ \t]{1,4}(?P<value>[A-Za-z0-9._~+/=-]{20,2000})"), random_value, re.compile("earer[ \t]")
    ),
    Rule(re.compile(r"://[^\s:@/]{0,64}:(?P<value>[^\s@/<>{}$*]{6,128})@(?=[A-Za-z0-9])"), password, re.compile("://")),
    Rule(
        re.compile(r"[=:>][ \t]{0,4}[\"']?(?P<value>[A-Za-z0-9_\-+/.~=@#$%^&*!]{11,199}[A-Za-z0-9_\-+/=@#$%^&*!])"),
        assigned,
    ),
)


# --- e-mail ---

RESERVED_DOMAINS = re.compile(r"(?i)(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost|local)$")
EXTENSIONS = (
    "png", "jpg", "jpeg", "gif", "svg", "webp", "bmp", "ico", "js", "ts", "jsx", "tsx", "css", "scss", "html", "htm",
    "json", "xml", "yml", "yaml", "txt", "pdf",
)  # fmt: skip
EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/-])[A-Za-z0-9_%+](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_%+-])?"
    r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24})(?![A-Za-z0-9]|[.-][A-Za-z0-9])"
)


def private_email(found: Found) -> bool:
    local, domain = found[0].split("@")
    end = domain.rpartition(".")[2].lower()
    return local.lower() != "git" and end not in EXTENSIONS and not RESERVED_DOMAINS.search(domain)


# --- addresses of machines ---

NOT_PUBLIC = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/3", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
)  # fmt: skip
KNOWN = (  # resolvers that everybody writes about
    "8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222", "208.67.220.220", "4.2.2.2",
    "114.114.114.114", "223.5.5.5", "2001:4860:4860::8888", "2001:4860:4860::8844", "2606:4700:4700::1111",
    "2606:4700:4700::1001",
)  # fmt: skip
NETWORKS = tuple(map(ipaddress.ip_network, NOT_PUBLIC))
RESOLVERS = frozenset(map(ipaddress.ip_address, KNOWN))
NUMBERED = re.compile(
    r"(?i)(?:version|ver\.?|v\.?|release|rev\.?|build|section|sec\.|chapter|clause|§|firmware|update)\s*$"
)
IPV4 = re.compile(
    r"(?<![\w.+-])(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?![\w-]|\.\w)", ASCII
)
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]|\.\w)", ASCII)


def public(found: Found) -> bool:
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return False
    return address not in RESOLVERS and not any(address in network for network in NETWORKS)


def public_v4(found: Found) -> bool:
    """Four digits are the number of a section or a version more often than of a machine."""
    return len(found[0]) > 7 and public(found) and not NUMBERED.search(before(found, 12))


# --- cards, identity cards ---

CARD = re.compile(
    r"(?<![\w.,$€£¥+-])(?<!\d )(?:\d{4}(?P<gap>[ -])\d{4}(?P=gap)\d{4}(?P=gap)\d{4}|\d{4}(?P<amex>[ -])\d{6}"
    r"(?P=amex)\d{5}|\d{13,19})(?![\w%]|[ .,-]\d)",
    ASCII,
)
BRANDS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})$|(?:5[1-5]|2[2-7])\d{14}$|3[47]\d{13}$|(?:6011|64[4-9]\d|65\d\d|62\d\d|35\d\d)\d{12}$"
)
CALLED_CARD = re.compile(r"(?i)card|visa|amex|american express|credit|debit|信用卡|银行卡|卡号")
TEST_CARDS = (
    "4111111111111111", "4242424242424242", "4012888888881881", "4000056655665556", "5555555555554444",
    "5105105105105100", "2223003122003222", "378282246310005", "371449635398431", "6011111111111117",
    "6011000990139424", "3530111333300000",
)  # fmt: skip


def card(found: Found) -> bool:
    digits = re.sub(r"\D", "", found[0])
    if not BRANDS.match(digits) or digits in TEST_CARDS or len(set(digits)) < 4:
        return False
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    luhn = (sum(doubled) + sum(map(int, digits[::-2]))) % 10 == 0
    return luhn and (len(digits) < len(found[0]) or bool(CALLED_CARD.search(before(found, 40))))


CN_ID = re.compile(
    r"(?<![\dA-Za-z])[1-8]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![\dA-Za-z])", ASCII
)
WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def cn_id(found: Found) -> bool:
    """GB 11643's check digit (ISO 7064, MOD 11-2)."""
    return "10X98765432"[sum(int(d) * w for d, w in zip(found[0], WEIGHTS)) % 11] == found[0][-1].upper()


# --- phones ---

DIGITS = re.compile(r"\d(?:[ .()\-\u2011]{0,2}\d){6}")  # as many as there must be
FICTION = re.compile(r"555\D?01\d\d$")
FREE_OF_CHARGE = re.compile(r"(?:\+?1\D)?\(?8(?:00|33|44|55|66|77|88)\D")  # the public's: hotlines, help desks
NO_PHONE = re.compile(r"(?i)(?:isbn|issn|doi|arxiv|pmid|[$€£¥]|no\.|#|\bid:?|version)[\s:]{0,3}$")
INTERNATIONAL = re.compile(
    r"(?<![\w+)\]}=*/^.-])(?<![\d)\]][ \n])(?<![\W_][A-Za-z] )\+[1-9]\d{0,2}(?:[ .\-\u2011]?\(?\d{1,5}\)?){1,6}"
    r"(?![\w%]|[.,-]\d|\s?[+*/=^])",
    ASCII,
)
AMERICAN = re.compile(
    r"(?<![\w.,$€£¥+/=*-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d(?P<gap>[.-]))[2-9]\d\d(?(gap)(?P=gap)|[.-])\d{4}"
    r"(?![\w%]|[.,/-]\d|\s?[*/=^])",
    ASCII,
)
NUMBER = re.compile(
    r"(?<![\w.,+-])(?P<value>\+?(?:\(\d{1,5}\)[ .-]?)?\d(?:[ .\-\u2011]?\d){5,14})(?![\w%]|[.,-]\d)", ASCII
)
CALLED = re.compile(
    r"(?i)(?:\b(?:tele)?phone|\bmobile|\bcell|\bfax|\btel\.?|\bwhatsapp|\bcall (?:me|us)|电话|手机|传真|联系方式)"
    r"(?: ?(?:numbers?|no\.?|#|号码?))?(?: (?:is|at|on|:))?[\s:：=]{0,2}[\"'(]?$",
    ASCII,
)
CN_MOBILE = re.compile(
    r"(?<![\w.,+/=-])(?:\+?86[ -]?)?1[3-9]\d(?P<gap>[ -]?)\d{4}(?P=gap)\d{4}(?![\w%]|[.,-]\d)", ASCII
)


def phone(found: Found) -> bool:
    digits = re.sub(r"\D", "", found[0])
    if not 7 <= len(digits) <= 15 or len(set(digits)) < 3 or FICTION.search(found[0]) or FREE_OF_CHARGE.match(found[0]):
        return False
    return not NO_PHONE.search(before(found, 12))


def international(found: Found) -> bool:
    digits = re.sub(r"\D", "", found[0])
    return len(digits) >= 9 and not digits.endswith("00000") and phone(found)


def called(found: Found) -> bool:
    return phone(found) and bool(CALLED.search(before(found, 40)))


RULES: dict[str, tuple[Rule, ...]] = {
    "secret": SECRETS,
    "email": (Rule(EMAIL, private_email, re.compile("@")),),
    "ipv4": (Rule(IPV4, public_v4, re.compile(r"\d\.\d{1,3}\.\d")),),
    "ipv6": (Rule(IPV6, public, re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:")),),
    "card": (Rule(CARD, card, DIGITS),),
    "cn_id": (Rule(CN_ID, cn_id, DIGITS),),
    "cn_mobile": (Rule(CN_MOBILE, phone, DIGITS),),
    "phone": (Rule(INTERNATIONAL, international, DIGITS), Rule(NUMBER, called, DIGITS), Rule(AMERICAN, phone, DIGITS)),
}
