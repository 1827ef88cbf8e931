"""What names a person or opens a door is taken out; what only looks like it stays; in linear time, and once for all."""

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.redact import Redact
from data_pipelines.stages.redaction import PLACEHOLDERS, RULES, Rule, redacted

E, P, S, C = "email@example.com", "555-0100", "<SECRET>", "<CARD>"
ID, V4, V6 = "<ID>", "192.0.2.1", "2001:db8::1"
PEM = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"
RANDOM = "q7Zp2LxV9tRb4KwY8nHs3FdG6jMcA1eU5oWi"  # 36 letters and digits

TAKEN_OUT = [  # kind, text, what becomes of it
    ("email", "write to jane.doe@mail.uni-x.ac.uk.", f"write to {E}."),
    ("email", "<J_Doe+news@gmail.com>,a%b@x-y.io", f"<{E}>,{E}"),
    ("email", "联系我abc123@qq.com谢谢", f"联系我{E}谢谢"),
    ("email", "mailto:bob@corp.travel?subject=x", f"mailto:{E}?subject=x"),
    ("email", "x.html?name=Al&email=al@gmail.com&n=1", f"x.html?name=Al&email={E}&n=1"),
    ("email", "@user@mastodon.social", f"@{E}"),
    ("ipv4", "from 84.23.190.7:8080, 84.23.190.8", f"from {V4}:8080, {V4}"),
    ("ipv4", "ssh root@84.23.190.7/24.", f"ssh root@{V4}/24."),
    ("ipv4", "主机5.188.10.44连接", f"主机{V4}连接"),
    ("ipv6", "ping 2a02:8388:1602:6980::1f!", f"ping {V6}!"),
    ("ipv6", "[2400:cb00:2048:1:0:0:c629:d7a2]:443", f"[{V6}]:443"),
    ("phone", "Call +1 (212) 456-7890 now", f"Call {P} now"),
    ("phone", "+44 20 7946 0958, +49-89-636-48018", f"{P}, {P}"),
    ("phone", "电话：+86 10 8295 1332。", f"电话：{P}。"),
    ("phone", "(212) 456-7890 or 212.456.7890 or 1-212-456-7890", f"{P} or {P} or {P}"),
    ("phone", "Tel. 0161 496 0000", f"Tel. {P}"),
    ("phone", "my phone number is 4567890", f"my phone number is {P}"),
    ("phone", "Fax: 030 / 12, mobile: 0171-2345678", f"Fax: 030 / 12, mobile: {P}"),
    ("phone", "手机号码：13812345678", f"手机号码：{P}"),
    ("phone", "his cell phone number (346-3476)", f"his cell phone number ({P})"),
    ("cn_mobile", "微信 13812345678，或 138-1234-5678", f"微信 {P}，或 {P}"),
    ("cn_id", "身份证11010519491231002X。", f"身份证{ID}。"),
    ("cn_id", "440524188001010014", None),  # born in 1880
    ("card", "4539 1488 0343 6467 exp 12/27", f"{C} exp 12/27"),
    ("card", "5425-2334-3010-9903", C),
    ("card", "3782 822463 10014", None),  # not by Luhn
    ("card", "amex 3714 496353 98432 and 3700 000000 00002", f"amex 3714 496353 98432 and {C}"),
    ("card", "credit card number: 4539148803436467", f"credit card number: {C}"),
    ("secret", "AWS AKIAQ3EGRTUV7WXYZ2AB", f"AWS {S}"),
    ("secret", f"token=ghp_{RANDOM}", f"token={S}"),
    ("secret", f"github_pat_11ABCDEFG0{RANDOM}", S),
    ("secret", "sk-proj-a9Bc8De7Fg6Hi5Jk4Lm3No2Pq1", S),
    ("secret", "OPENAI: sk-T3BlbkFJ7Qw9Er2Ty5Ui8Op1As4Df6Gh0Jk3Lz", f"OPENAI: {S}"),
    ("secret", "xoxb-263594206564-FGqddMF8t08v8N7Oq4i57vs1", S),
    ("secret", "key AIzaSyB3x7Kq9Lm2Np4Qr6St8Uv0Wx1Yz3Ab5Cd!", f"key {S}!"),
    ("secret", f"sk_live_{RANDOM[:24]} npm_{RANDOM}", f"{S} {S}"),
    ("secret", f"Authorization: Bearer {JWT}", f"Authorization: Bearer {S}"),
    ("secret", f"curl -H 'Authorization: Bearer {RANDOM}'", f"curl -H 'Authorization: Bearer {S}'"),
    ("secret", f'AWS_SECRET_ACCESS_KEY="{RANDOM}/+xY"', f'AWS_SECRET_ACCESS_KEY="{S}"'),
    ("secret", '{"db_password": "x9K#mP2$vL7q"}', f'{{"db_password": "{S}"}}'),
    ("secret", "apiKey: 'q7Zp2LxV9tRb4KwY',", f"apiKey: '{S}',"),
    ("secret", "your new password: A1b2C3d4E5f6.", f"your new password: {S}."),
    ("secret", "postgres://app:Tr0ub4dor3@db.x.net/y", f"postgres://app:{S}@db.x.net/y"),
    (
        "secret",
        f"-----BEGIN RSA PRIVATE KEY-----\n{PEM}\n{PEM}\nab==\n-----END RSA PRIVATE KEY-----\nDone.",
        f"-----BEGIN RSA PRIVATE KEY-----{S}-----END RSA PRIVATE KEY-----\nDone.",
    ),
    ("secret", f"-----BEGIN PRIVATE KEY-----\\n{PEM}\\n-----END", f"-----BEGIN PRIVATE KEY-----{S}-----END"),
    ("secret", f"BEGIN PRIVATE KEY-----\n{PEM}", f"BEGIN PRIVATE KEY-----{S}"),  # cut off
    (
        "secret",
        f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: DES,1F\n\n{PEM}\n-----END RSA",
        f"-----BEGIN RSA PRIVATE KEY-----{S}-----END RSA",
    ),
]

