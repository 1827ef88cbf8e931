"""What the page's tables and tiles hold: figures put side by side."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from data_pipelines.datasets import Manifest
from data_pipelines.errors import InputError
from data_pipelines.reporting.accounts import (
    READ,
    Account,
    read_accounts,
    reasons,
    split_names,
    stage_names,
    stage_total,
)
from data_pipelines.reporting.encoding import Encoded
from data_pipelines.reporting.mixing import Length, Mixing, mix
from data_pipelines.reporting.numbers import number, share, short, words
from data_pipelines.reporting.recipe import Recipe
from data_pipelines.reporting.rejects import DEDUPE, Rejects
from data_pipelines.reporting.rendered import Piece
from data_pipelines.reporting.runs import HELDOUT, Run
from data_pipelines.reporting.scan import Scan

COPIES = 6  # sizes of groups of duplicates that are told apart


@dataclasses.dataclass(frozen=True)
class Folder:
    """Prepared data."""

    name: str
    path: Path
    manifest: Manifest
    accounts: Sequence[Account]

    @property
    def hash(self) -> str:
        return str(self.manifest["hash"])


class Tile(NamedTuple):
    label: str
    value: str
    note: str


def tiles(accounts: Sequence[Account], scans: Mapping[str, Scan], encoded: Mapping[str, Encoded]) -> list[Tile]:
    """The figures at the top."""
    splits = {split: sum(account.part(split) for account in accounts) for split in split_names(accounts)}
    parts = ", ".join(f"{number(n)} {'held out' if split == 'heldout' else split}" for split, n in splits.items())
    learned = sum(scan.learned for scan in scans.values()) / max(1, sum(scan.characters for scan in scans.values()))
    found = [Tile("conversations or documents", number(sum(splits.values())), parts)]
    found.append(Tile("characters", short(sum(a.characters for a in accounts)), f"{share(learned)} of them learned"))
    if encoded:
        tokens, loss = (together(what, scans, encoded) for what in ("tokens", "loss_tokens"))
        found.append(Tile("tokens to train on", *value_and_margin(tokens)))
        value, note = value_and_margin(loss)
        part = f"{share(loss[0] / max(1, tokens[0]))} of the tokens"
        found.append(Tile("learned tokens", value, f"{part}; {note}" if note else part))
    else:
        found.append(Tile("words to train on", short(sum(scan.words for scan in scans.values())), "no tokenizer given"))
    lost = sum(account.steps[0].lost for account in accounts)
    found.append(Tile("rows left out in reading", number(lost), f"of {number(sum(a.rows for a in accounts))} read"))
    found.append(removed("duplicates left out", "dedupe", accounts))
    found.append(removed("contaminated, left out", "decontaminate", accounts))
    redacted = stage_total(accounts, "redact", "changed")
    kinds = ", ".join(f"{words(kind)} {number(count)}" for kind, count in (redacted or {}).items())
    value = "–" if redacted is None else number(redacted.total())
    found.append(Tile("redactions", value, "stage not used" if redacted is None else kinds or "nothing found"))
    return found


def removed(label: str, stage: str, accounts: Sequence[Account]) -> Tile:
    dropped = stage_total(accounts, stage, "dropped")
    if dropped is None:
        return Tile(label, "–", "stage not used")
    by_reason = ", ".join(f"{words(reason)} {number(count)}" for reason, count in sorted(dropped.items()))
    return Tile(label, number(dropped.total()), by_reason or "none found")


def together(what: str, scans: Mapping[str, Scan], encoded: Mapping[str, Encoded]) -> tuple[int, int]:
    """(estimate, margin) over all sources, whose samples are independent."""
    found = [each.total(what, scans[name].examples, scans[name].characters) for name, each in encoded.items()]
    return sum(value for value, _ in found), round(math.hypot(*(margin for _, margin in found)))


def value_and_margin(estimate: tuple[int, int]) -> tuple[str, str]:
    value, margin = estimate
    return (f"≈ {short(value)}", f"± {share(margin / value)}") if margin else (short(value), "")


def totals(accounts: Sequence[Account]) -> list[int]:
    """The last line of the table of what came in and what is left."""
    reading = [account.steps[0] for account in accounts]
    sums = [sum(getattr(step, what) for step in reading) for what in ("entered", "lost", "left")]
    sums.append(sum(account.made for account in accounts))
    for stage in stage_names(accounts):
        sums.append(sum(step.lost for account in accounts if (step := account.step(stage))))
    return sums + [sum(account.part(split) for account in accounts) for split in split_names(accounts)]


def left_out(accounts: Sequence[Account]) -> list[tuple[str, int, int, str, list[tuple[str, dict[str, int]]]]]:
    """(step, entered, lost, unit, (reason, source -> count)) of every step that left something out."""
    found: dict[str, list[tuple[str, dict[str, int]]]] = {}
    for stage, reason, by_source in reasons(accounts):
        found.setdefault(stage, []).append((reason, by_source))
    rows = []
    for stage, each in found.items():
        steps = [step for account in accounts if (step := account.step(stage))]
        unit = "rows" if stage == READ else "conversations"
        rows.append((stage, sum(s.entered for s in steps), sum(s.lost for s in steps), unit, each))
    return rows


def samples(rejects: Rejects, stage: str, reason: str, by_source: Mapping[str, int]) -> list[dict[str, str]]:
    """place, found, expected and excerpt of the samples of a reason, as texts."""
    drops = [(source, drop) for source in by_source for drop in rejects.samples.get((source, stage, reason), ())]
    text = lambda drop, key: "" if drop.get(key) is None else str(drop[key])
    prefix = "a copy " if stage == DEDUPE else ""  # whose drops say "of" what
    return [
        {
            "place": place(source, drop),
            "found": prefix + text(drop, "found"),
            "expected": text(drop, "expected"),
            "excerpt": text(drop, "excerpt"),
        }
        for source, drop in drops
    ]


def place(source: str, drop: Mapping[str, Any]) -> str:
    """Where a drop stood: "source: file, row 7, turn 2", or the conversation's id."""
    where = drop.get("file") or drop.get("id") or "?"
    row = f", row {drop['row']}" if drop.get("row") is not None else ""
    return f"{source}: {where}{row}" + (f", turn {drop['turn']}" if drop.get("turn") is not None else "")


