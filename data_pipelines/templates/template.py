"""Conversation -> token ids and loss weights, and the prompt for generation by the same path.

A template lays a conversation out as segments: special tokens by id, and texts that are tokenised one by one, each
with its loss weight. Headers, questions and bos weigh 0; an assistant's text and the token that ends it weigh what
the turn does; a document (the role "text") is `bos text eos` whatever the template, and one of several parts `bos part
part … eos`. Token ids (the role "ids") are these ids in any template, and nothing is added to them.

* `koala`: the format of Koala, as koala_data_pipeline writes it and EasyLM's TextProcessor reads it.
* `chat`: <|user|>question<|end|><|assistant|>answer<|end|>, for tokenizers that have these special tokens.
* `yuan`: question<sep>answer<eod>, the format of Yuan 2.0.
* `tokenizer`: the chat template that came with the tokenizer; or a .jinja file; or a jinja string.
* `text`: documents only.

Calls of tools, and a list of tools that may be called, are for templates of Hugging Face that write them; with any
other they are an error, since leaving them out would teach answers out of nothing.

Too long examples keep their beginning: everything after `max_length` ids is cut off, eos included.
"""

import abc
import dataclasses
import datetime
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.conversation import ANSWERS, SPECIAL, Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.templates.jinja_chat import ChatRenderer, ChatTemplateError, Rendered
from data_pipelines.token_ids import ROLE, read_ids
from data_pipelines.tokenizers.tokenizer import Ids, Span, Tokenizer
from data_pipelines.tool_calls import messages

