"""A few answers of the model in training: what a loss curve does not show."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from data_pipelines.conversation import Conversation
from data_pipelines.templates.template import Template
from data_pipelines.tokenizers.tokenizer import Tokenizer
from easylm_plus.inference.chat import Chatter
from easylm_plus.inference.generate import Generator
from easylm_plus.models.transformer import Transformer

LONGEST_PROMPT = 0.5  # of the model's length: longer questions are not sampled


def make_sampler(
    model: Transformer,
    tokenizer: Tokenizer,
    template: Template,
    heldout: dict[str, Any],
    count: int,
    max_new_tokens: int,
) -> Callable[[Any], dict[str, str]]:
    """A function (params) -> {"<source>": "question, answer and what was expected"}; greedy, `count` in all."""
    chosen = _questions(heldout, template, count, int(model.config.max_length * LONGEST_PROMPT))
    generator = Generator(model, None, template.stop_ids)

    def sampler(params: Any) -> dict[str, str]:
        if not chosen or jax.process_count() > 1:  # generation is a program of one process
            return {}
        generator.params = params
        chatter = Chatter(generator, tokenizer, template)
        asked = [dataclasses.replace(c, turns=c.turns[:-1]) for c in chosen]
        answers = chatter.reply(asked, max_new_tokens)
        return {
            f"{c.source}/{i}": f"{c.turns[-2].text}\n-> {answer}\n(expected: {c.turns[-1].text})"
            for i, (c, answer) in enumerate(zip(chosen, answers))
        }

    return sampler


def _questions(heldout: dict[str, Any], template: Template, count: int, longest: int) -> list[Conversation]:
    """Held-out conversations that end with an answer, from all sources in turn."""
    chosen: list[Conversation] = []
    for row in range(count):
        for source in heldout.values():
            if len(chosen) == count:
                return chosen
            if row < len(source) and _suits(source[row], template, longest):
                chosen.append(source[row])
    return chosen


def _suits(conversation: Conversation, template: Template, longest: int) -> bool:
    turns = conversation.turns
    if len(turns) < 2 or turns[-1].role != "assistant":
        return False
    return len(template.render_prompt(dataclasses.replace(conversation, turns=turns[:-1]))) <= longest
