"""The accounts of prepared data as a table for the terminal."""

from rich.console import Group
from rich.table import Table

from data_pipelines.datasets import Manifest
from data_pipelines.inert import plain


def manifest_table(manifest: Manifest) -> Group:
    """One line a source: rows that were read, kept and rejected; conversations that stages dropped or left. Below it,
    why."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("source", no_wrap=True)
    for title in ("files", "rows", "kept", "rejected", "repaired", "dropped", "train", "held out", "characters"):
        table.add_column(title, justify="right", no_wrap=True)
    reasons = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for justify in ("left", "right", "left"):
        reasons.add_column(justify=justify, no_wrap=justify == "left")
    for name, entry in manifest["sources"].items():
        splits = entry["splits"]
        numbers = [len(entry["files"]), entry["rows"], entry["kept_rows"]]
        numbers += [sum(entry[key].values()) for key in ("rejected", "repaired")]
        numbers.append(sum(sum(accounts["dropped"].values()) for accounts in entry["stages"].values()))
        numbers += [splits[split]["examples"] for split in ("train", "heldout")]
        numbers.append(sum(split["characters"] for split in splits.values()))
        table.add_row(plain(name), *(f"{number:,}" for number in numbers))
        for key in ("rejected", "repaired"):
            for reason, count in entry[key].items():
                reasons.add_row(plain(f"{name}: {key}"), f"{count:,}", plain(reason))
        for stage, accounts in entry["stages"].items():
            for reason, count in accounts["dropped"].items():
                reasons.add_row(plain(f"{name}: dropped by {stage}"), f"{count:,}", plain(reason))
    for name in manifest.get("missing") or {}:
        reasons.add_row(plain(f"{name}: missing"), "0", "no files")
    return Group(table, "", reasons) if reasons.row_count else Group(table)