CHAT = """\
{{ bos_token }}{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}
{{ raise_exception('template "chat" has no role ' ~ m.role) }}{% endif %}<|{{ m.role }}|>
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}
{%- else %}{{ m.content }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
# what KoalaTemplate lays out, as one text; SPACE: what a tokenizer puts before an answer that it sees on its own
KOALA = """\
{{ bos_token }}BEGINNING OF CONVERSATION:{% for m in messages %}
{%- if m.role == 'assistant' %} GPT:{% generation %}SPACE{{ m.content }}{{ eos_token }}{% endgeneration %}
{%- elif m.role in ('user', 'system') %}
{%- if loop.first or loop.previtem.role != 'assistant' %} {% endif %}
{%- if m.role == 'user' %}USER: {% endif %}{{ m.content }}
{%- else %}{{ raise_exception('template "koala" has no role ' ~ m.role) }}{% endif %}{% endfor %}
{%- if add_generation_prompt %} GPT:{% endif %}"""
_CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """ids int32[n]; weights float32[n], the loss weight of predicting token i; how many ids were cut off.

    Each id predicts the one after it, so the example takes n - 1 positions. With `targets` int32[n] it predicts
    targets[i] where it stands, with weights[i], and takes n positions (masked tokens).
    """

    ids: Ids
    weights: npt.NDArray[np.float32]
    cut: int = 0
    targets: Ids | None = None

    @property
    def positions(self) -> int:
        return len(self.ids) - (self.targets is None)

    def row(self) -> tuple[Ids, Ids, npt.NDArray[np.float32]]:
        """(inputs, targets, loss weights), each [positions]."""
        if self.targets is None:
            return self.ids[:-1], self.ids[1:], self.weights[1:]
        return self.ids, self.targets, self.weights


class Segment(NamedTuple):
    """A special token's id, a text or token ids int32[n], with its loss weight; `spans` (start, end, weight) in
    characters where only parts of a text carry loss. `continued` as in Tokenizer.encode_batch."""

    content: str | int | Ids
    weight: float = 0.0
    spans: tuple[Span, ...] = ()
    continued: bool = False


class Template(abc.ABC):
    """Encodes conversations. `stop_ids` end an answer; `fingerprint` changes with whatever changes the ids.

    max_length: longest example in ids (a row of T inputs holds T + 1). ignore_helpful: treat an answer marked
    unhelpful like any other, as preference objectives need; otherwise it gets its marker, or is an error where
    the template has none. takes_tools: whether a list of tools has a place in it.
    """

    takes_tools = False

    def __init__(self, tokenizer: Tokenizer, max_length: int | None, ignore_helpful: bool, source: str):
        if tokenizer.eos_id is None:
            raise InputError(f"{tokenizer.path}: found no end-of-text token; name it in tokenizer_config.json")
        self.tokenizer, self.max_length, self.ignore_helpful = tokenizer, max_length, ignore_helpful
        self._bos = [] if tokenizer.bos_id is None else [Segment(tokenizer.bos_id)]
        self._eos = tokenizer.eos_id
        identity = [
            type(self).__name__,
            source,
            max_length,
            ignore_helpful,
            tokenizer.fingerprint,
            self._bos,
            self._eos,
        ]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()

    @abc.abstractmethod
    def segments(self, turns: Sequence[Turn], *, prompt: bool, tools: str = "") -> list[Segment]:
        """Lays out a chat; with `prompt` up to where the assistant's next answer begins. `tools` as a conversation has
        them, only where the template takes them."""

    def encode(self, conversation: Conversation) -> Example | None:
        """The example, or None where no token that carries loss is left. Raises InputError naming the conversation."""
        return self.encode_many([conversation])[0]

    __call__ = encode

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Example | None]:
        """`encode` of each; one call of the tokenizer for all texts, each of them once."""
        layouts = [self._layout(conversation, prompt=False) for conversation in conversations]
        texts: tuple[dict[str, Any], dict[str, Any]] = {}, {}  # by whether they go on after something: text -> its ids
        spanned: tuple[dict[Any, Any], dict[Any, Any]] = {}, {}  # (text, spans) -> its ids, and the tokens of each span
        for content, _, spans, continued in itertools.chain.from_iterable(layouts):
            if spans:
                spanned[continued][content, spans] = None
            elif isinstance(content, str):
                texts[continued][content] = None
        for continued in (False, True):
            for wanted, tokenize in (
                (texts[continued], self.tokenizer.encode_batch),
                (spanned[continued], self.tokenizer.encode_within),
            ):
                if wanted:
                    wanted.update(zip(list(wanted), tokenize(list(wanted), continued=continued)))  # type: ignore[arg-type]
        return self._assemble(layouts, texts, spanned)

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """Ids that the assistant's next answer continues; of a document, its beginning without eos; of token ids, all
        of them."""
        if conversation.turns[-1].role in ANSWERS:
            raise InputError(f"{conversation.source}/{conversation.id}: a prompt cannot end with an assistant's turn")
        ids: list[int] = []
        for content, _, _, continued in self._layout(conversation, prompt=True):
            if isinstance(content, str):
                ids += self.tokenizer.encode(content, continued=continued)
            else:
                ids += [content] if isinstance(content, int) else content.tolist()
        return ids

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """eos and, where another special token ends an assistant's text, that one."""
        turns = (Turn("user", "a", 0.0), Turn("assistant", "b", 1.0))
        try:
            last = [content for content, weight, *_ in self.segments(turns, prompt=False) if weight][-1]
        except (ValueError, IndexError):
            return (self._eos,)
        return tuple(dict.fromkeys([self._eos, *([last] if isinstance(last, int) else [])]))

    def _layout(self, conversation: Conversation, prompt: bool) -> list[Segment]:
        turns = conversation.turns
        try:
            if any(turn.role == ROLE for turn in turns):
                return self._token_ids(turns)
            if any(turn.role in ("text", "special") for turn in turns):
                return self._document(turns, prompt)
            if conversation.tools and not self.takes_tools:
                raise InputError("found a list of tools, for which this template has no place")
            if self.ignore_helpful:
                turns = tuple(turn._replace(helpful=True) for turn in turns)
            return self.segments(turns, prompt=prompt, tools=conversation.tools)
        except ValueError as error:
            raise ChatTemplateError(f"{conversation.source}/{conversation.id}: {error}") from error

    def _document(self, turns: Sequence[Turn], prompt: bool) -> list[Segment]:
        parts = list(self._bos)
        for turn in turns:
            if turn.role == "text":
                parts.append(Segment(turn.text, turn.weight))
            elif turn.role != "special" or turn.text not in SPECIAL:
                raise InputError(
                    f'found {turn.role} {turn.text[:40]!r} in a document; expected parts of the role "text"'
                )
            elif turn.text == SPECIAL[1]:
                parts.append(Segment(self._eos, turn.weight))
            else:
                parts += [bos._replace(weight=turn.weight) for bos in self._bos]
        ended = turns[-1].role == "special" and turns[-1].text == SPECIAL[1]
        if prompt and ended:
            return parts[:-1]
        return parts if prompt or ended else [*parts, Segment(self._eos, turns[-1].weight)]

    def _token_ids(self, turns: Sequence[Turn]) -> list[Segment]:
        if others := sorted({turn.role for turn in turns} - {ROLE}):
            raise InputError(f"found turns of {' and '.join(others)} beside token ids; expected token ids alone")
        runs = [read_ids(turn.text) for turn in turns]
        largest, size = max(int(np.max(ids)) for ids in runs), self.tokenizer.vocab_size
        if largest >= size:
            expected = f"0 to {size - 1}, the ids of {self.tokenizer.path}: another tokenizer made these"
            raise InputError(f"found the token id {largest}; expected {expected}")
        return [Segment(ids, turn.weight) for ids, turn in zip(runs, turns)]

    def _assemble(
        self, layouts: Sequence[list[Segment]], texts: Sequence[Mapping[str, Ids]], spanned: Sequence[Mapping[Any, Any]]
    ) -> list[Example | None]:
        """The examples of layouts, all of whose segments are laid end to end first."""
        parts, weights, ends, within = list[Ids](), list[float](), list[int](), list[Span]()
        special: dict[int, Ids] = {}
        at = 0
        for layout in layouts:
            for content, weight, spans, continued in layout:
                if spans:
                    part, found = spanned[continued][content, spans]
                    within += [(at + first, at + last, each) for first, last, each in found]
                elif isinstance(content, str):
                    part = texts[continued][content]
                elif isinstance(content, int):
                    if content not in special:
                        special[content] = np.full(1, content, np.int32)
                    part = special[content]
                else:
                    part = content
                parts.append(part)
                weights.append(weight)
                at += len(part)
            ends.append(at)
        ids = np.concatenate([np.empty(0, np.int32), *parts])
        learned = np.repeat(np.array(weights, np.float32), list(map(len, parts)))
        for first, last, weight in within:
            learned[first:last] = weight
        return [self._example(ids[start:end], learned[start:end]) for start, end in itertools.pairwise([0, *ends])]

    def _example(self, ids: Ids, weights: npt.NDArray[np.float32]) -> Example | None:
        cut = 0 if self.max_length is None else max(0, len(ids) - self.max_length)
        ids, weights = ids[: len(ids) - cut], weights[: len(ids) - cut]
        return Example(ids.copy(), weights.copy(), cut) if weights[1:].any() else None


