"""The peer of prepare_speed.py: Hugging Face `datasets.map` over conversations, tokenised with the assistant's mask.
Runs in an environment of its own, with transformers and datasets.

    python prepare_peer.py CONVERSATIONS.jsonl TOKENIZER_FOLDER TEMPLATE.jinja PROCESSES

prints the numbers of conversations, tokens and learned tokens as JSON. What it writes goes to a folder that is removed.
"""

import json
import sys
import tempfile
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerFast


def main(file: str, tokenizer_folder: str, template: str, processes: int) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, chat_template=Path(template).read_text())

    def encode(batch: dict) -> dict:
        encoded = tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
        mapped = rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names)
        ids, masks = mapped.data.column("input_ids"), mapped.data.column("assistant_masks")
        tokens = sum(len(chunk.flatten()) for chunk in ids.chunks)
        learned = sum(int(chunk.flatten().to_numpy().sum()) for chunk in masks.chunks)
        print(json.dumps({"conversations": len(mapped), "tokens": tokens, "learned": learned}))


if __name__ == "__main__":
    datasets.disable_progress_bars()
    main(*sys.argv[1:4], int(sys.argv[4]))
