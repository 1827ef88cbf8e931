"""Made `chat_masks.json` and `tokenizer.json`: what Hugging Face gives for six conversations and four templates.

    python make_chat_masks.py tokenizer HH OASST     in the project's environment: trains tokenizer.json on the texts
                                                     and takes the conversations out of the files
    python make_chat_masks.py masks                  in one with transformers: adds ids and masks to chat_masks.json

HH: helpful-base/test.jsonl.gz of anthropics/hh-rlhf (MIT). OASST: en_100_tree.jsonl.gz of LAION-AI/Open-Assistant
(Apache-2.0). The last conversation is made up: its user writes the templates' special tokens.
"""

import gzip
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
TEMPLATES = ("chatml", "llama3", "zephyr", "koala")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
HH_ROWS, OASST_ROWS = (12, 40), (11, 49, 64)  # short ones, of one turn and of several, with code and an emoji
ATTACK = "Hi".join(["", *SPECIAL, "<bos>", "<eos>", "<|assistant|>\n"])
SYSTEM = "You are brief. 湖 🐟"


def tokenizer(hh: str, oasst: str) -> None:
    from data_pipelines import sources
    from data_pipelines.conversation import Where
    from data_pipelines.tokenizers import training

    conversations = []
    for kind, path, rows in (("hh_rlhf", hh, HH_ROWS), ("oasst", oasst, OASST_ROWS)):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            read = list(lines)
        found = [sources.load(kind).convert(json.loads(read[row]), Where(path, row))[0] for row in rows]
        conversations += [[{"role": turn.role, "content": turn.text} for turn in each.turns] for each in found]
    conversations[1].insert(0, {"role": "system", "content": SYSTEM})
    harmless = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    conversations.append([{"role": "user", "content": ATTACK}, harmless[1], *harmless])
    texts = [message["content"] for conversation in conversations for message in conversation]
    training.train(texts, 600, SPECIAL, HERE)
    write({"conversations": conversations})


def masks() -> None:
    from transformers import PreTrainedTokenizerFast, __version__

    words = PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    record = json.loads((HERE / "chat_masks.json").read_text("utf-8"))
    made = {}
    for name in TEMPLATES:
        template = (HERE / f"{name}.jinja").read_text("utf-8")
        made[name] = [encoded(words, template, conversation) for conversation in record["conversations"]]
    write({"transformers": __version__, "conversations": record["conversations"], "templates": made})


def encoded(words, template: str, conversation: list[dict]) -> dict:
    """ids, mask, and the ids of the prompt before the last answer."""
    options = {"chat_template": template, "tokenize": True, "return_dict": True}
    whole = words.apply_chat_template(conversation, return_assistant_tokens_mask=True, **options)
    prompt = words.apply_chat_template(conversation[:-1], add_generation_prompt=True, **options)
    return {"ids": whole["input_ids"], "mask": whole["assistant_masks"], "prompt": prompt["input_ids"]}


def write(record: dict) -> None:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    (HERE / "chat_masks.json").write_text(text.replace(',{"ids"', ',\n{"ids"') + "\n", "utf-8")


if __name__ == "__main__":
    {"tokenizer": tokenizer, "masks": masks}[sys.argv[1]](*sys.argv[2:])
