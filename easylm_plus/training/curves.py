"""The curves of a run as one picture, drawn from its log."""

from pathlib import Path
from typing import Any

from easylm_plus.training.metrics import read_rows


def draw(directory: str | Path) -> Path:
    """Reads <directory>/metrics.jsonl and writes <directory>/curves.png: loss, loss by source, norm, speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_rows(Path(directory) / "metrics.jsonl")
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    total, by_source, norm, speed = axes.flat
    _line(total, rows, "loss", "train", linewidth=0.8)
    _line(total, rows, "eval/loss", "held out", marker="o")
    for key in sorted({k for row in rows for k in row if k.startswith("eval/loss/")}):
        _line(by_source, rows, key, key.removeprefix("eval/loss/"), marker=".")
    _line(norm, rows, "grad_norm", "gradient norm", linewidth=0.8)
    rate = norm.twinx()
    _line(rate, rows, "learning_rate", "learning rate", color="tab:orange")
    _line(speed, rows, "tokens_per_second", "tokens/s", linewidth=0.8)
    speed.set_ylim(bottom=0)
    titles = ("loss (nats a token)", "held-out loss by source", "gradient norm and learning rate", "throughput")
    for axis, title in zip(axes.flat, titles):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    path = Path(directory) / "curves.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _line(axis: Any, rows: list[dict[str, Any]], key: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        axis.plot(*zip(*points), label=label, **style)
