"""How fast `easylm_plus.convert` is beside `cp` of the same files, and how much memory it takes.

    python benchmarks/convert_7b.py --layers=32 --rounds=3

Makes a checkpoint of LLaMA 7B's shapes with random bfloat16 weights in three safetensors files (13.5 GB; --layers=2 for
1.3 GB), then copies and converts it alternately, and back with --back. What was written is deleted each time; the
folder of the input at the end. The input is read once before, so both start with what the page cache holds of it.
"""

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).parents[1]
FOLDER = flags.DEFINE_string("folder", "/tmp/convert_7b", "where everything is written; made, and deleted")
LAYERS = flags.DEFINE_integer("layers", 32, "of the model")
ROUNDS = flags.DEFINE_integer("rounds", 3, "alternations")
BACK = flags.DEFINE_boolean("back", False, "also from our checkpoint to Hugging Face's")


def make_input(folder: Path, layers: int) -> None:
    """Writes the checkpoint."""
    import ml_dtypes
    import numpy as np

    from easylm_plus.interop.huggingface import export_keys, write_folder
    from easylm_plus.interop.weights import Weights, piece_shapes
    from easylm_plus.models.families import preset

    class Random(Weights):
        """Weights that are made as they are asked for."""

        config, place = preset("llama-7b", num_layers=layers), "random"
        shapes = piece_shapes(config)
        groups = tuple((name,) for name in shapes)
        noise = np.random.default_rng(0).integers(0, 2**16, 2**27, np.uint16)

        def dtype(self, name: str) -> np.dtype:
            return np.dtype(ml_dtypes.bfloat16)

        def read(self, names: tuple[str, ...], index: tuple[int, ...]) -> list[np.ndarray]:
            count = int(np.prod(self.shapes[names[0]]))
            start = 4096 * (hash((names, index)) % 1000)
            repeated = np.resize(self.noise[start:], count)
            return [repeated.view(ml_dtypes.bfloat16).reshape(self.shapes[names[0]])]

    folder.mkdir(parents=True)
    weights = Random()
    size = sum(int(np.prod(s)) * (layers if "{i}" in n else 1) * 2 for n, s in weights.shapes.items())
    write_folder(weights, export_keys(weights, None), folder, max_shard_bytes=int(size / 2.9))


def run(*command: str) -> tuple[float, float]:
    """(seconds, peak resident memory in GB) of a process."""
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss / 1e6


def convert(source: Path, target: Path, to: str) -> tuple[float, float]:
    """Converts in a process of its own."""
    python = (sys.executable, "-m", "easylm_plus.convert")
    return run(*python, f"--input={source}", f"--output={target}", f"--to={to}")


def main(_: list[str]) -> None:
    folder = Path(FOLDER.value)
    if folder.exists():
        raise SystemExit(f"{folder}: found something there already")
    try:
        maker = multiprocessing.get_context("spawn").Process(target=make_input, args=(folder / "hf", LAYERS.value))
        maker.start()  # a process of its own: a child's peak memory counts what its parent had
        maker.join()
        files = [path.stat().st_size for path in (folder / "hf").glob("*.safetensors")]
        size = sum(files) / 1e9
        print(f"{size:.2f} GB in {len(files)} files; load {os.getloadavg()[0]:.2f}", flush=True)
        compare(folder, size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(folder: Path, size: float) -> None:
    """Alternates cp and the conversions and prints the figures."""
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS.value):
        for path in (folder / "hf").iterdir():  # what fits of it is in the page cache
            run("cp", str(path), "/dev/null")
        for what in ("cp", "to ours", *(["back"] if BACK.value else [])):
            target = folder / what.replace(" ", "_")
            os.sync()  # or the disk would still be at work on what was written before
            if what == "cp":
                seconds, peak = run("cp", "-r", str(folder / "hf"), str(target))
            elif what == "back":
                seconds, peak = convert(folder / "to_ours", target, "hf")
            else:
                shutil.rmtree(folder / "cp")
                seconds, peak = convert(folder / "hf", target, "easylm_plus")
            times.setdefault(what, []).append(seconds)
            print(f"{what:8} {seconds:6.1f} s {1000 * size / seconds:6.0f} MB/s, peak {peak:.2f} GB", flush=True)
        shutil.rmtree(folder / "to_ours")
        shutil.rmtree(folder / "back", ignore_errors=True)
    for what in list(times)[1:]:
        ratios = [copied / taken for copied, taken in zip(times["cp"], times[what], strict=True)]
        print(f"{what}: {statistics.median(ratios):.2f} x the speed of cp, median of {len(ratios)} rounds")
    print(f"load at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    app.run(main)
