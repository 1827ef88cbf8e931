"""HTML of chat pages to Markdown: as it was written, with its code as it was; and what is no page stays."""

import contextlib
import html
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.stages import chat_page, code_spans, html_markdown
from data_pipelines.stages.base import Dropped
from data_pipelines.stages.chunk import Ledger
from data_pipelines.stages.normalise import Normalise

DIV = '<div class="markdown prose w-full break-words dark:prose-invert light">'
BAR = (
    '<div class="flex items-center relative text-gray-200 bg-gray-800 px-4 py-2 text-xs font-sans justify-between '
    'rounded-t-md"><span>{}</span><button class="flex ml-auto gap-2"><svg stroke="currentColor" viewBox="0 0 24 24" '
    'height="1em" xmlns="http://www.w3.org/2000/svg"><path d="M16 4h2"></path><rect x="8"></rect></svg>Copy code'
    "</button></div>"
)
FORMULA = (
    '<span class="math math-{0}"><span class="katex{1}"><span class="katex-mathml"><math><semantics><mrow><mi>x</mi>'
    '</mrow><annotation encoding="application/x-tex">{2}</annotation></semantics></math></span><span class="katex-html"'
    ' aria-hidden="true"><span class="base"><span class="mord">x</span></span></span></span></span>'
)


def page(inner):
    return f"{DIV}{inner}</div>"


def coloured(code):
    """As highlight.js has it: every word in a span."""
    parts = re.split(r"(\w+)", code)
    return "".join(f'<span class="hljs-x">{p}</span>' if i % 2 else html.escape(p) for i, p in enumerate(parts))


def block(code, label="", language=""):
    kind = f" language-{language}" if language else ""
    body = f'<div class="p-4 overflow-y-auto"><code class="!whitespace-pre hljs{kind}">{coloured(code)}\n</code></div>'
    return f'<pre><div class="bg-black rounded-md mb-4">{BAR.format(label)}{body}</div></pre>'


def normalise(*turns, **options):
    ledger = Ledger()
    given = Conversation("s", "i", tuple(Turn(role, text, float(role == "assistant")) for role, text in turns))
    after = Normalise(options).conversation(given, ledger)
    return [turn.text for turn in after.turns], dict(ledger.changed)


def markdown(inner, **options):
    (text,), changed = normalise(("assistant", page(inner)), **options)
    assert changed["html"] == 1
    return text


@pytest.mark.parametrize(
    ("inner", "expected"),
    (
        ("<p>One</p><p>Two<br>lines &amp; more</p>", "One\n\nTwo\nlines & more"),
        ("<p>a_b * c_d <strong>bold</strong> <em>it</em> <code>x_y</code></p>", "a_b * c_d **bold** *it* `x_y`"),
        ("<h2>Head</h2><p>x</p><h3>Lower</h3>", "## Head\n\nx\n\n### Lower"),
        ("<ol><li><p>One</p></li><li><p>Two</p></li></ol>", "1. One\n2. Two"),
        ('<ol start="9"><li>Nine</li><li>Ten<ul><li>in</li></ul></li></ol>', "9. Nine\n10. Ten\n    - in"),
        ("<blockquote><p>said</p></blockquote>", "> said"),
        ('<p>See <a href="https://x.org/a_b" target="_new">this</a>.</p>', "See [this](https://x.org/a_b)."),
        ('<p><a href="javascript:alert(1)">no</a></p>', "no"),
        ("<table><thead><tr><th>A</th><th>B</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
         "| A | B |\n| --- | --- |\n| 1 | 2 |"),
        ("<p>Write <code>&lt;div&gt;</code> or &lt;p&gt;</p>", "Write `<div>` or <p>"),
        (f"<p>Let {FORMULA.format('inline', '', 'x_1 &lt; 2')} be</p>", "Let $x_1 < 2$ be"),
        (f"<p>{FORMULA.format('display', '-display', 'y^2')}</p>", "$$y^2$$"),
        ('<p><img src="https://x.org/a" alt="An a"> <img src="data:x" alt="b"></p>', "![An a](https://x.org/a) b"),
        (block("x_1 = 2", "python", "python"), "```python\nx_1 = 2\n```"),
        (block("ls", "", "bash"), "```bash\nls\n```"),
        (block("x", "objective-c"), "```objective-c\nx\n```"),
        (block("x"), "```\nx\n```"),
        ("<pre>plain\n  text</pre>", "```\nplain\n  text\n```"),
        (f"<ol><li><p>Do</p>{block('if x:', '', 'c')}</li><li>z</li></ol>", "1. Do\n\n   ```c\n   if x:\n   ```\n2. z"),
        ('<div class="flex"><button><svg></svg></button><span>2 / 3</span><button></button></div><p>Sure</p>', "Sure"),
        ("<p>Yes</p></div><div>Copy24 chars / 5 words", "Yes"),
        ("<p>1<!-- --> of<!-- --> 2</p>", "1 of 2"),
        ("<p>5 < 6 and <nosuch> stay</p>", "5 < 6 and stay"),
        ("<p>unclosed <strong>bold<p>next", "unclosed **bold\n\nnext**"),
        ("</p></li><p>closed too often</p></ul>", "closed too often"),
    ),
)  # fmt: skip
def test_pages(inner, expected):
    assert markdown(inner) == expected


BITS = ("x_1", "  ", "\t", "<div>", "&amp;", "`", "```", "*", "#", '"', "$", "\\", "é", "if", "\u200dz")
CODE = st.lists(st.lists(st.sampled_from(BITS)).map("".join), max_size=6).map("\n".join)


