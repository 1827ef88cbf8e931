"""What is learned from a text beyond the next token of it: fill in the middle, masked spans, masked tokens.

A TextObjective stands where a Template does. It encodes draws, not conversations: the same document is cut or masked
in another way in every epoch. The random numbers of a draw are a function of (seed, source, epoch, example), see
`mixture.draw_rng`, so that the stream of batches stays a function of (seed, step).
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from data_pipelines.conversation import Conversation
from data_pipelines.errors import InputError
from data_pipelines.templates.corruption import SENTINELS, Corruption, Masked, Spans
from data_pipelines.templates.fill_in_the_middle import Document, FillInTheMiddle
from data_pipelines.templates.template import Example, Template

CORRUPTIONS = ("none", "spans", "masked")


class TextObjective:
    """A template with one of the two: `middle` for the share `fim_rate` of its documents, or a corruption of all.

    `fingerprint` changes with whatever changes the ids, the template's included. `vocab_size`: the largest id there
    can be, plus 1.
    """

    def __init__(
        self,
        template: Template,
        middle: FillInTheMiddle | None = None,
        fim_rate: float = 0.0,
        corruption: Corruption | None = None,
    ):
        self.template, self._middle, self._fim_rate, self._corruption = template, middle, fim_rate, corruption
        self.vocab_size = corruption.vocab_size if corruption else template.tokenizer.vocab_size
        identity = [template.fingerprint, middle and (fim_rate, *middle.identity), corruption and corruption.identity]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()

    @property
    def heldout(self) -> "Template | TextObjective":
        """What held-out examples are encoded with: whole documents, but corrupted where training is."""
        return self if self._corruption else self.template

    def encode_drawn(
        self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator]
    ) -> list[Example | None]:
        """The examples of draws, each with its random numbers; None where no token that carries loss is left."""
        if self._corruption:
            return self._corrupted(conversations, rngs, self._corruption)
        assert self._middle is not None
        chosen = {
            i: Document(conversation.turns[0].text, conversation.turns[0].weight, rng)
            for i, (conversation, rng) in enumerate(zip(conversations, rngs))
            if is_document(conversation) and conversation.turns[0].weight and rng.random() < self._fim_rate
        }
        cut = dict(zip(chosen, self._middle.encode_many(list(chosen.values()))))
        whole = [i for i in range(len(conversations)) if cut.get(i) is None]
        cut |= dict(zip(whole, self.template.encode_many([conversations[i] for i in whole])))
        return [cut[i] for i in range(len(conversations))]

    def _corrupted(
        self, conversations: Sequence[Conversation], rngs: Sequence[np.random.Generator], corrupt: Corruption
    ) -> list[Example | None]:
        for conversation in conversations:
            if not is_document(conversation):
                raise InputError(
                    f"{conversation.source}/{conversation.id}: found roles "
                    f'{[turn.role for turn in conversation.turns]}; data.corruption takes documents, role "text"'
                )
        examples = self.template.encode_many(conversations)
        return [example and corrupt(example, rng) for example, rng in zip(examples, rngs)]


def is_document(conversation: Conversation) -> bool:
    return len(conversation.turns) == 1 and conversation.turns[0].role == "text"


def text_objective(
    template: Template,
    *,
    fim_rate: float = 0.0,
    fim_spm_rate: float = 0.5,
    corruption: str = "none",
    corruption_rate: float = 0.15,
    span_length: float = 3.0,
    sentinels: str = SENTINELS,
    mask_token: str = "",
) -> Template | TextObjective:
    """The template itself where nothing is asked for, else a TextObjective. The names are those of the config's
    `data` section; raises InputError naming the one that is wrong."""
    for name, share in (("fim_rate", fim_rate), ("fim_spm_rate", fim_spm_rate)):
        if not 0 <= share <= 1:
            raise InputError(f"data.{name} = {share}: expected a share, from 0 to 1")
    if not 0 < corruption_rate < 1:
        raise InputError(f"data.corruption_rate = {corruption_rate}: expected a share between 0 and 1")
    if not span_length >= 1:
        raise InputError(f"data.span_length = {span_length}: expected a mean length of 1 or more tokens")
    if corruption not in CORRUPTIONS:
        raise InputError(f"data.corruption = {corruption!r}: expected one of {', '.join(CORRUPTIONS)}")
    if fim_rate and corruption != "none":
        raise InputError(f"data.fim_rate = {fim_rate} and data.corruption = {corruption!r}: expected one of the two")
    if corruption == "spans":
        return TextObjective(template, corruption=Spans(template, corruption_rate, span_length, sentinels))
    if corruption == "masked":
        return TextObjective(template, corruption=Masked(template, corruption_rate, mask_token))
    return TextObjective(template, FillInTheMiddle(template, fim_spm_rate), fim_rate) if fim_rate else template