class TextTemplate(Template):
    """Documents only."""

    def segments(self, turns: Sequence[Turn], *, prompt: bool, tools: str = "") -> list[Segment]:
        raise InputError(f'found roles {[turn.role for turn in turns]}; template "text" takes one turn, role "text"')


class KoalaTemplate(Template):
    """`BEGINNING OF CONVERSATION: USER: question GPT:` answer eos `USER: question GPT:` answer eos …

    Each stretch in backquotes and each answer is tokenised on its own, so between "GPT:" and the answer there is
    no space but the one that sentencepiece puts before a segment. An unhelpful answer follows "An Unhelpful
    Answer:" in place of "GPT:"; generation always asks with "GPT:". Koala has no system turn: its text is put
    where it stands, at the beginning that is after "BEGINNING OF CONVERSATION: ". Questions after the last answer
    are left out of an example.
    """

    def segments(self, turns: Sequence[Turn], *, prompt: bool, tools: str = "") -> list[Segment]:
        segments = list(self._bos)
        field = ["BEGINNING OF CONVERSATION:"]
        for turn in turns:
            if turn.role == "assistant":
                field.append("GPT:" if turn.helpful else "An Unhelpful Answer:")
                answer, end = Segment(turn.text, turn.weight), Segment(self._eos, turn.weight)
                segments += [Segment(" ".join(field)), answer, end]
                field = []
            elif turn.role in ("user", "system"):
                field += ["USER:", turn.text] if turn.role == "user" else [turn.text]
            else:
                raise InputError(f'template "koala" has no role {turn.role!r}')
        return [*segments, Segment(" ".join([*field, "GPT:"]))] if prompt else segments