LEFT = [  # kind, texts that stay
    ("email", "jane@example.com, x@mail.example.org, root@localhost, a@b.test, q@host.invalid"),
    ("email", "git@github.com:user/repo.git; icon@2x.png; a @ b.com; x@y; @app.route; lodash@4.17.21"),
    ("email", "A@B.T and foo@bar..com and $@"),
    ("ipv4", "127.0.0.1, 10.1.2.3, 192.168.0.1, 172.16.5.4, 169.254.1.1, 0.0.0.0, 255.255.255.0, 203.0.113.9"),
    ("ipv4", "8.8.8.8 and 1.1.1.1, 114.114.114.114"),
    ("ipv4", "1.2.3.4 Scope, version 17.10.22.5, v17.10.22.5, firmware 84.23.190.7, section 12.10.3.11"),
    ("ipv4", "256.1.1.12, 84.23.190, 84.23.190.7.9, 84.23.190.7a, 184.023.190.7, 1,84.23.190.7-rc"),
    ("ipv6", "std::vector<a::b>, 12:30:45, 00:1a:2b:3c:4d:5e, ::1, fe80::1, 2001:db8::5, 2001:4860:4860::8888"),
    ("phone", "ISBN 978-0-306-40615-7, ISBN 0-306-40615-2, ISSN 2049-3630, doi: 10.1000/182"),
    ("phone", "2023-05-17, 17.05.2023, 12:30:45, 1999-2004, 2021-09-01T10:00:00"),
    ("phone", "$200-300-4000, 1,234,567,890, 3.14159265358979, 1e10, 100%, €212.456.7890"),
    ("phone", "x = 5 +1234567890, 472547338\n+960397912423686\n-------, (a)+1234567890, 2+4412345678"),
    ("phone", "555-0100, (212) 555-0123, +1-800-273-8255, 1-800-222-1222, 888-736-9466"),
    ("phone", "version 212.456.7890, order #212-456-7890, id: 212-456-7890, 123456789012, 192.168.1.1"),
    ("phone", "212-456-789, 112-456-7890, 212-156-7890, 212-456-78901, 12-456-7890 x"),
    ("phone", "so x +1234567890 y; The telephone was invented in 1876 and 1877; call 911; +0.25, +100000000, +12345"),
    ("phone", "213-484-0480/3, 9212-456-7890, 212-456-7890-1, (212) 456-7890 * 2"),
    ("cn_mobile", "12812345678, 138123456789, 1381234567, 0.13812345678, 13812345678.5"),
    ("cn_id", "110105194912310021, 110105194913310020, 11010519491231002, 1101051949123100201"),
    ("card", "4111 1111 1111 1111, 4242424242424242, 5555-5555-5555-4444, 378282246310005"),
    ("card", "4539148803436467 is a number, 4539 1488 0343 6468, 1234 5678 9012 3456, 0000 0000 0000 0000"),
    ("card", "978 0 306 40615 7, 4539 1488-0343 6467, 4,539,148,803,436,467, 4539 1488 0343 6467 0"),
    ("secret", "AKIAIOSFODNN7EXAMPLE, AKIA, ghp_short, sk-toggleable__label-arrow, sk-learn"),
    ("secret", "password = input('Password: '), PASSWORD=os.environ['DB'], api_key: YOUR_API_KEY_HERE_12345"),
    ("secret", 'password: hunter2, password="correct horse", token = tokenizer.encode_plus1(text)'),
    ("secret", "secret=${SECRET_KEY_32}, api_key={{ api_key_v2_long }}, passwd: ************1a, pwd=/home/user/x"),
    ("secret", "-----BEGIN PUBLIC KEY-----\n" + PEM + "\n-----END PUBLIC KEY-----"),
    ("secret", "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----, as in PEM"),
    ("secret", "https://user@host.com/x:y@z, http://host:8080/@scope, https://a:b@c"),
    ("secret", "sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08, eyJhbGciOiJIUzI1NiJ9"),
]


