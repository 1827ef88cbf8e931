"""Which samples are held out: a hash of the prompt decides, so equal prompts lie in the same split, whatever source
they come from and however many samples there are. A source that has splits of its own keeps them.

The prompt is what the user says first, or a document's whole text, normalised as for comparing (NFKC, case folded,
spaces collapsed). A comparison's two answers, and the several answers to a question, therefore stay together. Token ids
do not tell where a prompt ends, so all ids of an example count as one document.
"""

from typing import ClassVar

from data_pipelines.conversation import Conversation
from data_pipelines.sources import stable_hash
from data_pipelines.stages.base import Stage, normal
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.token_ids import all_ids


class Split(Stage):
    """heldout: the share of the prompts that is held out."""

    OPTIONS: ClassVar = {"heldout": 0.0}

    def conversation(self, conversation: Conversation, ledger: Ledger) -> Conversation:
        return conversation

    def sample(self, sample: Sample, ledger: Ledger) -> Sample:
        size = len(sample.conversations)
        ledger.entered, ledger.left = ledger.entered + size, ledger.left + size
        if sample.split is not None:
            return sample
        share = stable_hash(prompt(sample.conversations[0])) / 2**64
        return Sample(sample.id, sample.conversations, "heldout" if share < self.options["heldout"] else "train")


def prompt(conversation: Conversation) -> str:
    """What is asked first, as it is compared."""
    asked = next((turn.text for turn in conversation.turns if turn.role in ("user", "text")), "")
    return normal(asked or all_ids(conversation.turns))
