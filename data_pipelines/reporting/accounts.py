"""What came in, what left at which step and why, and what was written, source by source, as the manifest has it.

Reading counts rows; every later step counts conversations, of which a row may give several. A manifest may name stages
and tables that nobody has thought of yet: all of them are shown alike.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipelines.datasets import SPLITS, Manifest
from data_pipelines.stages import CONFIGURED

READ, SPLIT = "read", "split"
# Tables that stages keep: "language" of filter; "contamination" of decontaminate, benchmark -> conversations, and
# "contamination_items/<benchmark>", item -> conversations
LANGUAGE, CONTAMINATION, ITEMS = "language", "contamination", "contamination_items/"

Counts = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Step:
    """Reading or a stage. dropped, changed: reason -> count; seen: table -> value -> count."""

    name: str
    entered: int
    left: int
    dropped: Counts
    changed: Counts
    seen: Mapping[str, Counts]

    @property
    def lost(self) -> int:
        return sum(self.dropped.values())

    @property
    def unit(self) -> str:
        return "rows" if self.name == READ else "conversations"

    @property
    def unexplained(self) -> int:
        """What neither left nor was dropped for a reason: 0."""
        return self.entered - self.left - self.lost


@dataclasses.dataclass(frozen=True)
class Account:
    """A source. `number`: its place, which its colour goes by; steps: reading first, the split last."""

    number: int
    name: str
    kind: str
    licence: str
    weight: float
    files: Sequence[Mapping[str, Any]]
    steps: Sequence[Step]
    splits: Mapping[str, Mapping[str, Any]]

    def step(self, name: str) -> Step | None:
        return next((step for step in self.steps if step.name == name), None)

    @property
    def rows(self) -> int:
        return self.steps[0].entered

    @property
    def made(self) -> int:
        """Conversations that the rows gave."""
        return self.steps[1].entered

    @property
    def examples(self) -> int:
        return sum(split["examples"] for split in self.splits.values())

    @property
    def characters(self) -> int:
        return sum(split["characters"] for split in self.splits.values())

    @property
    def train(self) -> int:
        return self.part("train")

    def part(self, split: str) -> int:
        """Examples of a split, 0 where there is none."""
        return int(self.splits.get(split, {}).get("examples", 0))

    @property
    def lost_later(self) -> int:
        """Conversations that were left out after reading."""
        return sum(step.lost for step in self.steps[1:])

    @property
    def lost_by_step(self) -> list[tuple[str, str, int]]:
        """(step, reason, count)"""
        return [(step.name, reason, count) for step in self.steps for reason, count in step.dropped.items()]

    @property
    def changed_by_step(self) -> list[tuple[str, str, int]]:
        """(step, what, count)"""
        return [(step.name, what, count) for step in self.steps for what, count in step.changed.items()]

    @property
    def other_tables(self) -> list[tuple[str, str, list[tuple[str, int]], int]]:
        """(stage, table, counts, conversations that the stage saw) of what has no section of its own."""
        return [
            (step.name, table, ordered(counts), step.entered)
            for step in self.steps
            for table, counts in step.seen.items()
            if table != LANGUAGE and not table.startswith(CONTAMINATION)
        ]

    @property
    def adds_up(self) -> bool:
        """Whether in = kept + dropped at every step, what left one entered the next, and the last left what is
        written."""
        chain = [(before.left, after.entered) for before, after in itertools.pairwise(self.steps[1:])]
        return not any(step.unexplained for step in self.steps) and all(
            left == entered for left, entered in [*chain, (self.steps[-1].left, self.examples)]
        )


def ordered(counts: Counts) -> list[tuple[str, int]]:
    """The most frequent first."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def read_accounts(manifest: Manifest) -> list[Account]:
    return [_account(number, name, entry) for number, (name, entry) in enumerate(manifest["sources"].items())]


def _account(number: int, name: str, entry: Mapping[str, Any]) -> Account:
    reading = Step(READ, entry["rows"], entry["kept_rows"], entry["rejected"], entry["repaired"], {})
    stages = [
        Step(stage, e["entered"], e["left"], e["dropped"], e.get("changed", {}), e.get("seen", {}))
        for stage, e in entry["stages"].items()
    ]
    if not stages:  # as if there were a step that leaves everything as it is
        examples = sum(split["examples"] for split in entry["splits"].values())
        stages = [Step(SPLIT, examples, examples, {}, {}, {})]
    options = {"weight": entry.get("weight") or 0, "files": entry["files"], "splits": entry["splits"]}
    licence = entry.get("licence", "not stated")
    return Account(number, name, entry["kind"], licence, steps=[reading, *stages], **options)


