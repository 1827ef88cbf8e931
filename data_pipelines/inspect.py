"""Look at prepared data: `python -m data_pipelines.inspect DIR [--source NAME --split train --rows 0:5]`.

Without a source: the table of the manifest. With one: its conversations; text that is learned is green, text that is
only read is grey. The text of the data cannot give orders to the terminal: markup is shown as it is, and control
characters as their symbols.
"""

import sys
from pathlib import Path

from absl import app, flags
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.datasets import DatasetError, Manifest, open_source, read_manifest

# Control characters, and those that turn the direction of writing around; line breaks and tabs stay.
INERT = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
INERT |= dict.fromkeys((*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def plain(text: str, style: str = "") -> Text:
    return Text(text.translate(INERT), style)


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
    return Group(
        plain(f"{conversation.source} {conversation.id}", "bold underline"), *map(turn_lines, conversation.turns), ""
    )


def turn_lines(turn: Turn) -> Text:
    unhelpful = "" if turn.helpful else ", unhelpful"
    head = plain(f"{turn.role} (weight {turn.weight:g}{unhelpful})\n", "bold")
    return Text.assemble(head, plain(turn.text, "green" if turn.weight > 0 else "bright_black"))


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
        for index in range(*wanted.indices(len(dataset))):
            console.print(rendered(dataset[index]))
    except DatasetError as error:
        sys.exit(f"{error}")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string("source", None, "The source to show; without it, the table of all")
    flags.DEFINE_string("split", "train", "train or heldout")
    flags.DEFINE_string("rows", "0:5", "Which rows: 0:5, 7 or -3:")
    app.run(main)
