"""Small exact tasks, made up on the spot: questions with one right answer that a program can check.

They are what a first training run is measured on: greedy exact match on instances that were never trained on.

* **Disjoint by construction.** Every instance has a canonical key: what is asked, without the phrasing, and the same
  for questions that are one fact (12 + 34 and 34 + 12; 37 m in cm and 3700 cm in m; a word and its reversal). A hash
  of the key alone decides between training and held-out, so no seed, size or phrasing moves an instance across.
* **No lucky guesses.** Each task has more than a hundred answers, none of them common: a model that knows the answers
  but not how they belong to the questions scores near zero. `shuffle_answers=True` makes the data for that control:
  the training answers are dealt out at random among the questions of their task, the held-out ones stay right.
* **Short and regular**, because a model of a million parameters has to learn them within minutes.
"""

import datetime
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence

from data_pipelines.conversation import Conversation, Turn

LICENCE = "Apache-2.0"

Instance = tuple[str, str, str]  # key, question, answer

HELDOUT_PERCENT = 10  # of all instances of a task; a constant, because changing it would move instances across
PATIENCE = 20_000  # draws in a row without a new instance before a task counts as exhausted

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MONTHS = (  # not from `calendar`, whose names follow the locale
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
UNITS = (  # larger unit, smaller unit, how many of these one of those is, largest number asked of the larger
    ("kilometres", "metres", 1000, 999),
    ("metres", "centimetres", 100, 999),
    ("metres", "millimetres", 1000, 999),
    ("centimetres", "millimetres", 10, 999),
    ("kilograms", "grams", 1000, 999),
    ("litres", "millilitres", 1000, 999),
    ("hours", "minutes", 60, 99),
    ("days", "hours", 24, 99),
)


def reversal(rng: random.Random) -> Instance:
    """Letters with spaces between them, so that a subword tokenizer sees one token a letter."""
    letters = rng.choices(LETTERS, k=rng.randint(3, 6))
    asked, answer = " ".join(letters), " ".join(reversed(letters))
    question = rng.choice(("Reverse the letters: {}", "Write backwards: {}")).format(asked)
    return min(asked, answer), question, answer


def conversion(rng: random.Random) -> Instance:
    large, small, factor, most = rng.choice(UNITS)
    number = rng.randint(2, most)
    known, wanted = f"{number} {large}", f"{number * factor} {small}"
    key = f"{known} = {wanted}"
    if rng.random() < 0.5:
        known, wanted = wanted, known
    unit = wanted.split()[1]
    question = rng.choice(("How many {unit} are {known}?", "Convert {known} to {unit}."))
    return key, question.format(unit=unit, known=known), wanted


def sorting(rng: random.Random) -> Instance:
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(3, 4))]
    asked, answer = (" ".join(map(str, row)) for row in (numbers, sorted(numbers)))
    question = rng.choice(("Sort the numbers: {}", "Put in order: {}")).format(asked)
    return answer, question, answer


def addition(rng: random.Random) -> Instance:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    question = rng.choice(("What is {} + {}?", "Add {} and {}.")).format(a, b)
    return f"{min(a, b)} + {max(a, b)}", question, str(a + b)


def date(rng: random.Random) -> Instance:
    """The Gregorian calendar, 2000 to 2029."""
    start = datetime.date(2000, 1, 1) + datetime.timedelta(days=rng.randrange(30 * 365))
    days = rng.randint(2, 9)
    asked, answer = (
        f"{day.day} {MONTHS[day.month - 1]} {day.year}" for day in (start, start + datetime.timedelta(days=days))
    )
    question = rng.choice(("Which date is {days} days after {asked}?", "Add {days} days to {asked}."))
    return f"{asked} + {days}", question.format(days=days, asked=asked), answer


def counting(rng: random.Random) -> Instance:
    first = rng.randint(10, 990)
    last = first + rng.randint(2, 5)
    question = rng.choice(("Count from {} to {}.", "List the numbers from {} to {}.")).format(first, last)
    return f"{first} to {last}", question, " ".join(map(str, range(first, last + 1)))


def maximum(rng: random.Random) -> Instance:
    numbers = [rng.randint(100, 999) for _ in range(rng.randint(2, 4))]
    question = rng.choice(("Which number is the largest: {}?", "Find the maximum of {}."))
    return (
        " ".join(map(str, sorted(numbers))),
        question.format(", ".join(map(str, numbers))),
        str(max(numbers)),
    )


TASKS: dict[str, Callable[[random.Random], Instance]] = {
    task.__name__: task for task in (reversal, conversion, sorting, addition, date, counting, maximum)
}


def side_of(task: str, key: str) -> str:
    """`heldout` or `train`, from a hash that is the same in every process and on every machine."""
    digest = hashlib.sha256(f"{task}:{key}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT else "train"


def task_of(conversation: Conversation) -> str:
    """The name of the task that the conversation is an instance of."""
    return conversation.id.partition(":")[0]


def generate(
    *,
    seed: int = 0,
    train: int = 3000,
    heldout: int = 200,
    shuffle_answers: bool = False,
    tasks: Sequence[str] | None = None,
) -> Iterator[tuple[str, Conversation]]:
    """Yields (split, conversation): for every task `train` training and then `heldout` held-out instances.

    The held-out instances depend on `seed` and `heldout` only, so they are the same for every size of the training
    data and for the control with shuffled answers. Raises ValueError for an unknown task, and for one that has fewer
    distinct instances than asked for.
    """
    unknown = sorted(set(tasks or ()) - set(TASKS))
    if unknown:
        raise ValueError(f"tasks: found {unknown}; expected some of {sorted(TASKS)}")
    for task in TASKS if tasks is None else tasks:
        for split, count in (("train", train), ("heldout", heldout)):
            rng = random.Random(f"exact/{task}/{split}/{seed}")
            rows = draw(task, split, count, rng)
            if shuffle_answers and split == "train":
                rows = deal_answers(rows, rng)
            for key, question, answer in rows:
                turns = Turn("user", question, 0.0), Turn("assistant", answer, 1.0)
                yield split, Conversation("exact", f"{task}:{key}", turns)


def draw(task: str, split: str, count: int, rng: random.Random) -> list[Instance]:
    """`count` instances of one side with different keys; ValueError if there are not that many."""
    rows: dict[str, Instance] = {}
    fruitless = 0
    while len(rows) < count:
        key, question, answer = TASKS[task](rng)
        if key in rows or side_of(task, key) != split:
            fruitless += 1
            if fruitless == PATIENCE:
                raise ValueError(
                    f"task {task!r}: found {len(rows)} distinct {split} instances ({PATIENCE} more draws gave no "
                    f"new one); expected {count}: ask for fewer"
                )
            continue
        fruitless = 0
        rows[key] = key, question, answer
    return list(rows.values())


def deal_answers(rows: list[Instance], rng: random.Random) -> list[Instance]:
    """Every question gets the answer of another one: the next in a random round, so that none keeps its own."""
    order = rng.sample(range(len(rows)), len(rows))
    given = dict(zip(order, order[1:] + order[:1], strict=True))
    return [(key, question, rows[given[i]][2]) for i, (key, question, _) in enumerate(rows)]
