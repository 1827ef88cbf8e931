"""Look at data: prepared ones, or what a run read of them.

    python -m data_pipelines.inspect DIR                                              the table of the manifest
    python -m data_pipelines.inspect DIR --source=NAME --split=train --rows=0:5       conversations
    python -m data_pipelines.inspect --run=runs/koala_tiny --step=1500 --rows=0:2     the batch of a step

Text that is learned is green, text that is only read is grey. With --template conversations are shown as the training
examples of a first epoch, special tokens included, what is learned by --fim_rate or --corruption with them. Of a step:
each row's segments, the hash of the examples beside the one that the run logged, and with --rows those rows as tokens.
It takes the run's configuration from its checkpoints; DIR stands for the place of its data, if they have moved.

The text of the data cannot give orders to the terminal: markup is shown as it is, and control characters as their
symbols.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from data_pipelines.batches import replay
from data_pipelines.batches.batch_stats import Item, digest
from data_pipelines.batches.examples import encode_draws
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.datasets import SourceDataset, open_source, read_manifest
from data_pipelines.errors import InputError
from data_pipelines.inert import plain
from data_pipelines.mixing.mixture import Draw
from data_pipelines.reporting.manifest_table import manifest_table
from data_pipelines.templates.corruption import SENTINELS
from data_pipelines.templates.template import Example, Template, load_template
from data_pipelines.templates.text_objective import CORRUPTIONS, TextObjective, text_objective
from data_pipelines.tokenizers.tokenizer import Tokenizer, load_tokenizer


def rendered(conversation: Conversation) -> Group:
    head = plain(f"{conversation.source} {conversation.id}", "bold underline")
    tools = [plain(f"tools\n{conversation.tools}", "bright_black")] if conversation.tools else []
    return Group(head, *tools, *map(turn_lines, conversation.turns), "")


def turn_lines(turn: Turn) -> Text:
    unhelpful = "" if turn.helpful else ", unhelpful"
    head = plain(f"{turn.role} (weight {turn.weight:g}{unhelpful})\n", "bold")
    return Text.assemble(head, plain(turn.text, "green" if turn.weight > 0 else "bright_black"))


def spelled(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """The text of ids with special tokens, and <id> for one that the tokenizer does not have."""
    groups = itertools.groupby(map(int, ids), lambda i: i < tokenizer.vocab_size)
    return "".join(tokenizer.decode(g, False) if known else "".join(f"<{i}>" for i in g) for known, g in groups)


def encoded(example: Example | None, title: str, tokenizer: Tokenizer) -> Group:
    """The tokens of an example: those learned green, those read grey. Where tokens are learned at their own place
    (masked tokens), what stands there is followed by what is learned, after an arrow."""
    head = plain(title, "bold underline")
    if example is None:
        return Group(head, plain("nothing to learn", "italic"), "")
    learned = example.weights > 0
    if example.targets is None:
        cuts = [0, *(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(learned)]
        runs = [(spelled(example.ids[a:b], tokenizer), learned[a]) for a, b in itertools.pairwise(cuts)]
    else:
        pairs = zip(example.ids, example.targets, learned)
        word = lambda i: spelled([i], tokenizer)
        runs = [(f"[{word(i)}→{word(t)}]" if yes else f"{word(i)} ", yes) for i, t, yes in pairs]
    parts = [plain(text, "green" if yes else "bright_black") for text, yes in runs]
    return Group(head, Text.assemble(*parts), "")


def examples(dataset: SourceDataset, source: str, wanted: range, learned: Template | TextObjective) -> Iterator[Group]:
    """The conversations as the training examples of a first epoch with seed 0."""
    tokenizer = learned.template.tokenizer if isinstance(learned, TextObjective) else learned.tokenizer
    for index in wanted:
        (item,) = encode_draws(learned, {source: dataset}, [Draw(0, 0, index)])
        conversation = dataset[index]
        title = f"{conversation.source} {conversation.id}"
        yield encoded(None if item is None else item.example, title, tokenizer)


def learned_by_flags(directory: Path) -> Template | TextObjective:
    """The template and what is learned of it, as the flags have it."""
    tokenizer = load_tokenizer(FLAGS.tokenizer or directory / "tokenizer")
    template = load_template(FLAGS.template, tokenizer, max_length=FLAGS.length + 1)
    return text_objective(
        template,
        fim_rate=FLAGS.fim_rate,
        corruption=FLAGS.corruption,
        sentinels=FLAGS.sentinels,
        mask_token=FLAGS.mask_token,
    )


def step_table(rows: Sequence[Sequence[Item]], names: Sequence[str], length: int) -> Table:
    """One line a segment; at the end of each row what is padding."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("row", "segment", "source", "conversation", "tokens", "loss tokens", "part"):
        table.add_column(title, justify="left" if title in ("source", "conversation", "part") else "right")
    for row, items in enumerate(rows):
        for segment, item in enumerate(items, start=1):
            part = f"positions {item.span[0]:,} to {item.span[1]:,}" if item.span else ""
            place = (plain(names[item.source]), plain(item.id))
            table.add_row(str(row), str(segment), *place, f"{item.example.positions:,}", f"{item.loss_tokens:,}", part)
        if padding := length - sum(item.example.positions for item in items):
            table.add_row(str(row), "", plain("padding", "bright_black"), "", f"{padding:,}", "", "")
    return table


