"""A page about prepared data: `python -m data_pipelines.report DIR --output=report.html`.

One HTML file that needs nothing else, without scripts: what was read, left out and written, source by source; lengths,
turns, roles, languages, repeated questions; samples of what was left out; the mixture; contamination. With --template
(and --tokenizer, by default that of DIR) lengths are in tokens, and examples are shown token by token, with what is
learned marked, and as packed rows. With --run, once or more, losses by source of these runs stand side by side, and
template and mixture are theirs; with --compare, other prepared folders stand beside DIR:

    python -m data_pipelines.report data/koala --template=koala --tokenizer=tokenizer.model --output=report.html
    python -m data_pipelines.report data/koala_all --compare=data/koala_distill \
        --run=runs/koala_all --run=runs/koala_distill --output=report.html

Examples are counted in one pass over all of them, and tokenised as samples of --sample a source (0: all). The same
folder and flags give the same bytes.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console

from data_pipelines.datasets import MANIFEST, read_manifest
from data_pipelines.errors import InputError
from data_pipelines.reporting import accounts as accounting
from data_pipelines.reporting import charts, pictures, views
from data_pipelines.reporting.encoding import encode_sample
from data_pipelines.reporting.numbers import date, size
from data_pipelines.reporting.page import render
from data_pipelines.reporting.recipe import Recipe, learned_by, tokenizer_of
from data_pipelines.reporting.rejects import read_rejects
from data_pipelines.reporting.rendered import show, show_turns
from data_pipelines.reporting.runs import Run, names_of, read_run
from data_pipelines.reporting.scan import scan_all, top_prompts
from data_pipelines.templates.corruption import SENTINELS
from data_pipelines.templates.text_objective import CORRUPTIONS
from data_pipelines.workers import Workers, cores


def report(
    directory: Path,
    *,
    recipe: Recipe | None = None,
    run_folders: Sequence[Path] = (),
    compare: Sequence[Path] = (),
    sources: Sequence[str] = (),
    epochs: float = 1.0,
    seed: int = 0,
    sample: int = 2000,
    examples: int = 3,
    workers: int = 1,
) -> str:
    """The page about `directory`. recipe: how rows are made; by default as the first of the runs has it, and without
    one lengths are in characters. sources, epochs, seed: the mixture to show where there is no run; `sources` are
    names or name=weight. sample: examples a source that are tokenised; 0: all.

    Raises InputError and FileNotFoundError for what is not there or does not fit.
    """
    ###################################### What there is ##########################################
    paths = [directory, *compare]
    folders = [views.open_folder(*each) for each in zip(paths, names_of(paths), map(read_manifest, paths))]
    manifest, accounts = folders[0].manifest, folders[0].accounts
    runs = [read_run(folder, name) for folder, name in zip(run_folders, names_of(run_folders))]
    recipe = recipe or recipe_of(runs)
    stages, splits = accounting.stage_names(accounts), accounting.split_names(accounts)

    ###################################### Passes over the data ###################################
    with Workers(workers) as pool:
        rejects_file = directory / "rejects.jsonl"
        size_of_it = rejects_file.stat().st_size if rejects_file.exists() else 0
        (rejects,) = pool.run("rejects", read_rejects, [(rejects_file, accounts)], total=size_of_it)
        scans = scan_all(directory, accounts, pool)
        encoded = encode_sample(directory, accounts, recipe, sample, pool) if recipe else {}
    prompts = {account.name: top_prompts(directory, account, scans[account.name]) for account in accounts}
    shown: dict[str, Sequence[Any]] = {
        account.name: show(directory, account, recipe, examples) if recipe else show_turns(directory, account, examples)
        for account in accounts
    }

    ###################################### Mixture and runs #######################################
    mixings = views.mixings(folders, runs, sources, recipe, epochs, seed)
    pictured = next((mixing for _, mixing, _ in mixings if mixing and mixing.packed), None)
    lengths = {name: each.lengths for name, each in encoded.items()} or {n: scan.lengths for n, scan in scans.items()}
    mark = (recipe.length, f"row of {recipe.length}") if recipe else None
    benchmarks = accounting.benchmarks(accounts, manifest.get("config") or {})
    tokenizer = tokenizer_of(learned_by(recipe)) if recipe else None
    names = dict.fromkeys(account.name for folder in folders for account in folder.accounts)

    ###################################### The page ###############################################
    return render(
        {
            "name": folders[0].name,
            "hash": manifest["hash"],
            "date": date((directory / MANIFEST).stat().st_mtime),
            "missing": list(manifest.get("missing") or {}),
            "config": manifest.get("config"),
            "contents": contents(accounts, benchmarks, runs, folders, pictured),
            "tiles": views.tiles(accounts, scans, encoded),
            "accounts": accounts,
            "stages": stages,
            "splits": splits,
            "totals": views.totals(accounts),
            "classes": {name: charts.colour(place) for place, name in enumerate(names)},
            "scans": scans,
            "prompts": prompts,
            "encoded": encoded,
            "lengths": pictures.Lengths(lengths, "tokens" if recipe else "characters", mark),
            "ordered": accounting.ordered,
            "recipe": recipe,
            "tokenizer": tokenizer and tokenizer.path.name,
            "vocabulary": tokenizer and tokenizer.vocab_size,
            "sample": sample,
            "estimated": any(each.sampled < scans[name].examples for name, each in encoded.items()),
            "rejects": rejects,
            "differing": rejects.differing(accounts),
            "reasons": views.left_out(accounts),
            "samples": functools.partial(views.samples, rejects),
            "copies": views.copies(rejects),
            "benchmarks": benchmarks,
            "mixings": mixings,
            "pictured": pictured,
            "pictured_names": [share.name for share in pictured.shares] if pictured else [],
            "per_source": f"{examples} {'example' if examples == 1 else 'examples'}",
            "shown": shown,
            "special": views.special,
            "visible": views.visible,
            "runs": runs,
            "trained_on": [views.named_data(run, folders) for run in runs],
            "losses": views.last_losses(runs),
            "scores": views.all_scores(runs),
            "curves": pictures.run_curves(runs),
            "difference": views.difference,
            "same_sources": len({frozenset(run.heldout) for run in runs}) == 1,
            "folders": folders,
            "compared": views.compared(folders),
        }
    )


def recipe_of(runs: Sequence[Run]) -> Recipe | None:
    """How the first of the runs that still has its tokenizer and template makes rows."""
    for run in runs:
        recipe = run.recipe()
        try:
            if recipe is not None and learned_by(recipe):
                return recipe
        except (InputError, FileNotFoundError):
            continue
    return None


def contents(*sections: Any) -> list[tuple[str, str]]:
    """(anchor, title) of what is on the page."""
    _, benchmarks, runs, folders, pictured = sections
    listed = [
        ("flow", "From read to written", True),
        ("sources", "Source by source", True),
        ("dropped", "What was left out", True),
        ("contamination", "Contamination", bool(benchmarks)),
        ("mixture", "Mixture", True),
        ("rows", "Rows", pictured is not None),
        ("examples", "Examples", True),
        ("runs", "Training runs", bool(runs)),
        ("compared", "Compared", len(folders) > 1),
    ]
    return [(anchor, title) for anchor, title, there in listed if there]


def recipe_by_flags(directory: Path) -> Recipe | None:
    if not FLAGS.template:
        return None
    tokenizer = FLAGS.tokenizer or str(directory / "tokenizer")
    given = {key: getattr(FLAGS, key) for key in ("template", "length", "packing", "date", "fim_rate")}
    given |= {key: getattr(FLAGS, key) for key in ("corruption", "sentinels", "mask_token")}
    return Recipe.of({**given, "tokenizer": tokenizer})


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError("expected one folder: python -m data_pipelines.report DIR --output=report.html")
    directory = Path(argv[1])
    try:
        page = report(
            directory,
            recipe=recipe_by_flags(directory),
            run_folders=[Path(folder) for folder in FLAGS.run],
            compare=[Path(folder) for folder in FLAGS.compare],
            sources=FLAGS.sources,
            epochs=FLAGS.epochs,
            seed=FLAGS.seed,
            sample=FLAGS.sample,
            examples=FLAGS.examples,
            workers=FLAGS.workers or cores(),
        )
        Path(FLAGS.output).write_text(page, encoding="utf-8", newline="\n")
    except (InputError, OSError) as error:
        sys.exit(f"{error}")
    Console().print(f"{FLAGS.output}: {size(len(page.encode()))}", markup=False, highlight=False, soft_wrap=True)


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string("output", None, "The HTML file to write")
    flags.DEFINE_string("template", "", "koala, yuan, chat, text, tokenizer or a .jinja file: figures in tokens")
    flags.DEFINE_string("tokenizer", "", "Its file or folder; that of the prepared data by default")
    flags.DEFINE_integer("length", 2048, "Tokens a row", lower_bound=1)
    flags.DEFINE_string("packing", "best_fit", "How rows are filled, as data.packing of a run")
    flags.DEFINE_string("date", "", "The day that the template tells, YYYY-MM-DD, if it does")
    flags.DEFINE_float("fim_rate", 0.0, "Share of the documents that are cut to fill in the middle")
    flags.DEFINE_enum("corruption", "none", CORRUPTIONS, "What is masked of documents")
    flags.DEFINE_string("sentinels", SENTINELS, "Names of special tokens, or ids as 32000:32100")
    flags.DEFINE_string("mask_token", "", "A special token, or an id that the tokenizer does not use")
    flags.DEFINE_multi_string("run", [], "The log folder of a training run; may be given again")
    flags.DEFINE_multi_string("compare", [], "Another prepared folder; may be given again")
    flags.DEFINE_list("sources", [], "The mixture where there is no run: names or name=weight; all by default")
    flags.DEFINE_float("epochs", 1.0, "Its length, in epochs of all examples", lower_bound=0.001)
    flags.DEFINE_integer("seed", 0, "Its seed")
    flags.DEFINE_integer("sample", 2000, "Examples a source that are tokenised; 0: all", lower_bound=0)
    flags.DEFINE_integer("examples", 3, "Examples a source that are shown", lower_bound=0)
    flags.DEFINE_integer("workers", 0, "Processes; 0: as many as there are cores", lower_bound=0)
    flags.mark_flag_as_required("output")
    app.run(main)
