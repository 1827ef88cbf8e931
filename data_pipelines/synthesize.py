"""Have a language model write data, and keep what can be checked:

    python -m data_pipelines.synthesize --config=configs/data/synthesis_code.py \\
        --endpoint http://127.0.0.1:8000/v1 --model NAME --output DIR

`data_pipelines.synthesis` says what the routes are, and what stands against answers that are wrong or hostile;
`synthesis.collect` what is written. Generated code is run only with --execute, in bubblewrap, without network and with
limits. Without it, code is kept if it can be parsed, and marked as not verified.

A run that was stopped goes on when it is started again; a finished one asks nothing. A higher --config.count adds
prompts. The configuration (see configs/data/synthesis_code.py and synthesis_maths.py):

    route            "code" or "maths"
    count, seed      prompts, and what they are drawn by
    request          max_tokens, temperature, and `extra`: further fields of the request, such as {"top_p": 0.95}
    endpoint         concurrency, timeout_s of a request, retries, backoff_s (doubled each time), and key_variable: the
                     environment variable that holds the key
    code:  topics, words, tests, require, repair_rounds, drop_short, execute, sandbox (cpu_s, wall_s, memory_mb, tmp_mb)
    maths: seeds, shares, answers, agree
"""

import hashlib
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data_pipelines.errors import InputError, nearest
from data_pipelines.inert import plain
from data_pipelines.synthesis.code_route import CodeRoute
from data_pipelines.synthesis.collect import NO_REPLY, ROWS, collect
from data_pipelines.synthesis.endpoint import Endpoint, Message, Unanswered, key_from
from data_pipelines.synthesis.maths_route import MathsRoute, read_seeds
from data_pipelines.synthesis.sandbox import Limits, Sandbox
from data_pipelines.synthesis.topics import read_topics

BOTH = {"route", "count", "seed", "request", "endpoint"}
OF_ROUTE = {
    "code": {"topics", "words", "tests", "require", "repair_rounds", "drop_short", "execute", "sandbox"},
    "maths": {"seeds", "shares", "answers", "agree"},
}
SECTIONS = {
    "request": {"max_tokens", "temperature", "extra"},
    "endpoint": {"concurrency", "timeout_s", "retries", "backoff_s", "key_variable"},
    "sandbox": {"cpu_s", "wall_s", "memory_mb", "tmp_mb"},
}
NOT_EXECUTED = "NOT VERIFIED: nothing was executed. Code was kept because it can be parsed; it may be wrong or harmful."
HINT = "With --execute it is run in a sandbox, and what passes its tests is kept."


def synthesize(
    config: ConfigDict, endpoint: str, model: str, output: Path | str, *, bar: Progress | None = None
) -> dict[str, Any]:
    """Runs what `config` says and returns the content of yield.json. Raises InputError for a configuration, folder,
    endpoint or sandbox that does not do, OSError from the disk."""
    settings: dict[str, Any] = config.to_dict()
    check_keys(settings)
    stop = threading.Event()
    client = Endpoint(endpoint, model, **settings["request"], **client_options(settings["endpoint"]), sleep=stop.wait)
    route, of_files = make_route(settings)

    def ask(messages: Sequence[Message]) -> str:
        if stop.is_set():
            raise Unanswered(NO_REPLY, "the run was stopped", final=False)
        return client.ask(messages)

    task = bar.add_task("prompts", total=settings["count"]) if bar else None

    def on_done(done: int) -> None:
        if bar and task is not None:
            bar.update(task, completed=done)

    return collect(
        lambda index: route.work(index, ask),
        settings["count"],
        output,
        {key: value for key, value in settings.items() if key not in ("count", "endpoint")}
        | {"model": model, **of_files},
        concurrency=settings["endpoint"]["concurrency"],
        on_done=on_done,
        stop=stop,
    )


