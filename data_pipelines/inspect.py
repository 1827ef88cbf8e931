"""Look at prepared data: `python -m data_pipelines.inspect DIR [--source NAME --split train --rows 0:5]`.

Without a source: the table of the manifest. With one: its conversations; text that is learned is green, text that is
only read is grey. With --template, too: the same as the training examples of a first epoch, special tokens included,
what is learned by --fim_rate or --corruption with them. The text of the data cannot give orders to the terminal: markup
is shown as it is, and control characters as their symbols.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.corruption import SENTINELS
from data_pipelines.datasets import Manifest, SourceDataset, open_source, read_manifest
from data_pipelines.errors import InputError
from data_pipelines.inert import inert
from data_pipelines.loader import encode_draws
from data_pipelines.mixture import Draw
from data_pipelines.template import Example, Template, load_template
from data_pipelines.text_objective import CORRUPTIONS, TextObjective, text_objective
from data_pipelines.tokenization import Tokenizer, load_tokenizer


def plain(text: str, style: str = "") -> Text:
    return Text(inert(text), style)


def manifest_table(manifest: Manifest) -> Group:
    """One line a source: what was read and what was kept. Below it, why rows were left out or repaired."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("source", no_wrap=True)
    for title in ("files", "rows", "kept", "rejected", "repaired", "train", "held out", "characters"):
        table.add_column(title, justify="right", no_wrap=True)
    reasons = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for justify in ("left", "right", "left"):
        reasons.add_column(justify=justify)
    for name, entry in manifest["sources"].items():
        splits = entry["splits"]
        numbers = [len(entry["files"]), entry["rows"], entry["kept_rows"]]
        numbers += [sum(entry[key].values()) for key in ("rejected", "repaired")]
        numbers += [splits[split]["examples"] for split in ("train", "heldout")]
        numbers.append(sum(split["characters"] for split in splits.values()))
        table.add_row(plain(name), *(f"{number:,}" for number in numbers))
        for key in ("rejected", "repaired"):
            for reason, count in entry[key].items():
                reasons.add_row(plain(f"{name}: {key}"), f"{count:,}", plain(reason))
    for name in manifest.get("missing") or {}:
        reasons.add_row(plain(f"{name}: missing"), "0", "no files")
    return Group(table, "", reasons) if reasons.row_count else Group(table)


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


def encoded(example: Example | None, conversation: Conversation, tokenizer: Tokenizer) -> Group:
    """The tokens of an example: those learned green, those read grey. Where tokens are learned at their own place
    (masked tokens), what stands there is followed by what is learned, after an arrow."""
    head = plain(f"{conversation.source} {conversation.id}", "bold underline")
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
        yield encoded(None if item is None else item.example, dataset[index], tokenizer)


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


def rows(text: str) -> slice:
    """`0:5`, `7`, `-3:` as a slice; ValueError for anything else."""
    parts = [int(part) if part.strip() else None for part in text.split(":")]
    if len(parts) == 1 and parts[0] is not None:
        return slice(parts[0], parts[0] + 1 or None)
    if len(parts) == 2:
        return slice(*parts)
    raise ValueError(f"found {text!r}")


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError("expected one folder: python -m data_pipelines.inspect DIR")
    directory, console = Path(argv[1]), Console()
    try:
        manifest = read_manifest(directory)
        if not FLAGS.source:
            console.print(manifest_table(manifest))
            return
        dataset = open_source(directory, FLAGS.source, FLAGS.split)
        try:
            wanted = rows(FLAGS.rows)
        except ValueError:
            sys.exit(f"--rows: found {FLAGS.rows!r}; expected rows such as 0:5, 7 or -3:")
        indices = range(*wanted.indices(len(dataset)))
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
    flags.DEFINE_string("rows", "0:5", "Which rows: 0:5, 7 or -3:")
    flags.DEFINE_string("template", "", "koala, yuan, chat, text, tokenizer or a .jinja file: show training examples")
    flags.DEFINE_string("tokenizer", "", "Its file or folder; that of the prepared data by default")
    flags.DEFINE_integer("length", 2048, "Tokens a row")
    flags.DEFINE_float("fim_rate", 0.0, "Share of the documents that are cut to fill in the middle")
    flags.DEFINE_enum("corruption", "none", CORRUPTIONS, "What is masked of documents")
    flags.DEFINE_string("sentinels", SENTINELS, "Names of special tokens, or ids as 32000:32100")
    flags.DEFINE_string("mask_token", "", "A special token, or an id that the tokenizer does not use")
    app.run(main)
