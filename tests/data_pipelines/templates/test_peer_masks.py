"""Masks of 200 real conversations and four templates, and of calls of tools, beside those of Hugging Face (`parity`).

Two tokenizers: GPT-2's tokenizer.json with the templates' special tokens added, and Llama 3's file of tiktoken, which
Hugging Face gets as the tokenizer.json of the same merges. `test_chat_masks` has a few of them stored.
"""

import base64
import contextlib
import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_chat_masks import GOLDEN, TEMPLATES
from test_tool_calls import TOOLS
from tiny_tokenizers import REAL
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from data_pipelines import sources
from data_pipelines.conversation import DataError
from data_pipelines.files.records import read_rows
from data_pipelines.templates.template import load_template
from data_pipelines.tokenizers import tiktoken_files
from data_pipelines.tokenizers.byte_level import byte_pieces
from data_pipelines.tokenizers.tokenizer import load_tokenizer
from data_pipelines.tool_calls import messages

pytestmark = [
    pytest.mark.parity,
    pytest.mark.real_data,
    pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data"),
]
FILES = (  # kind, file, every n-th row, conversations
    ("sharegpt", "sharegpt/derived_oasst_en_best_path_sharegpt.json.gz", 1, 100),
    ("hh_rlhf", "hh_rlhf/helpful-base/test.jsonl.gz", 50, 40),
    ("alpaca", "alpaca/alpaca_5000.json.gz", 150, 20),
    ("alpaca", "alpaca/alpaca_zh_demo.json.gz", 60, 10),
    ("sharegpt", "sharegpt/fastchat_dummy_conversation_with_system.json.gz", 1, 6),
    ("preference", "preference/dpo_zh_demo.json.gz", 1, 24),
)
TOOL_FILES = (("sharegpt", "sharegpt/glaive_toolcall_en_demo.json.gz", 12, 20),
              ("sharegpt", "sharegpt/glaive_toolcall_zh_demo.json.gz", 12, 20))  # fmt: skip
NEW = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
RENAMED = {128_002: "<|im_start|>", 128_003: "<|im_end|>"}
SPECIAL = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
}


def conversations(files):
    return [each for kind, name, step, count in files for each in itertools.islice(converted(kind, name, step), count)]


def converted(kind, name, step):
    """The first conversation of every `step`-th row, where the row fits."""
    for where, row in itertools.islice(read_rows(REAL / "koala" / name), 0, None, step):
        with contextlib.suppress(DataError):
            yield sources.load(kind).convert(row, where)[0]


def gpt2(folder):
    """Written for Hugging Face; ours opens the same file."""
    words = Tokenizer.from_file(str(REAL / "tokenizers" / "gpt2" / "tokenizer.json"))
    words.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in NEW])
    words.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def llama3(folder):
    """Written for Hugging Face: every way to cut a token in two that are tokens is a merge, the ranks their order."""
    model = REAL / "tokenizers" / "llama3_tiktoken" / "tokenizer.model"
    ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(model.read_bytes().splitlines())}
    spelling = byte_pieces()
    spelled = lambda token: "".join(spelling[byte] for byte in token)
    merges = []
    for token in ranks:
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [(spelled(a), spelled(b)) for _, _, a, b in sorted(known)]
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    words = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tiktoken_files.WORDS), behavior="isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    words.decoder = decoders.ByteLevel()
    names = dict(enumerate(tiktoken_files.SPECIAL, start=tiktoken_files.TOKENS)) | RENAMED
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
    words.save(str(folder / "tokenizer.json"))
    (folder / "ours").mkdir()
    (folder / "ours" / "tokenizer.model").symlink_to(model)
    added = {i: {"content": name, "special": True} for i, name in RENAMED.items()}
    (folder / "ours" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return load_tokenizer(folder / "ours")


@pytest.fixture(scope="module")
def compared(peer, tmp_path_factory):
    """[(tokenizer's name, template's name, conversation, our example, their ids, their mask)]."""
    folder = tmp_path_factory.mktemp("masks")
    for name in SPECIAL:
        (folder / name).mkdir()
    words = {"gpt2": gpt2(folder / "gpt2"), "llama3": llama3(folder / "llama3")}
    written = {name: (GOLDEN / f"{name}.jinja").read_text("utf-8") for name in TEMPLATES} | {"tools": TOOLS}
    plain, called = conversations(FILES), conversations(TOOL_FILES)
    ours, cases = [], []
    for tokenizer, name in itertools.product(words, written):
        template = load_template(written[name], words[tokenizer])
        chosen = called if name == "tools" else plain
        for conversation, example in zip(chosen, template.encode_many(chosen)):
            tools = json.loads(conversation.tools) if conversation.tools else None
            cases.append([tokenizer, name, messages(conversation.turns)[0], tools])
            ours.append((tokenizer, name, conversation, example))
    asked = {"tokenizers": SPECIAL, "templates": written, "cases": cases}
    script = Path(__file__).with_name("peer_masks.py")
    subprocess.run([peer, script, folder], input=json.dumps(asked), text=True, check=True, timeout=600)
    theirs = json.loads((folder / "masks.json").read_text())
    return [(*mine, *their) for mine, their in zip(ours, theirs, strict=True)]


def different(compared, name, shift=0):
    """Conversations of which an id or a place of the mask differs."""
    return [
        (tokenizer, conversation.id)
        for tokenizer, template, conversation, example, ids, mask in compared
        if template == name
        and (example.ids.tolist() != ids or np.roll(example.weights > 0, shift).tolist() != [m == 1 for m in mask])
    ]


@pytest.mark.parametrize("name", [*TEMPLATES, "tools"])
def test_ids_and_masks_token_for_token(compared, name):
    count = sum(case[1] == name for case in compared)
    assert count == 2 * (40 if name == "tools" else 200)
    assert different(compared, name) == []
    assert len(different(compared, name, shift=1)) == len(different(compared, name, shift=-1)) == count
    assert all(0 < sum(mask) < len(mask) for _, template, *_, mask in compared if template == name)


def test_what_was_compared(compared):
    """Several turns, system prompts, calls of tools, and more than Latin letters."""
    chosen = {case[2].id: case[2] for case in compared if case[:2] == ("gpt2", "chatml")}
    roles = [[turn.role for turn in conversation.turns] for conversation in chosen.values()]
    assert sum(len(each) > 2 for each in roles) > 50 and sum(each[0] == "system" for each in roles) > 10
    assert sum(not conversation.turns[-1].text.isascii() for conversation in chosen.values()) > 20
    called = [case[2] for case in compared if case[:2] == ("gpt2", "tools")]
    assert sum(any(turn.role == "call" for turn in conversation.turns) for conversation in called) > 10
