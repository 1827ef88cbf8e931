"""From a conversation to the assistant's next answer. Evaluation and the terminal chat take this one path."""

from collections.abc import Iterator, Sequence

from data_pipelines.conversation import Conversation
from data_pipelines.templates.template import Template
from data_pipelines.tokenizers.tokenizer import StreamDecoder, Tokenizer
from easylm_plus.inference.generate import Generator
from easylm_plus.inference.sampling import GREEDY, Sampling


class Chatter:
    """Answers conversations with one model, its tokenizer and its template.

    Args:
      stop: texts that also end an answer, beside the template's end-of-turn token.
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer, template: Template, stop: Sequence[str] = ()):
        self.generator, self.tokenizer, self.template, self.stop = generator, tokenizer, template, tuple(stop)

    def reply(
        self,
        conversations: Sequence[Conversation],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        batch: int = 64,
    ) -> list[str]:
        """One answer a conversation, generated `batch` at a time."""
        prompts = [self.template.render_prompt(c) for c in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            # a last, smaller batch would compile anew; repeating a row is cheaper
            padded = rows + rows[:1] * (batch - len(rows)) if len(order) > batch else rows
            tokens = self.generator([prompts[i] for i in padded], max_new_tokens, sampling, seed + start)
            for i, row in zip(rows, tokens):
                answers[i] = self._cut(self.tokenizer.decode(row)).strip()
        return answers

    def stream(
        self, conversation: Conversation, max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of one answer as they are made; never half a character, never part of a stop text."""
        decoder, text, shown = StreamDecoder(self.tokenizer), "", 0
        hold = max((len(s) - 1 for s in self.stop), default=0)
        prompt = self.template.render_prompt(conversation)
        for token in self.generator.stream(prompt, max_new_tokens, sampling, seed):
            text += decoder.push(token)
            if (cut := self._cut(text)) != text:
                yield cut[shown:]
                return
            if len(text) - hold > shown:
                yield text[shown : len(text) - hold]
                shown = len(text) - hold
        yield self._cut(text + decoder.flush())[shown:]

    def _cut(self, text: str) -> str:
        ends = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        return text[: min(ends)] if ends else text