@pytest.mark.parametrize("kind, text, expected", TAKEN_OUT)
def test_taken_out(kind, text, expected):
    expected = text if expected is None else expected
    found, counts = redacted(text, (kind,))
    assert found == expected
    assert set(counts) == ({kind} if expected != text else set())
    assert redacted(found, RULES)[0] == found


@pytest.mark.parametrize("kind, texts", LEFT)
def test_left(kind, texts):
    assert redacted(texts, (kind,)) == (texts, {})


def test_the_tables_are_long_enough():
    assert len(TAKEN_OUT) + sum(texts.count(", ") + 1 for _, texts in LEFT) > 120
    assert {kind for kind, *_ in TAKEN_OUT} == {kind for kind, _ in LEFT} == set(RULES)


def test_the_numbers_that_decide_are_checked():
    """A wrong digit makes a card or an identity number an ordinary number."""
    for kind, number in (("card", "4539 1488 0343 6467"), ("cn_id", "11010519491231002X")):
        assert redacted(number, (kind,))[1] == {kind: 1}
        for i, digit in enumerate(number):
            if digit.isdigit():
                other = number[:i] + str((int(digit) + 1) % 10) + number[i + 1 :]
                assert redacted(other, (kind,))[1] == {}


ADVERSARIAL = [
    "a@", "a@a.", "@", "a.", "a-", "1", "1 ", "1-", "1.", "(1)", "+1 ", "1.1.1.1.", "2001:", ":", "::", "212-", "4539 ",
    "4539148803436467", "password=", "password: '", "token", "sk-", "sk-aB3", "ghp_aB3", "Bearer ", "://a:", "://a:b@",
    "-----BEGIN PRIVATE KEY-----\n", "-----BEGIN PRIVATE KEY-----\nA: b\n", "PRIVATE KEY-----\n" + "A" * 64 + "\n",
    "A", "A\n", "eyJ", "eyJhbGciOiJIUzI1NiJ9.", "AIza", "xoxb-123456-", "tel ", "phone: ", "phone 1 (2) ", "\\n", "=",
    "='a1", " ", "\n", "é", "电话", "a@" + "b." * 9, "x" * 63 + ".", "1381234", "84.23.190.7,",
]  # fmt: skip