def copies(rejects: Rejects) -> list[tuple[str, int]]:
    """(number of copies that were left out, samples of which that many were), large numbers together."""
    sizes = sorted(rejects.copies.sizes().items())
    many = sum(kept for size, kept in sizes if size > COPIES)
    few = [(f"{size} {'copy' if size == 1 else 'copies'}", kept) for size, kept in sizes if size <= COPIES]
    return [*few, (f"more than {COPIES}", many)] if many else few


def mixings(
    folders: Sequence[Folder],
    runs: Sequence[Run],
    wanted: Sequence[str],
    recipe: Recipe | None,
    epochs: float,
    seed: int,
) -> list[tuple[str, Mixing | None, str]]:
    """(title, mixture, note): of each run, as it was; where there is none to show, of as many epochs as are asked
    for."""
    found = [run_mixing(folders, run) for run in runs]
    if any(mixing for _, mixing, _ in found):
        return found
    here = folders[0]
    title = f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'}"
    if not any(account.train for account in here.accounts):
        return [*found, (title, None, "No source has an example to train on.")]
    how = "with the weights asked for" if wanted else "with the weights of the manifest"
    note = f"As a run would read the data {how}; that of a run that was made comes with --run."
    mixing = mix(here.path, here.manifest, wanted, recipe, Length(epochs), seed)
    return [*found, (title, mixing, note)]


def run_mixing(folders: Sequence[Folder], run: Run) -> tuple[str, Mixing | None, str]:
    recipe = run.recipe()
    if run.config is None or recipe is None:
        return run.name, None, "No checkpoint beside its log, so its mixture is not known."
    folder = next((folder for folder in folders if trained_on(run, recipe, folder)), None)
    if folder is None:
        return run.name, None, "It was trained on other data, or encoded otherwise, so its mixture is not shown."
    sources, seed = run.config["data"]["sources"], run.config["train"]["seed"]
    mixing = mix(folder.path, folder.manifest, sources, recipe, Length.of(run.config), seed)
    return run.name, mixing, "The draws are estimated from the rows that the first of them take."


def trained_on(run: Run, recipe: Recipe, folder: Folder) -> bool:
    """False, too, where its tokenizer or template is not there to compare."""
    try:
        return run.trained_on(folder.manifest, recipe)
    except (InputError, FileNotFoundError):
        return False


def named_data(run: Run, folders: Sequence[Folder]) -> str:
    """Which of the folders a run was trained on."""
    recipe = run.recipe()
    if recipe is None:
        return "not known"
    names = [folder.name for folder in folders if trained_on(run, recipe, folder)]
    return names[0] if names else "other data, or encoded otherwise"


def last_losses(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
    """(source, loss of each run at the end), the mean over all sources last."""
    curves = [run.heldout for run in runs]
    sources = sorted({source for run in curves for source in run})
    rows: list[tuple[str, list[float | None]]] = [
        (source, [run[source][-1][1] if source in run else None for run in curves]) for source in sources
    ]
    means = [run.curves[HELDOUT][-1][1] if HELDOUT in run.curves else None for run in runs]
    return [*rows, ("all its sources", means)] if rows else []


def difference(values: Sequence[float | None], comparable: bool) -> str:
    """The second less the first; a dash where one is missing."""
    one, two = values
    return f"{two - one:+.4f}".replace("-", "−") if comparable and one is not None and two is not None else "–"


def all_scores(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
    names = sorted({name for run in runs for name in run.scores})
    return [(name, [run.scores.get(name) for run in runs]) for name in names]


def compared(folders: Sequence[Folder]) -> list[tuple[str, list[Account | None], str]]:
    """(source, its account in each folder, which of its splits are equal in all)"""
    found = [{account.name: account for account in folder.accounts} for folder in folders]
    rows = []
    for name in dict.fromkeys(name for accounts in found for name in accounts):
        entries = [accounts.get(name) for accounts in found]
        rows.append((name, entries, equal_splits([entry for entry in entries if entry], len(folders))))
    return rows


def equal_splits(accounts: Sequence[Account], number_of_folders: int) -> str:
    if len(accounts) < number_of_folders:
        return "in one only" if len(accounts) == 1 else "not in all"
    equal = [
        split
        for split in split_names(accounts)
        if len({account.splits.get(split, {}).get("sha256") for account in accounts}) == 1
    ]
    return "yes" if equal == split_names(accounts) else f"{', '.join(equal)} only" if equal else "no"


def open_folder(path: Path, name: str, manifest: Manifest) -> Folder:
    return Folder(name, path, manifest, read_accounts(manifest))


def special(piece: Piece) -> Markup:
    return Markup(' class="x"') if piece.special else Markup("")


def visible(text: str) -> str:
    """Line breaks with a sign before them, tabs as one."""
    return text.replace("\r\n", "\n").replace("\n", "↵\n").replace("\t", "⇥")
