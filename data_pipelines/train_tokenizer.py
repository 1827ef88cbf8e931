"""Train a subword tokenizer: `python -m data_pipelines.train_tokenizer --input FILE... --vocab_size N --output DIR`.

Byte-level BPE, as one file tokenizer.json (see `tokenizers.training`). With --bytes nothing is trained: a token is a
byte.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence

from absl import app, flags

from data_pipelines.tokenizers.training import CHAT_TOKENS, FILE, train, write_bytes


def lines(paths: Iterable[str]) -> Iterator[str]:
    """Line by line, each with its line break, so that a file of any size fits."""
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                yield from file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: found {error}; expected UTF-8") from error


def main(argv: Sequence[str]) -> None:
    values = flags.FLAGS
    try:
        if values.bytes:
            write_bytes(values.special_tokens, values.output)
            return
        train(lines([*values.input, *argv[1:]]), values.vocab_size, values.special_tokens, values.output)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    flags.DEFINE_multi_string("input", [], "A text file, UTF-8; more of them may follow.")
    flags.DEFINE_bool("bytes", False, "A token a byte: nothing is trained, and no input read.")
    flags.DEFINE_integer("vocab_size", 2048, "Tokens in all, with the special tokens and the 256 bytes.")
    flags.DEFINE_list("special_tokens", list(CHAT_TOKENS), "The tokens after <pad>, <bos> and <eos>.")
    flags.DEFINE_string("output", None, f"The folder that {FILE} is written to.", required=True)
    app.run(main)