class YuanTemplate(Template):
    """`question<sep>answer<eod>`: how Yuan 2.0 is fine-tuned and asked (tools/preprocess_data_yuan.py and the `yuan2`
    conversation of FastChat).

    Earlier turns, and a system turn, are part of the question: all of them are joined by line breaks and tokenised
    together. The joint is "<n>" in FastChat; that is how Yuan's files spell a line break, and training turns it into
    one before tokenising. So only the last answer is learned. What carries loss is <sep>, the answer and <eod>, as
    with --sft-stage in the released training code. What that does besides is not copied: after an <eod> it learns
    everything up to the next <eod> if no <sep> comes before it, the question that a row's end cuts off included. (A
    document of the role "text" is learned as a whole here, too.)
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int | None, ignore_helpful: bool, source: str):
        if "<sep>" not in tokenizer.special_tokens:
            raise InputError(f'{tokenizer.path}: template "yuan" needs the special token <sep>, which it lacks')
        super().__init__(tokenizer, max_length, ignore_helpful, source)
        self._sep = tokenizer.special_tokens["<sep>"]

    def segments(self, turns: Sequence[Turn], *, prompt: bool, tools: str = "") -> list[Segment]:
        for turn in turns:
            if turn.role not in ("system", "user", "assistant"):
                raise InputError(f'template "yuan" has no role {turn.role!r}')
            if not turn.helpful:
                raise InputError('found an unhelpful answer; template "yuan" does not mark it')
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        last = len(turns) if prompt or not answers else answers[-1]
        question = Segment("\n".join(turn.text for turn in turns[:last]))
        if prompt or not answers:
            return [*self._bos, question, Segment(self._sep)]
        answer, weight = turns[last].text, turns[last].weight
        return [*self._bos, question, *(Segment(part, weight) for part in (self._sep, answer, self._eos))]


class JinjaTemplate(Template):
    """A Hugging Face chat template. Its own special tokens are ids, those that turns contain are plain text; the
    pieces between are tokenised one by one. With a tokenizer.json that gives the ids that Hugging Face gives for the
    whole string; with sentencepiece each piece begins with the space that sentencepiece puts before a segment.

    What carries loss is what `{% generation %}` surrounds (the n-th block has the weight of the n-th assistant's
    turn); a template without it serves for prompts, and encoding with it is an error. `strftime_now` exists only where
    `now` is given: today's date would give a resumed run other data.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str,
        max_length: int | None = None,
        ignore_helpful: bool = False,
        now: datetime.datetime | None = None,
    ):
        super().__init__(tokenizer, max_length, ignore_helpful, f"{source}{now or ''}")
        self._renderer = ChatRenderer(source, tokenizer.special_tokens, now=now)
        self._marks_unhelpful, self._writes_calls = "helpful" in source, "tool_calls" in source
        self.takes_tools = self._renderer.takes_tools
        names = {token_id: piece for piece, token_id in tokenizer.special_tokens.items()}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        self._variables = {key: names[value] for key, value in ids.items() if value is not None}

    def segments(self, turns: Sequence[Turn], *, prompt: bool, tools: str = "") -> list[Segment]:
        if not (prompt or self._renderer.has_generation):
            raise ChatTemplateError(
                "the chat template has no {% generation %} block, so nothing tells which tokens carry loss"
            )
        if not (self._marks_unhelpful or all(turn.helpful for turn in turns)):
            raise ChatTemplateError("found an unhelpful answer; this chat template does not mark it (no `helpful`)")
        if not self._writes_calls and any(turn.role == "call" for turn in turns):
            raise ChatTemplateError("found a call of a tool; this chat template does not write any (no `tool_calls`)")
        said, weights = messages(turns, self._marks_unhelpful)
        given = json.loads(tools) if tools else None
        rendered = self._renderer.render(said, given, add_generation_prompt=prompt, **self._variables)
        spans = [] if prompt else _weighted(rendered.spans, weights)
        text, plain = rendered.text, rendered.as_it_is
        segments, first = [], 0
        for start, end, special in self.tokenizer.split_special(text):
            while first < len(spans) and spans[first][1] <= start:
                first += 1
            last = first
            while last < len(spans) and spans[last][0] < end:
                last += 1
            if special is not None:
                segments.append(Segment(special, spans[first][2] if last > first else 0.0))
            elif content := text[start:end] if plain else rendered.clean(start, end):
                weight, parts = _learned(rendered, spans[first:last], start, end) if last > first else (0.0, ())
                segments.append(Segment(content, weight, parts, start > 0))
        return segments


