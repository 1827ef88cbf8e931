"""OASST: trees of messages that volunteers of Open Assistant wrote and ranked.

Format. A row is a tree: a question, the answers to it, the questions that followed each of them, and so on:

    {"message_tree_id": …, "tree_state": "ready_for_export", "prompt": {"text": …, "role": "prompter", "lang": "en",
     "replies": [{"text": …, "role": "assistant", "lang": "en", "rank": 0, "replies": […]}, …]}}

Origin and licence. OpenAssistant/oasst1 and oasst2 on Hugging Face, the files *.trees.jsonl.gz, Apache-2.0.

A tree gives one conversation: at every message the reply of the lowest rank, which people liked best, up to the last
answer. A reply without a rank comes after those with one, in the order of the file; deleted ones, and those that the
reviewers refused, are left out with all that follows them. With `paths="all"` it gives every path from the question to
a last answer; an answer that several paths share is learned in the first of them only, so that each counts once.
`languages` leaves out trees whose question is in another language, as the file has it ("en", "zh", "pt-BR").

Koala did not use it; most sets of chats since then hold some of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.errors import InputError, shown
from data_pipelines.sources import Filtered, Row, alternate, items, need, row_id, string

FORMAT = '{"message_tree_id": …, "prompt": {"text": …, "role": "prompter", "replies": […]}}'
ORIGIN = "https://huggingface.co/datasets/OpenAssistant/oasst1, *.trees.jsonl.gz"
PATTERNS = ("oasst/*.jsonl", "oasst/*.jsonl.gz")

READY = "ready_for_export"
ROLES = {"prompter": "user", "assistant": "assistant"}
MOST_PATHS = 1_000  # of one tree

Message = Mapping[str, Any]


def convert(row: Row, where: Where, *, paths: str = "best", languages: Sequence[str] = ()) -> list[Conversation]:
    if paths not in ("best", "all"):
        raise InputError(f"paths: found {paths!r}; expected best or all")
    need(row, ("message_tree_id", "prompt"), where, FORMAT)
    if row.get("tree_state", READY) != READY:
        raise Filtered(where, f'"tree_state" is {shown(row["tree_state"])}', f'"{READY}"', "tree_state")
    prompt = message(row["prompt"], where)
    if languages and prompt.get("lang") not in languages:
        raise Filtered(where, f'"lang" is {shown(prompt.get("lang"))}', f"one of {', '.join(languages)}", "language")
    if paths == "best":
        return [Conversation("oasst", row_id(where), chat(best_path(prompt, where), set(), where))]
    seen: set[int] = set()
    chats = [chat(path, seen, where) for path in all_paths(prompt, where)]
    return [Conversation("oasst", f"{row_id(where)}:{i}", turns) for i, turns in enumerate(chats, start=1)]


def message(value: object, where: Where) -> Message:
    if not isinstance(value, Mapping) or value.get("role") not in (*ROLES,):
        raise DataError(where, shown(value), 'a message with the role "prompter" or "assistant"', "wrong_keys")
    return value


def replies(parent: Message, where: Where) -> list[Message]:
    """Those to go on with, the best first."""
    given = [message(each, where) for each in items(parent.get("replies") or [], '"replies"', where)]
    kept = [each for each in given if not each.get("deleted") and each.get("review_result") is not False]
    return sorted(kept, key=place)


def place(reply: Message) -> tuple[int, int]:
    rank = reply.get("rank")
    return (0, rank) if isinstance(rank, int) else (1, 0)


def best_path(prompt: Message, where: Where) -> list[Message]:
    path = [prompt]
    while following := replies(path[-1], where):
        path.append(following[0])
    return path


def all_paths(prompt: Message, where: Where) -> Iterator[list[Message]]:
    """From the question to each last answer, the better ones first. Questions that nobody answered are as if they were
    not there."""
    waiting, found = [[prompt]], 0
    while waiting:
        path = waiting.pop()
        following = [
            reply for reply in replies(path[-1], where) if reply["role"] == "assistant" or replies(reply, where)
        ]
        waiting += [[*path, reply] for reply in reversed(following)]
        if not following:
            found += 1
            if found > MOST_PATHS:
                raise DataError(where, f"more than {MOST_PATHS:,} paths", "a smaller tree", "too_many_paths")
            yield path


def chat(path: Sequence[Message], seen: set[int], where: Where) -> tuple[Turn, ...]:
    """The turns of a path up to its last answer; answers in `seen` are read only, and the others added to it."""
    if path[-1]["role"] == "prompter":
        path = path[:-1]
    turns = []
    for each in path:
        role = ROLES[each["role"]]
        learned = role == "assistant" and id(each) not in seen
        seen.add(id(each))
        turns.append(Turn(role, string(each.get("text"), '"text"', where), float(learned)))
    alternate([turn.role for turn in turns], where, "the prompter and the assistant in turns")
    return tuple(turns)
