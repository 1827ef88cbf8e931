"""Talk to a model in the terminal.

    python -m easylm_plus.chat --checkpoint=runs/koala_tiny
    python -m easylm_plus.chat --checkpoint=runs/koala_tiny --prompt="Reverse the letters: k q x f"

--checkpoint is a run's folder, a Hugging Face folder or a llama2.c file. Inside the chat: /reset forgets the
conversation, /system TEXT sets a system prompt, /set temperature=0.7 (top_k, top_p, seed, max_new_tokens) changes
an option, /help lists these, /quit or Ctrl-D ends. Ctrl-C stops an answer.
"""

import dataclasses
import sys
import time
from collections.abc import Callable

from absl import flags

from data_pipelines.conversation import Conversation, Turn
from easylm_plus.door import console, run
from easylm_plus.errors import UserError
from easylm_plus.inference.chat import Chatter
from easylm_plus.inference.load import open_model, told
from easylm_plus.inference.sampling import Sampling, checked
from easylm_plus.parallel import cluster

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "run folder, Hugging Face folder or llama2.c file", required=True)
KV_CACHE = flags.DEFINE_enum("kv_cache", None, ["compute", "int8"], "what decoding keeps keys and values as")
STEP = flags.DEFINE_integer("step", None, "step of the run; the last by default")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "replaces the checkpoint's tokenizer")
TEMPLATE = flags.DEFINE_string("template", "", "replaces the checkpoint's template: koala, chat, text or a jinja file")
PROMPT = flags.DEFINE_string("prompt", None, "answer this and exit")
SYSTEM = flags.DEFINE_string("system", "", "system prompt")
STOP = flags.DEFINE_multi_string("stop", [], "texts that end an answer, beside the template's own")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: greedy")
TOP_K = flags.DEFINE_integer("top_k", 0, "0: all tokens")
TOP_P = flags.DEFINE_float("top_p", 1.0, "1: all tokens")
SEED = flags.DEFINE_integer("seed", 0, "of the sampling")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "longest answer")


@dataclasses.dataclass
class Options:
    """What /set can change."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_new_tokens: int

    def sampling(self) -> Sampling:
        return checked(Sampling(self.temperature, self.top_k, self.top_p))

    def set(self, assignment: str) -> None:
        """Applies "key=value"; the old value stays if the new one makes no sense."""
        key, _, text = assignment.partition("=")
        fields = {field.name: field.type for field in dataclasses.fields(self)}
        if key not in fields:
            raise UserError(f"/set {key}: expected one of {', '.join(fields)}")
        try:
            changed = dataclasses.replace(self, **{key: fields[key](text)})  # type: ignore[operator]
        except ValueError:
            raise UserError(f"/set {assignment}: expected a number") from None
        changed.sampling()
        setattr(self, key, getattr(changed, key))


def main() -> int:
    """Answers one prompt, or holds a conversation."""
    cluster.use_compilation_cache()
    texts = {"tokenizer": TOKENIZER.value, "template": TEMPLATE.value, "kv_cache": KV_CACHE.value or ""}
    opened = open_model(CHECKPOINT.value, step=STEP.value, **texts)
    if line := told(opened.params):
        print(line, file=sys.stderr)
    chatter = opened.chatter(tuple(STOP.value))
    options = Options(TEMPERATURE.value, TOP_K.value, TOP_P.value, SEED.value, MAX_NEW_TOKENS.value)
    options.sampling()
    history = [Turn("system", SYSTEM.value, 0.0)] if SYSTEM.value else []
    if PROMPT.value is not None:
        answer(chatter, [*history, Turn("user", PROMPT.value, 0.0)], options)
        return 0
    console.print(f"{opened.place}; /help lists the commands, Ctrl-D ends")
    return converse(chatter, history, options, lambda: console.input("[bold]you>[/bold] "))


def converse(chatter: Chatter, history: list[Turn], options: Options, ask: Callable[[], str]) -> int:
    """Asks, answers and remembers, until the input ends or /quit."""
    while True:
        try:
            text = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        try:
            if text == "/quit":
                return 0
            if text.startswith("/"):
                command(text, history, options)
            elif text:
                turns = [*history, Turn("user", text, 0.0)]
                reply = answer(chatter, turns, options)
                history[:] = [*turns, Turn("assistant", reply, 0.0)]
        except UserError as error:
            console.print(str(error), style="red", markup=False)


def command(text: str, history: list[Turn], options: Options) -> None:
    """Carries out a /command."""
    name, _, rest = text.partition(" ")
    if name == "/reset":
        history[:] = [turn for turn in history if turn.role == "system"]
    elif name == "/system":
        history[:] = [Turn("system", rest, 0.0)] if rest else []
    elif name == "/set":
        options.set(rest.strip())
    elif name == "/help":
        console.print("/reset  /system TEXT  /set KEY=VALUE  /quit", markup=False)
        console.print(str(options), markup=False)
    else:
        raise UserError(f"unknown command {name}; /help lists them")


def answer(chatter: Chatter, turns: list[Turn], options: Options) -> str:
    """Streams one answer to the terminal; Ctrl-C ends it early. The text is shown verbatim, controls left out."""
    pieces: list[str] = []
    started = time.perf_counter()
    try:
        conversation = Conversation("chat", "0", tuple(turns))
        for piece in chatter.stream(conversation, options.max_new_tokens, options.sampling(), options.seed):
            pieces.append(piece)
            sys.stdout.write("".join(c for c in piece if c.isprintable() or c in "\n\t"))
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    print(flush=True)
    if sys.stdout.isatty():
        console.print(f"{time.perf_counter() - started:.1f} s", style="dim")
    return "".join(pieces)


if __name__ == "__main__":
    run(main)