@settings(max_examples=200, deadline=None)
@given(CODE)
def test_code_comes_out_as_it_was(code):
    """Indentation, underscores, backticks, tags and entities: what stands in the fence is what stood on the page."""
    expected = code.strip("\n").rstrip()
    inner = f"<p>So:</p>{block(code, 'py', 'py')}<p>done_so</p>"
    if not expected.strip():
        return
    text = html_markdown.markdown(page(inner))
    (fence,) = [text[start:end] for start, end in code_spans.fences(text)]
    opening, *lines, closing = fence.split("\n")
    assert opening == f"{closing}py" and set(closing) == {"`"}
    assert "\n".join(lines) == expected


def test_the_published_way_would_fail_that():
    """The control: markdownify alone, without the rules for spans and underscores."""
    from markdownify import markdownify

    plain = markdownify(page(f"<p>a_b</p>{block('x_1 = 2', 'python', 'python')}"))
    assert r"a\_b" in plain and "pythonCopy code" in plain


@pytest.mark.parametrize(
    "text",
    (
        "Use <div> for blocks.",
        "<b>bold</b> is how you write it",
        "<div>hello</div>",
        '<div class="container"><p>Hello</p></div>',
        '<div class="whitespace-pre-wrap">a utility class of Tailwind</div>',
        "<html><body><p>page</p></body></html>",
        "<p>Hello</p>",
        "<table><tr><td>1</td></tr></table>",
        f"What is wrong with this?\n{page('<p>x</p>')}",
        f"{page('<p>x</p>')}\nWhat is wrong with this?",
        f"```html\n{page('<p>x</p>')}\n```",
        "<nooutput>",
        "<" * 1000,
    ),
)
def test_what_is_no_page_stays(text):
    for role in ("assistant", "user", "text"):
        assert normalise((role, text)) == ([text], {})


def test_a_question_is_a_page_only_in_a_dump():
    asked = '<div class="flex flex-col items-start gap-4 whitespace-pre-wrap">How do\n  I join &lt;b&gt;?<br>So</div>'
    assert normalise(("user", asked), ("assistant", "Like this")) == ([asked, "Like this"], {})
    both = normalise(("user", asked), ("assistant", page("<p>So</p>")))
    assert both == (["How do\n  I join <b>?\nSo", "So"], {"html": 1})


def test_fragments_are_asked_for():
    fragment = "<p>One</p><ol><li>a</li></ol>"
    assert normalise(("assistant", fragment)) == ([fragment], {})
    assert normalise(("assistant", fragment), html="fragment") == (["One\n\n1. a"], {"html": 1})
    for other in (
        "<p>One</p> and more",
        "<div>no paragraph</div>",
        "<html><p>x</p></html>",
        "<p>x</p><script></script>",
    ):
        assert normalise(("assistant", other), html="fragment") == ([other], {})
    assert normalise(("user", fragment), html="fragment") == ([fragment], {})
    assert normalise(("assistant", page("<p>x</p>")), html=False) == ([page("<p>x</p>")], {})


def test_a_page_in_a_page_is_shown_not_converted():
    inner = page("<p>x</p>")
    once = markdown(html.escape(inner))
    assert once == "\\" + inner
    assert normalise(("assistant", once)) == ([once], {})


@pytest.mark.parametrize(
    "inner", ("<blockquote>" * 61 + "x", "<ul><li>" * 31 + "x", "<br>" * 20_001, "<p>x</p>" * 20_001)
)
def test_too_large_a_page_is_dropped(inner):
    with pytest.raises(Dropped) as caught:
        markdown(inner)
    assert (caught.value.reason, caught.value.turn) == ("html_too_large", 1)


TAGS = ("<p>", "</p>", "<ul>", "<li>", "</ul>", "<pre>", "</pre>", "<code>", "<b", ">", "<!--", "-->", "<button>")
TAGS += ("</button>", "<span class='katex'>", "</span>", "&lt;", '"', "x ")


@given(st.lists(st.sampled_from(TAGS)))
def test_canonical_html_is_well_formed(parts):
    """Every element is closed in order, and no text but what was there is in it."""
    written = html_markdown.canonical("".join(parts))
    stack = []
    for closing, name in re.findall(r"<(/?)(\w+)[^<>]*>", re.sub(r"<(?:br|hr)>", "", written)):
        if closing:
            assert stack.pop() == name
        else:
            stack.append(name)
    assert not stack
    assert set(re.findall(r"<(\w+)", written)) <= {"p", "ul", "li", "pre", "code", "b"}


@pytest.mark.parametrize(
    "inner",
    (
        '<span class="katex">' * 40_000 + "</span>" * 40_000,
        f"<pre>{' ' * 400_000}! x<code>y</code></pre>",
        f"<pre><code class='{'language-' * 50_000}'>y</code></pre>",
        f"<a href={'x ' * 200_000}>y</a>",
        "<ol>" + "<li>x</li>" * 19_000 + "</ol>",
        "<table><thead>" + "<tr><td>x</td></tr>" * 9_000 + "</thead></table>",
        "<p>" * 50 + "x y " * 100_000 + "</p>" * 50,
    ),
)
def test_large_pages_take_seconds(inner):
    """Not hours, as in quadratic time; some are too large, and dropped."""
    start = time.process_time()
    with contextlib.suppress(Dropped):
        markdown(inner)
    assert time.process_time() - start < 20


def test_is_answer_looks_at_both_ends():
    assert chat_page.is_answer(f" \n{page('x')} ") and not chat_page.is_answer(page("x") + "!")
