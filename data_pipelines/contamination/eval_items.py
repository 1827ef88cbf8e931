"""The items of benchmarks, read from their files: the texts that training data must not hold.

A benchmark is a name and its files, or these and how they are to be read:

    "gsm8k": "gsm8k/test.jsonl.gz"
    "ours": {"files": ["ours/*.jsonl"], "question": ["{prompt}"], "answer": ["{solution.text}"]}

Files are .json, .jsonl, .csv and .txt, each also as .gz, and .zip of these (`members` says which: "*test/*"). A .txt
file has an item a line, in the form of Yuan 2.0: "question[SEP]answer", with <n> for line breaks. A row is JSON; one
Python dict a line, as in Yuan's TruthfulQA_CN, is refused rather than evaluated.

Which texts of a row count is said by templates such as "{question}" or "{instruction} {input}"; a name may lead
inwards ("turns.0"), a list is joined with spaces, and a template is left out for a row in which all of its names are
null, empty or absent. `question` are the texts to look for; `short` those looked for besides in an item whose questions
are all short, usually with the choices, in the ways that they are commonly written; `answer` counts if answers do.
`LAYOUTS` knows some benchmarks by name, or by `layout`. Without either, every text of 50 characters or more counts, at
any depth, or the longest if there is none, except under a name that says that it is an answer or no content.
"""

import dataclasses
import fnmatch
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_pipelines.conversation import DataError, Where
from data_pipelines.errors import InputError, shown
from data_pipelines.files.records import Row, read_rows
from data_pipelines.sources import row_id

