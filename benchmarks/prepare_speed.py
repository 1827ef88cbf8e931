"""From files of conversations to tokens with the assistant's mask, beside Hugging Face `datasets.map` doing the same.

    python benchmarks/prepare_speed.py --peer=~/peer/bin/python --tokenizer=TOKENIZER.json --prepared=data/koala

The conversations of prepared data are written as rows {"messages": [...]} in four files, from which both sides start,
each time as new processes and alternately. Ours reads, checks, splits, writes the dataset and stores its tokens (two
commands); the peer reads the JSON and maps it, with the same template and tokenizer. Both use two processes, and must
come to the same numbers of tokens and of learned tokens. Ratios are of wall time and of CPU time, children included.
`--joined=N` makes one conversation of N, since those of ShareGPT are some ten times as long as most that are at hand.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from data_pipelines.conversation import Conversation
from data_pipelines.datasets import open_source, read_manifest

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "tests/golden/chat_masks/chatml.jinja"
SPECIAL = ("<|im_start|>", "<|im_end|>")
CONFIG = """
from ml_collections import ConfigDict
def get_config(arg=""):
    return ConfigDict({"sources": {"chats": {"kind": "jsonl", "patterns": ("*.jsonl",)}}, "policy": "error"})
"""
FILES = 4


def write_rows(prepared: Path, folder: Path, most: int, joined: int) -> int:
    """Rows of all conversations that a chat template can lay out, `joined` of them a row; returns how many."""
    count = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{number}.jsonl", "w")) for number in range(FILES)]
        every = chats(prepared)
        for row in itertools.islice(iter(lambda: [*itertools.islice(every, joined)], []), most):
            messages = [{"role": turn.role, "content": turn.text} for chat in row for turn in chat.turns]
            files[count % FILES].write(json.dumps({"messages": messages}) + "\n")
            count += 1
    return count


def chats(prepared: Path) -> Iterator[Conversation]:
    for name in read_manifest(prepared)["sources"]:
        yield from filter(plain, open_source(prepared, name, "train"))


def plain(conversation: Conversation) -> bool:
    """Whether it says no more than messages with roles do."""
    turns = conversation.turns
    roles = all(t.role in ("user", "assistant") and t.weight == (t.role == "assistant") for t in turns)
    return roles and all(turn.helpful for turn in turns) and not conversation.tools


def write_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer with the template's special tokens, as both sides read it."""
    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": SPECIAL[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def timed(*commands: list[str]) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds of all processes, and what the last one printed."""
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in commands:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - wall, cpu, done.stdout


def ours(folder: Path) -> tuple[float, float, dict[str, Any]]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(folder / "out.cache", ignore_errors=True)
    python, out = [sys.executable, "-m"], str(folder / "out")
    prepare = [f"--config={folder / 'config.py'}", f"--input={folder / 'rows'}", f"--output={out}", "--workers=2"]
    tokenise = [out, f"--template={TEMPLATE}", f"--tokenizer={folder / 'tokenizer'}", "--length=1000000", "--workers=2"]
    wall, cpu, _ = timed([*python, "data_pipelines.prepare", *prepare], [*python, "data_pipelines.tokenize", *tokenise])
    return wall, cpu, counted(folder)


def counted(folder: Path) -> dict[str, Any]:
    """What was stored, counted afterwards."""
    from data_pipelines.batches.tokens import find
    from data_pipelines.templates.template import load_template
    from data_pipelines.tokenizers.tokenizer import load_tokenizer

    template = load_template(str(TEMPLATE), load_tokenizer(folder / "tokenizer"), max_length=1_000_001)
    split = read_manifest(folder / "out")["sources"]["chats"]["splits"]["train"]
    store = find(folder / "out", "chats", "train", split["sha256"], template)
    assert store is not None
    examples = [store.read(index)[1] for index in range(len(store))]
    tokens = sum(len(example.ids) for example in examples)
    return {"conversations": len(store), "tokens": tokens, "learned": sum(int((e.weights > 0).sum()) for e in examples)}


def theirs(folder: Path, peer: str) -> tuple[float, float, dict[str, Any]]:
    script = str(Path(__file__).with_name("prepare_peer.py"))
    files = str(folder / "rows" / "*.jsonl")
    wall, cpu, told = timed([peer, script, files, str(folder / "tokenizer"), str(TEMPLATE), "2"])
    return wall, cpu, json.loads(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=1 << 30)
    parser.add_argument("--joined", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows").mkdir()
        (folder / "config.py").write_text(CONFIG)
        count = write_rows(arguments.prepared, folder / "rows", arguments.conversations, arguments.joined)
        size = sum(path.stat().st_size for path in (folder / "rows").iterdir())
        write_tokenizer(arguments.tokenizer, folder / "tokenizer")
        print(f"{count:,} conversations, {size / 1e6:.1f} MB", flush=True)
        ratios = []
        for _ in range(arguments.rounds):
            wall, cpu, found = ours(folder)
            peer_wall, peer_cpu, expected = theirs(folder, os.path.expanduser(arguments.peer))
            same = "the same tokens" if found == expected else f"OTHER TOKENS {found} {expected}"
            ratios.append((peer_wall / wall, peer_cpu / cpu))
            print(
                f"ours {wall:.1f} s wall, {cpu:.1f} s CPU; map {peer_wall:.1f} s wall, {peer_cpu:.1f} s CPU; "
                f"ratio {ratios[-1][0]:.2f} wall, {ratios[-1][1]:.2f} CPU; {same}: {expected}",
                flush=True,
            )
        wall, cpu = (statistics.median(column) for column in zip(*ratios))
        print(f"median: {wall:.2f} times as fast by wall time, {cpu:.2f} by CPU time")


if __name__ == "__main__":
    main()