def is_linear(text):
    """Eight times the text takes about eight times as long, and would take 64 times if it were quadratic."""

    def seconds(text):
        start = time.process_time()
        redacted(text, RULES)
        return time.process_time() - start

    whole = seconds(text)
    return whole < 0.1 or whole < 3 * 8 * seconds(text[: len(text) // 8])


@pytest.mark.parametrize("unit", ADVERSARIAL)
def test_the_time_is_linear(unit):
    size = 1_000_000 if unit in ("a@", "1", "1-", "A") else 160_000
    assert is_linear(unit * (size // len(unit)))


def test_a_pattern_that_is_not_linear_is_noticed(monkeypatch):
    monkeypatch.setitem(RULES, "email", (Rule(re.compile(r"[a-z.]+@[a-z]+\.[a-z]+")),))
    assert not is_linear("a" * 40_000)


PIECES = st.sampled_from(
    [*ADVERSARIAL, *(text for _, text, _ in TAKEN_OUT), *(text for _, text in LEFT), *PLACEHOLDERS.values()]
)


@given(st.lists(st.one_of(PIECES, st.text("0123456789 .-+()@:ab", max_size=12)), max_size=8).map("".join))
@settings(max_examples=400, deadline=None)
def test_redacting_again_changes_nothing(text):
    once, _ = redacted(text, RULES)
    assert redacted(once, RULES) == (once, {})


def test_the_stage():
    stage, ledger = Redact({}), Ledger()
    turns = (
        Turn("user", "I am joe@x.org, joe@y.org, +44 20 7946 0958", 0.0),
        Turn("assistant", "Hello. Your IP is 84.23.190.7; joe@x.org", 0.5, False),
    )
    plain = Conversation("s", "b", (Turn("text", "Nothing here.", 1.0),))
    joe, same = stage([Sample("a", (Conversation("s", "a", turns),)), Sample("b", (plain,))], ledger)
    assert [list(t) for t in joe.conversations[0].turns] == [
        ["user", f"I am {E}, {E}, {P}", 0.0, True],
        ["assistant", f"Hello. Your IP is {V4}; {E}", 0.5, False],
    ]
    assert same.conversations[0] is plain
    assert ledger.changed == {"redacted_email": 1, "redacted_phone": 1, "redacted_ipv4": 1}  # conversations
    assert (ledger.entered, ledger.left, ledger.dropped) == (2, 2, {})


def test_the_options_of_the_stage():
    def after(text, **options):
        conversation = Conversation("s", "a", (Turn("text", text, 1.0),))
        return Redact(options).conversation(conversation, Ledger()).turns[0].text

    text = "joe@x.org 84.23.190.7 13812345678"
    assert after(text) == f"{E} {V4} 13812345678"
    assert after(text, kinds=("email", "cn_mobile")) == f"{E} 84.23.190.7 {P}"
    assert after(text, placeholders={"email": "<EMAIL>"}) == f"<EMAIL> {V4} 13812345678"
    for options, message in (
        ({"kinds": ("mail",)}, "kinds: found 'mail'; expected one of secret, email"),
        ({"placeholders": {"mail": "x"}}, "placeholders: found 'mail'"),
        ({"placeholders": {"email": "me@mine.org"}}, "placeholders.email: found 'me@mine.org'"),
    ):
        with pytest.raises(InputError, match=message):
            Redact(options)


def test_prose_is_left_alone():
    draw = random.Random(0)
    words = [
        "price",
        "of",
        "1,200",
        "in",
        "1999",
        "(see",
        "p. 12)",
        "x=3",
        "a:b",
        "10-12",
        "3.5",
        "e.g.",
        "U.S.",
        "@",
        "100%",
    ]
    for _ in range(200):
        text = " ".join(draw.choices(words, k=80))
        assert redacted(text, RULES) == (text, {})