def _weighted(spans: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[tuple[int, int, float]]:
    """Gives each generation block its turn's weight."""
    if len(spans) != len(weights):
        if len(set(weights)) > 1 or (not spans and any(weights)):
            raise ChatTemplateError(f"found {len(spans)} generation blocks for {len(weights)} turns of the assistant")
        weights = [*weights[:1]] * len(spans)
    return [(start, end, weight) for (start, end), weight in zip(spans, weights) if weight]


def _learned(rendered: Rendered, spans: Sequence[Span], start: int, end: int) -> tuple[float, tuple[Span, ...]]:
    """(weight, spans) of a Segment from `start` to `end`; `spans` are those that reach into it."""
    inside = [(max(a, start), min(b, end), weight) for a, b, weight in spans]
    if len(inside) == 1 and inside[0][:2] == (start, end):
        return inside[0][2], ()
    return 0.0, tuple([(rendered.position(start, a), rendered.position(start, b), weight) for a, b, weight in inside])


def load_template(
    name: str,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    ignore_helpful: bool = False,
    now: datetime.datetime | None = None,
) -> Template:
    """The template called `koala`, `yuan`, `chat`, `text` or `tokenizer`, a .jinja file, or a jinja string."""
    plain: dict[str, Callable[..., Template]] = {"koala": KoalaTemplate, "yuan": YuanTemplate, "text": TextTemplate}
    if name in plain:
        return plain[name](tokenizer, max_length, ignore_helpful, name)
    if name == "chat" and (missing := [piece for piece in _CHAT_TOKENS if piece not in tokenizer.special_tokens]):
        raise InputError(f'{tokenizer.path}: template "chat" needs special tokens that it lacks: {missing}')
    if name == "tokenizer" and tokenizer.chat_template is None:
        raise InputError(f"{tokenizer.path}: found no chat template (tokenizer_config.json, chat_template.jinja)")
    if (source := jinja_source(name, tokenizer)) is None:
        raise InputError(
            f"template: found {name!r}; expected koala, yuan, chat, text, tokenizer, a .jinja file or jinja text"
        )
    return JinjaTemplate(tokenizer, source, max_length, ignore_helpful, now)


def jinja_source(name: str, tokenizer: Tokenizer) -> str | None:
    """The jinja text of the template called so, for programs that know no others; None where it has none."""
    if name == "koala":
        alone = tokenizer.encode("answer")
        return KOALA.replace("SPACE", " " if tokenizer.encode("an answer")[-len(alone) :] == alone else "")
    if name.endswith(".jinja"):
        return Path(name).read_text("utf-8")
    if "{{" in name or "{%" in name:
        return name
    return {"chat": CHAT, "tokenizer": tokenizer.chat_template}.get(name)