CHOICES = ("{question} {A} {B} {C} {D}", "{question} A {A} B {B} C {C} D {D}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Templates, the names of the columns where a .csv file has no header, and which members of a .zip are read."""

    question: Sequence[str] = ()
    short: Sequence[str] = ()
    answer: Sequence[str] = ()
    columns: Sequence[str] = ()
    members: str = "*"


@dataclasses.dataclass(frozen=True)
class Item:
    """`id` is the file and the row. `short` are the texts to add if all of `texts` are short."""

    id: str
    texts: tuple[str, ...]
    short: tuple[str, ...] = ()


ANY = Layout()
LAYOUTS: dict[str, Layout] = {
    "agieval": Layout(("{passage}", "{question}"), ("{question} {options}",), ("{answer}", "{other.solution}")),
    "alpaca_eval": Layout(("{instruction} {input}",), (), ("{output}",)),
    "ceval": Layout(("{question}",), CHOICES),
    "cmmlu": Layout(("{Question}",), tuple(choice.replace("question", "Question") for choice in CHOICES)),
    "gsm8k": Layout(("{question}",), (), ("{answer}",)),
    "humaneval": Layout(("{prompt}",), (), ("{canonical_solution}",)),
    "koala_test_set": Layout(("{prompt}",)),
    "math": Layout(("{problem}",), (), ("{solution}",)),
    "mbpp": Layout(("{prompt}",), (), ("{canonical_solution}",)),
    "mmlu": Layout(("{question}",), CHOICES, (), ("question", "A", "B", "C", "D", "answer"), "*.csv"),
    "mt_bench": Layout(("{turns.0}", "{turns.1}")),
    "self_instruct": Layout(("{instruction} {instances.0.input}",), (), ("{instances.0.output}",)),
    "truthfulqa": Layout(("{Question}",), (), ("{Best Answer}",)),
    "vicuna_bench": Layout(("{turns.0}",)),
    "yuan": Layout(("{question}",), (), ("{answer}",)),
}
ANSWERS = {
    "answer", "answers", "canonical_solution", "chosen", "completion", "correct_answers", "incorrect_answers", "output",
    "rationale", "reference", "rejected", "response", "solution", "target", "test",
}  # fmt: skip
NO_CONTENT = {
    "author", "category", "class", "dataset", "datasplit", "date", "entry_point", "generator", "id", "label", "lang",
    "language", "level", "name", "question_id", "source", "split", "subject", "task", "task_id", "title", "type",
    "unique_id", "url",
}  # fmt: skip
LONG = 50  # characters
NAME = re.compile(r"\{([^{}]+)\}")


def read_benchmark(name: str, options: Any, folder: Path, *, answers: bool) -> Iterator[Item]:
    """The items of a benchmark in the order of its files. `options` is what a configuration says about it.

    Raises InputError where there are no files or the options do not fit, DataError for a row that cannot be read or
    has none of the names: an item that is left out would let the training data keep it.
    """
    spec = options if isinstance(options, Mapping) else {"files": options}
    known = ("files", "members", "layout", "question", "short", "answer", "columns")
    if unknown := [key for key in spec if key not in known]:
        raise InputError(f"benchmarks.{name}: found the key {unknown[0]!r}; expected one of {', '.join(known)}")
    layout = layout_of(name, spec)
    for path in benchmark_files(name, spec, folder):
        for where, row in rows_of(path, path.relative_to(folder).as_posix(), layout):
            yield item(row, where, layout, answers)


def layout_of(name: str, spec: Mapping[str, Any]) -> Layout:
    given: dict[str, Any] = {
        key: tuple(spec[key]) for key in ("question", "short", "answer", "columns") if spec.get(key)
    }
    if spec.get("members"):
        given["members"] = spec["members"]
    kind = spec.get("layout") or name
    if spec.get("layout") and kind not in (*LAYOUTS, "any"):
        raise InputError(f"benchmarks.{name}.layout: found {kind!r}; expected one of {', '.join(LAYOUTS)}, any")
    if "question" in given:
        return Layout(**given)
    return dataclasses.replace(LAYOUTS.get(kind, ANY), **given)


def benchmark_files(name: str, options: Any, folder: Path) -> list[Path]:
    """Raises InputError if there are none."""
    files = options.get("files") or () if isinstance(options, Mapping) else options
    patterns = (files,) if isinstance(files, str) else tuple(files)
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not found:
        raise InputError(
            f"benchmarks.{name}.files: found no file {', '.join(patterns)} in {folder}; expected its items"
        )
    return found


def rows_of(path: Path, name: str, layout: Layout) -> Iterator[Row]:
    """The rows of a file, or of the members of a .zip."""
    if path.suffix.lower() != ".zip":
        with open(path, "rb", buffering=0) as file:
            yield from rows_of_one(name, layout, file)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            names = sorted(fnmatch.filter(infos, layout.members))
            if not names:
                raise InputError(f"{path}: found no member {layout.members!r}; expected one or more")
            for each in names:
                with archive.open(infos[each]) as member:
                    yield from rows_of_one(f"{name}/{each}", layout, cast(BinaryIO, member))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, unknown method, encrypted
        raise InputError(f"{path}: found an archive that cannot be read ({error}); expected an intact .zip") from error


def rows_of_one(name: str, layout: Layout, raw: BinaryIO) -> Iterator[Row]:
    try:
        for where, row in read_rows(name, raw=raw, separator="\n", columns=layout.columns or None):
            if name.removesuffix(".gz").endswith(".txt"):
                question, _, answer = row["text"].replace("<n>", "\n").replace("<sep>", "[SEP]").partition("[SEP]")
                row = {"question": question, "answer": answer}
            yield where, row
    except DataError as error:
        if "{'" in error.found:
            expected = "JSON; rewrite Python's dicts, as with json.dumps(ast.literal_eval(line))"
            raise DataError(error.where, error.found, expected, error.reason) from error
        raise


def item(row: Mapping[str, Any], where: Where, layout: Layout, answers: bool) -> Item:
    if not layout.question:
        every = list(texts_within(row, answers))
        long = [text for text in every if len(text) >= LONG]
        return Item(row_id(where), tuple(long or sorted(every, key=len)[-1:]))
    templates = (*layout.question, *(layout.answer if answers else ()))
    names = [name for template in templates for name in NAME.findall(template)]
    if not any(name.split(".")[0] in row for name in names):
        raise DataError(where, shown(row), f"one of {', '.join(names)}", "wrong_keys")
    texts = tuple(filter(None, (filled(template, row) for template in templates)))
    return Item(row_id(where), texts, tuple(filter(None, (filled(template, row) for template in layout.short))))


def filled(template: str, row: Mapping[str, Any]) -> str:
    """The template with the texts of the row; empty if they are."""
    texts = {name: as_text(reached(row, name)) for name in NAME.findall(template)}
    if not any(text.strip() for text in texts.values()):
        return ""
    return NAME.sub(lambda found: texts[found[1]], template)


def reached(value: Any, name: str) -> Any:
    for key in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(as_text, value))
    return "" if value is None or isinstance(value, Mapping | bool) else str(value)


def texts_within(value: Any, answers: bool) -> Iterator[str]:
    """Every text in a row, of whatever name, but those of `NO_CONTENT` and, as it is wanted, `ANSWERS`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from texts_within(each, answers)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            name = str(key).lower().replace(" ", "_")
            if name not in NO_CONTENT and (answers or name not in ANSWERS):
                yield from texts_within(each, answers)
