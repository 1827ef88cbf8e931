"""HH-RLHF: Anthropic's pairs of answers, of which people found one more helpful or less harmful.

Format. A row is two transcripts that differ in their last answer alone:

    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello!", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: What?"}

Origin and licence. github.com/anthropics/hh-rlhf (MIT): about 160,000 pairs in harmless-base, helpful-base,
helpful-online and helpful-rejection-sampled. The texts offend by design. red-team-attempts is another format.

What Koala did: every turn of the chosen transcript was trained on as a good answer, every turn of the rejected one
after the marker of an unhelpful answer; the transcripts were split at the bare words "Human:" and "Assistant:".
Where we depart, and why:
* Only the last answers were compared. In the rejected copy the last answer alone is `helpful=False`, and the answers
  before it, which are the same in both copies, get the weight 0: they were not found unhelpful, and they are already
  learned from the chosen copy.
* We split at the words after an empty line, because the bare words also occur in texts. Where one of them begins a
  turn or a sentence within it all the same, one side speaks for the other: a transcript gone wrong.
The oddities of the dataset (about 2 % of the rows) are rejected with reasons of their own: identical_pair,
not_alternating (the same speaker twice), ends_with_user, empty_text, marker_in_turn, different_prefix.
"""

import re

from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.errors import shown
from data_pipelines.sources import Row, alternate, at, comparison, need, string

FORMAT = '{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": "…"}, alike up to the last answer'
ORIGIN = "https://github.com/anthropics/hh-rlhf"
LICENCE = "MIT"
PATTERNS = ("hh_rlhf/*/*.jsonl", "hh_rlhf/*/*.jsonl.gz", "hh_rlhf/*/*.parquet", "!hh_rlhf/red-team-attempts/*")

MARKER = re.compile(r"\n\n(Human|Assistant):")
STRAY = re.compile(r"(?:(?:^|[\n.!?:()”\"“])\s?|\s{2})((?:Human|Assistant):)")
ROLES = {"Human": "user", "Assistant": "assistant"}


def convert(row: Row, where: Where) -> list[Conversation]:
    need(row, ("chosen", "rejected"), where, FORMAT)
    chosen, rejected = (transcript(row[key], key, where) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        found = f"{len(chosen)} and {len(rejected)} turns that differ before the last one"
        raise DataError(where, found, FORMAT, "different_prefix")
    good, bad = ([Turn(role, said, float(role == "assistant")) for role, said in side] for side in (chosen, rejected))
    return comparison("hh_rlhf", where, good, bad)


def transcript(value: object, name: str, where: Where) -> list[tuple[str, str]]:
    """(role, text) per turn."""
    before, *parts = MARKER.split(string(value, f'"{name}"', where))
    if before.strip() or not parts:
        raise DataError(where, f'{shown(before)} at the start of "{name}"', FORMAT, "no_marker")
    turns = []
    for i, (marker, said) in enumerate(zip(parts[::2], parts[1::2]), start=1):
        here = at(where, i)
        said = string(said, f'a turn of "{name}"', here).strip()
        if stray := STRAY.search(said):
            found = f'"{stray[1]}" within a turn of "{name}"'
            raise DataError(here, found, "one speaker in a turn", "marker_in_turn")
        turns.append((ROLES[marker], said))
    alternate([role for role, _ in turns], where, f'Human and Assistant in turns in "{name}"')
    return turns
