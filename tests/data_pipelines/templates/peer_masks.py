"""Runs in an interpreter with transformers: ids and masks that Hugging Face gives for conversations and templates.

    python peer_masks.py FOLDER < cases.json
    {"tokenizers": {name: {"bos_token": …, "eos_token": …}}, "templates": {name: jinja},
     "cases": [[tokenizer, template, messages, tools or null], …]}

FOLDER/<tokenizer>/tokenizer.json are the tokenizers; [ids, mask] of every case goes to FOLDER/masks.json, in order.
"""

import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast


def main(folder: Path) -> None:
    asked = json.load(sys.stdin)
    words = {
        name: PreTrainedTokenizerFast(tokenizer_file=str(folder / name / "tokenizer.json"), **special)
        for name, special in asked["tokenizers"].items()
    }
    made = []
    for tokenizer, template, messages, tools in asked["cases"]:
        encoded = words[tokenizer].apply_chat_template(
            messages,
            tools=tools,
            chat_template=asked["templates"][template],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        made.append([encoded["input_ids"], encoded["assistant_masks"]])
    (folder / "masks.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
