"""How conversations become rows of tokens: tokenizer, template, row length, and what is learned of a text.

It comes from flags or from the configuration of a run, and can be sent to another process.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from data_pipelines.batches.loader import POOL
from data_pipelines.batches.packing import Packing
from data_pipelines.batches.training_data import learned_of, longest, template_date
from data_pipelines.templates.corruption import SENTINELS
from data_pipelines.templates.template import Template, load_template
from data_pipelines.templates.text_objective import TextObjective
from data_pipelines.tokenizers.tokenizer import Tokenizer, load_tokenizer

Learned = Template | TextObjective


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The names are those of the `data` section of a run's configuration; `tokenizer` is a file or folder. length:
    positions of a row. pool: examples packed together."""

    tokenizer: str
    template: str
    length: int = 2048
    packing: Packing = "best_fit"
    pool: int = POOL
    date: str = ""
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    corruption: str = "none"
    corruption_rate: float = 0.15
    span_length: float = 3.0
    sentinels: str = SENTINELS
    mask_token: str = ""

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "Recipe":
        """What a `data` section, or the flags, say of it."""
        return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls) if field.name in section})


@functools.lru_cache(maxsize=8)
def learned_by(recipe: Recipe) -> Learned:
    """What makes training examples. Raises InputError or FileNotFoundError for what does not fit."""
    now, max_length = template_date(recipe.date), longest(recipe.packing, recipe.length)
    template = load_template(recipe.template, load_tokenizer(recipe.tokenizer), max_length=max_length, now=now)
    return learned_of(dataclasses.asdict(recipe), template)


def tokenizer_of(learned: Learned) -> Tokenizer:
    return learned.template.tokenizer if isinstance(learned, TextObjective) else learned.tokenizer