def stage_names(accounts: Iterable[Account]) -> list[str]:
    """The stages of all sources in their order, without reading and the split. An unknown one comes where a source
    has it, behind the stage before it."""
    order, found = list(CONFIGURED), set[str]()
    for account in accounts:
        at = 0
        for step in account.steps[1:]:
            if step.name not in order:
                order.insert(at, step.name)
            at = order.index(step.name) + 1
            found.add(step.name)
    return [stage for stage in order if stage in found and stage != SPLIT]


def split_names(accounts: Iterable[Account]) -> list[str]:
    found = dict.fromkeys(split for account in accounts for split in account.splits)
    return [*(split for split in SPLITS if split in found), *(split for split in found if split not in SPLITS)]


def stage_total(accounts: Iterable[Account], stage: str, what: str) -> Counter[str] | None:
    """`dropped` or `changed` of a stage over all sources; None if no source goes through it."""
    steps = [step for account in accounts if (step := account.step(stage))]
    return sum((Counter(getattr(step, what)) for step in steps), Counter()) if steps else None


@dataclasses.dataclass(frozen=True)
class Flow:
    """A source's way through reading and the stages: what came to each, and how many of these went on; None for a
    stage that it does not go through. What is written at the end, by split."""

    account: Account
    steps: Sequence[tuple[int, int] | None]
    parts: Sequence[int]

    @property
    def widest(self) -> int:
        return max(sum(self.parts), *(step[0] for step in self.steps if step))


def flows(accounts: Sequence[Account], stages: Sequence[str], splits: Sequence[str]) -> list[Flow]:
    ways = []
    for account in accounts:
        steps = [account.step(name) for name in (READ, *stages)]
        counts = [(step.entered, step.left) if step else None for step in steps]
        ways.append(Flow(account, counts, [account.part(split) for split in splits]))
    return ways


def reasons(accounts: Sequence[Account]) -> list[tuple[str, str, dict[str, int]]]:
    """(stage, reason, source -> count) of all that was left out, stage by stage, the most frequent reason first."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for account in accounts:
        for step in account.steps:
            for reason, count in step.dropped.items():
                found.setdefault((step.name, reason), {})[account.name] = count
    order = [READ, *stage_names(accounts), SPLIT]
    place = lambda stage_reason: (order.index(stage_reason[0]), -sum(found[stage_reason].values()), stage_reason[1])
    return [(stage, reason, found[stage, reason]) for stage, reason in sorted(found, key=place)]


def benchmarks(
    accounts: Sequence[Account], config: Mapping[str, Any]
) -> list[tuple[str, dict[str, int], list[tuple[str, int]]]]:
    """(benchmark, source -> conversations that hold something of it, (item, conversations) most frequent first), those
    that were looked for and not found last."""
    found: dict[str, dict[str, int]] = {name: {} for name in looked_for(config)}
    items: dict[str, Counter[str]] = {}
    for account in accounts:
        for step in account.steps:
            for benchmark, count in step.seen.get(CONTAMINATION, {}).items():
                found.setdefault(benchmark, {})[account.name] = count
            for table, counts in step.seen.items():
                if table.startswith(ITEMS):
                    items.setdefault(table.removeprefix(ITEMS), Counter()).update(counts)
    most = sorted(found, key=lambda benchmark: (-sum(found[benchmark].values()), benchmark))
    return [(benchmark, found[benchmark], ordered(items.get(benchmark, {}))) for benchmark in most]


def looked_for(config: Mapping[str, Any]) -> list[str]:
    """The benchmarks that the configuration of `prepare` names, for all sources or for one."""
    parts = [config, *(config.get("sources") or {}).values()]
    stages = [part.get("stages") or {} for part in parts]
    options = [stage.get("decontaminate") or {} for stage in stages]
    return list(dict.fromkeys(name for each in options for name in each.get("benchmarks") or ()))