def step_summary(step: replay.Step, number: int, length: int) -> list[str]:
    """The sums of a step's batch, its hash, and whether the run logged the same."""
    items = [item for items in step.rows for item in items]
    tokens, loss_tokens = sum(item.example.positions for item in items), sum(item.loss_tokens for item in items)
    sums = f"{len(items):,} segments, {tokens:,} tokens, {loss_tokens:,} loss tokens"
    padding = f"padding {1 - tokens / (len(step.rows) * length):.1%}"
    same = replay.agrees(step)
    log = {None: "the log has no row of this step", True: "as logged", False: "the log has other examples"}[same]
    if same is False:
        log += f": {step.logged['examples']}"
    first = f"step {number}: {len(step.rows)} rows x {length}, {sums}, {padding}"
    return [first, f"examples {digest(step.batch)}: {log}"]


def show_step(console: Console, directory: str) -> int:
    """Prints a step of a run; 1 if the run logged other examples."""
    run = replay.open_run(FLAGS.run)
    section, data = replay.open_run_data(run, directory)
    if missing := [name for name in data.sources if name not in data.tokens]:
        told = f"no tokens are stored of {', '.join(missing)}: tokenising what comes before the step"
        Console(stderr=True).print(f"{told} (python -m data_pipelines.tokenize stores them)", markup=False)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=None)
        tell = lambda done, total: bar.update(task, completed=done, total=total)
        step = replay.at_step(run, section, data, FLAGS.step, tell)
    console.print(step_table(step.rows, data.sources, section["length"]))
    for line in step_summary(step, FLAGS.step, section["length"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if FLAGS.rows is not None:
        for row in range(len(step.rows))[rows(FLAGS.rows)]:
            for segment, item in enumerate(step.rows[row], start=1):
                title = f"row {row}, segment {segment}: {data.sources[item.source]} {item.id}"
                console.print(encoded(item.example, title, data.tokenizer))
    return int(replay.agrees(step) is False)


def rows(text: str) -> slice:
    """`0:5`, `7`, `-3:` as a slice; InputError for anything else."""
    try:
        return _slice(text)
    except ValueError:
        raise InputError(f"--rows: found {text!r}; expected rows such as 0:5, 7 or -3:") from None


def _slice(text: str) -> slice:
    parts = [int(part) if part.strip() else None for part in text.split(":")]
    if len(parts) == 1 and parts[0] is not None:
        return slice(parts[0], parts[0] + 1 or None)
    if len(parts) == 2:
        return slice(*parts)
    raise ValueError(f"found {text!r}")


def main(argv: list[str]) -> None:
    if len(argv) != 2 and not (FLAGS.run and len(argv) == 1):
        raise app.UsageError("expected one folder: python -m data_pipelines.inspect DIR, or --run=RUN --step=N")
    console = Console()
    try:
        if FLAGS.run:
            sys.exit(show_step(console, *argv[1:] or [""]))
        directory = Path(argv[1])
        manifest = read_manifest(directory)
        if not FLAGS.source:
            console.print(manifest_table(manifest))
            return
        dataset = open_source(directory, FLAGS.source, FLAGS.split)
        indices = range(len(dataset))[rows(FLAGS.rows or "0:5")]
        if not indices:
            told = f"{FLAGS.source}, {FLAGS.split}: found {len(dataset)} conversations, none of them in these rows"
            console.print(plain(told))
        if FLAGS.template:
            shown = examples(dataset, FLAGS.source, indices, learned_by_flags(directory))
        else:
            shown = (rendered(dataset[index]) for index in indices)
        for each in shown:
            console.print(each)
    except (InputError, FileNotFoundError) as error:
        sys.exit(f"{error}")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string("source", None, "The source to show; without it, the table of all")
    flags.DEFINE_string("split", "train", "train or heldout")
    flags.DEFINE_string("rows", None, "Which rows: 0:5 (by default, of a source), 7 or -3:")
    flags.DEFINE_string("run", None, "A run's folder: show what was in one of its steps")
    flags.DEFINE_integer("step", 1, "The step, from 1")
    flags.DEFINE_string("template", "", "koala, yuan, chat, text, tokenizer or a .jinja file: show training examples")
    flags.DEFINE_string("tokenizer", "", "Its file or folder; that of the prepared data by default")
    flags.DEFINE_integer("length", 2048, "Tokens a row")
    flags.DEFINE_float("fim_rate", 0.0, "Share of the documents that are cut to fill in the middle")
    flags.DEFINE_enum("corruption", "none", CORRUPTIONS, "What is masked of documents")
    flags.DEFINE_string("sentinels", SENTINELS, "Names of special tokens, or ids as 32000:32100")
    flags.DEFINE_string("mask_token", "", "A special token, or an id that the tokenizer does not use")
    app.run(main)
