"""The logs of training runs: losses by source from metrics.jsonl, and what the run was trained on.

A run's folder is what its `log.dir` names. Its configuration stands beside its checkpoints, as JSON
(checkpoints/<step>/meta/metadata), with a hash of its data, tokenizer and template; evaluation.json is what
`easylm_plus.evaluate` found at its end.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.datasets import Manifest
from data_pipelines.errors import InputError
from data_pipelines.reporting.recipe import Recipe, learned_by, tokenizer_of

HELDOUT = "eval/loss"
POINTS = 400  # of a curve, at most twice as many

Curve = list[tuple[int, float]]  # (step, loss)


@dataclasses.dataclass(frozen=True)
class Run:
    """curves: "eval/loss/<source>", "eval/loss" and "loss" -> points. scores: of evaluation.json. config, data_hash:
    None where there is no checkpoint."""

    name: str
    folder: Path
    curves: Mapping[str, Curve]
    scores: Mapping[str, float]
    config: Mapping[str, Any] | None
    data_hash: str | None

    @property
    def last_step(self) -> int:
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    @property
    def last_evaluation(self) -> int:
        """Its step."""
        return max((curve[-1][0] for curve in self.heldout.values()), default=0)

    @property
    def heldout(self) -> dict[str, Curve]:
        """source -> held-out loss."""
        start = f"{HELDOUT}/"
        return {key.removeprefix(start): curve for key, curve in self.curves.items() if key.startswith(start)}

    def recipe(self) -> Recipe | None:
        """How it makes rows, with the copy of the tokenizer that it keeps; None where it does not say."""
        if self.config is None:
            return None
        section = dict(self.config["data"])
        kept = self.folder / "checkpoints" / "tokenizer"
        section["tokenizer"] = str(kept) if kept.is_dir() else section["tokenizer"]
        return Recipe.of(section)

    def trained_on(self, manifest: Manifest, recipe: Recipe) -> bool:
        """Whether its data is that of the manifest, encoded by the recipe."""
        learned = learned_by(recipe)
        identity = "\n".join((manifest["hash"], tokenizer_of(learned).fingerprint, learned.fingerprint))
        return self.data_hash == hashlib.sha256(identity.encode()).hexdigest()


def read_run(folder: Path, name: str) -> Run:
    """Raises InputError for a folder without a log."""
    if not (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder}: found no metrics.jsonl; expected the folder that log.dir of a run names")
    meta = newest_meta(folder / "checkpoints")
    curves = read_curves(folder / "metrics.jsonl")
    config, data_hash = (meta["config"], meta.get("data_hash")) if meta else (None, None)
    return Run(name, folder, curves, read_scores(folder / "evaluation.json"), config, data_hash)


def read_curves(path: Path) -> dict[str, Curve]:
    """Losses by key; a long curve is thinned to every second, fourth … point and its last one."""
    curves: dict[str, Curve] = {}
    every: dict[str, int] = {}
    last: dict[str, tuple[int, float]] = {}
    seen: dict[str, int] = {}
    with open(path, "rb") as file:
        for line in file:
            for key, step, value in losses(line):
                curve, stride = curves.setdefault(key, []), every.setdefault(key, 1)
                last[key] = (step, value)
                if seen.setdefault(key, 0) % stride == 0:
                    curve.append(last[key])
                seen[key] += 1
                if len(curve) > 2 * POINTS:
                    del curve[1::2]
                    every[key] = 2 * stride
    return {key: curve if curve[-1] == last[key] else [*curve, last[key]] for key, curve in curves.items()}


def losses(line: bytes) -> list[tuple[str, int, float]]:
    """(key, step, loss) of a line; none of one that was cut off as the run was killed."""
    try:
        row = json.loads(line)
    except ValueError:
        return []
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return []
    wanted = [key for key in row if key in ("loss", HELDOUT) or key.startswith(f"{HELDOUT}/")]
    return [(key, row["step"], float(row[key])) for key in wanted if _is_number(row[key])]


def newest_meta(folder: Path) -> dict[str, Any] | None:
    """What stands beside the last checkpoint; None where there is none that can be read."""
    steps = [entry for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
    for step in sorted(steps, key=lambda entry: -int(entry.name)):
        try:
            meta = json.loads((step / "meta" / "metadata").read_text("utf-8"))
            if isinstance(meta["config"]["data"], dict) and isinstance(meta["config"]["train"], dict):
                return dict(meta)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def read_scores(path: Path) -> dict[str, float]:
    try:
        scores = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): float(v) for k, v in scores.items() if _is_number(v)} if isinstance(scores, dict) else {}


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