def make_route(settings: Mapping[str, Any]) -> tuple[CodeRoute | MathsRoute, dict[str, str]]:
    """The route, and hashes of what it reads besides the configuration."""
    if settings["route"] == "maths":
        path = settings["seeds"]
        try:
            route = MathsRoute(settings, read_seeds(path) if path else ())
            return route, {"seeds_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""}
        except OSError as error:
            raise InputError(f"config.seeds: {error}") from None
    topics = read_topics(settings["topics"])
    sandbox = Sandbox(Limits(**settings["sandbox"])) if settings["execute"] else None
    return CodeRoute(settings, topics, sandbox), {
        "topics_sha256": hashlib.sha256("\n".join(topics).encode()).hexdigest()
    }


def client_options(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: options[key] for key in ("timeout_s", "retries", "backoff_s")}
    return {**kept, "key": key_from(options["key_variable"])}


def check_keys(settings: Mapping[str, Any]) -> None:
    """Raises InputError for an unknown or missing key, and for numbers that make no sense."""
    if settings.get("route") not in OF_ROUTE:
        raise InputError(f"config.route: found {settings.get('route')!r}; expected {' or '.join(OF_ROUTE)}")
    check_section("", settings, BOTH | OF_ROUTE[settings["route"]])
    for section in sorted(SECTIONS.keys() & settings.keys()):
        check_section(f"{section}.", settings[section], SECTIONS[section])
    positive = {"count": settings["count"], "endpoint.concurrency": settings["endpoint"]["concurrency"]}
    positive |= {f"sandbox.{key}": value for key, value in settings.get("sandbox", {}).items() if key != "tmp_mb"}
    for name, value in positive.items():
        if not isinstance(value, int | float) or value <= 0:
            raise InputError(f"config.{name}: found {value!r}; expected more than 0")


def check_section(prefix: str, found: Mapping[str, Any], expected: set[str]) -> None:
    for key in sorted(found.keys() - expected):
        raise InputError(f"config.{prefix}{key}: found an unknown key{nearest(key, sorted(expected))}")
    for key in sorted(expected - found.keys()):
        raise InputError(f"config.{prefix}{key}: found none; expected a value")


def yield_table(result: Mapping[str, Any]) -> Table:
    """One line for what was kept, and one for each reason."""
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for justify in ("left", "right", "right"):
        table.add_column(justify=justify)
    lines = {"prompts": result["prompts"], "kept": result["kept"]}
    lines |= {f"  checked by {how}": count for how, count in result["checked"].items()}
    lines |= {"  after a repair": result["repaired"]} if result["repaired"] else {}
    lines |= {f"dropped: {reason}": count for reason, count in result["dropped"].items()}
    for name, count in lines.items():
        table.add_row(plain(name), f"{count:,}", f"{count / result['prompts']:.1%}")
    return table


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"found the argument {argv[1]!r}; expected flags alone")
    config, errors = FLAGS.config, Console(stderr=True)
    warnings.simplefilter("ignore", SyntaxWarning)  # about generated code
    if FLAGS.execute and "execute" in config:
        config.execute = True
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    unverified = config.get("route") == "code" and not config.get("execute")
    if unverified:
        errors.print(f"{NOT_EXECUTED} {HINT}", style="bold red")
    try:
        with Progress(
            TextColumn("{task.description}"), *columns, console=errors, disable=not errors.is_terminal
        ) as bar:
            result = synthesize(config, FLAGS.endpoint, FLAGS.model, FLAGS.output, bar=bar)
    except (InputError, OSError) as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(f"{FLAGS.output}: stopped; the same command goes on from here")
    Console().print(yield_table(result))
    print(f"{Path(FLAGS.output) / ROWS}: sha256 {result['sha256']}")
    if result["dropped"].get(NO_REPLY):
        print(f"{result['dropped'][NO_REPLY]:,} prompts got no reply; the same command asks them again")
    if unverified:
        errors.print(NOT_EXECUTED, style="bold red")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "What to write, such as configs/data/synthesis_code.py")
    flags.DEFINE_string("endpoint", None, "Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    flags.DEFINE_string("model", None, "The model to ask for")
    flags.DEFINE_string("output", None, "Folder to write, or to go on with")
    flags.DEFINE_bool("execute", False, "Run generated code, in bubblewrap")
    flags.mark_flags_as_required(["config", "endpoint", "model", "output"])
    app.run(main)
