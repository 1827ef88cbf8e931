"""What FP8-LM's levels take on a machine that is not here: memory by part and bytes on the wire, of the real step
compiled ahead of time (planning/compiled.py), beside the paper's table 5 (arXiv:2310.18313v2).

    python benchmarks/fp8_memory.py --do=steps              # the paper's GPTs, layouts and batches, at all levels
    python benchmarks/fp8_memory.py --do=rows               # the largest micro-batch that fits
    python benchmarks/fp8_memory.py --do=models             # the largest GPT that fits
    python benchmarks/fp8_memory.py --do=table

Needs the compilers (README.md). One compile takes half a minute to two on a quiet core; what was compiled is kept, and
not compiled again. Layouts: "paper" is ZeRO-1, weights and gradients whole on every rank of data parallelism, masters
and moments cut over them (mesh.replica, optimizer.zero = sharded); "fsdp" cuts everything.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

DO = flags.DEFINE_enum("do", "table", ["steps", "rows", "models", "table"], "what to do")
MACHINE = flags.DEFINE_string("machine", "h100:1x4x8", "a name of planning/topology.py")
SIZES = flags.DEFINE_list("sizes", ["7b", "13b"], "of the paper's GPTs")
LAYOUTS = flags.DEFINE_list("layouts", ["paper", "fsdp"], "how they lie on the machine")
LEVELS = flags.DEFINE_list("levels", ["none", "O1", "O2", "O3", "O3-e4m3"], "FP8 levels, and how gradients are summed")
FOLDER = flags.DEFINE_string("folder", "runs/fp8_memory", "of the results")

ROOT = Path(__file__).parents[1]
ROWS, STEP_ROWS = 2, 2048  # of a micro-batch on one rank of data parallelism, and of a step: the paper's
TENSOR = {"7b": 1, "13b": 2}  # the paper's tensor parallelism
# table 5: GB at 2 rows, GB sent; BF16 and FP8-LM
PAPER = {"7b": ((69.6, 37.2), (49.4, 13.9)), "13b": ((68.2, 34.3), (48.9, 12.4))}
# of a device's memory; the rest is for the driver's context and NCCL's buffers. An assumption, not a measurement
USABLE = 0.95


def experiment(key: dict[str, Any], devices: int) -> Any:
    """The config of a result's key: size, layout, level, rows, and parts (0: as many as the paper's batch has)."""
    from easylm_plus.training.data import load_config_file

    size, layout, rows = key["size"], key["layout"], key["rows"]
    config = load_config_file(str(ROOT / f"configs/gpt_fp8_{size if size in TENSOR else '7b'}.py"))
    tensor = TENSOR.get(size, 1) if layout == "paper" else 1
    ranks = devices // tensor
    config.mesh.update({"fsdp": 1, "tensor": tensor, "replica" if layout == "paper" else "fsdp": ranks})
    config.optimizer.zero = "sharded" if layout == "paper" and ranks > 1 else "none"
    config.numerics.fp8_level, _, sums = key["level"].partition("-")
    config.numerics.fp8_accumulate = sums or "float32"
    config.train.accumulate = key["parts"] or STEP_ROWS // (rows * ranks)
    config.data.batch_size = rows * ranks * config.train.accumulate
    if size not in TENSOR:  # "64": layers and heads of 128, with the proportions of the paper's GPTs
        heads = int(size)
        config.model.update(num_layers=heads, num_heads=heads, num_kv_heads=heads, head_dim=128,
                            hidden_size=128 * heads, intermediate_size=512 * heads, remat="full")  # fmt: skip
    return config


def results() -> list[dict[str, Any]]:
    path = Path(FOLDER.value) / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def result(**key: Any) -> dict[str, Any]:
    """Of a key: what was found before, or is found now; `memory` is None where the compiler refuses."""
    import jax

    from easylm_plus.planning.compiled import DoesNotFit, compile_step
    from easylm_plus.planning.topology import machine
    from easylm_plus.planning.wire import collectives

    key = {"machine": MACHINE.value, **key}
    for known in results():
        if known["key"] == key:
            return known
    here = machine(MACHINE.value)
    found: dict[str, Any] = {"key": key, "memory": None, "limit": here.memory and int(USABLE * here.memory)}
    try:
        step = compile_step(experiment(key, len(here.devices)), here.devices, here.options)
    except DoesNotFit as error:
        found["error"] = str(error)
    else:
        found["memory"] = dataclasses.asdict(step.memory())
        found["parameters"] = sum(x.size for x in jax.tree.leaves(step.assembly.shapes))
        found["wire"] = [(c.kind, c.dtype, c.ranks, c.trips, c.payload, c.wire) for c in collectives(step.hlo)]
        found["seconds"] = round(step.seconds, 1)
    jax.clear_caches()
    Path(FOLDER.value).mkdir(parents=True, exist_ok=True)
    with (Path(FOLDER.value) / "results.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(key, "peak", gib(found["memory"]["peak"]) if found["memory"] else found["error"], flush=True)
    return found


def fits(found: dict[str, Any]) -> bool:
    memory = found["memory"]
    return memory is not None and (found["limit"] is None or memory["peak"] <= found["limit"])


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest n up to `most` for which it holds, 0 for none; what holds for n holds for fewer."""
    good, bad = 0, start
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def steps() -> None:
    for size in SIZES.value:
        for layout in LAYOUTS.value:
            for level in LEVELS.value:
                result(size=size, layout=layout, level=level, rows=ROWS, parts=0)


def rows() -> None:
    """Two micro-batches a step: more take no more memory."""
    for size in SIZES.value:
        for layout in LAYOUTS.value:
            for level in LEVELS.value:
                at = lambda n: fits(result(size=size, layout=layout, level=level, rows=n, parts=2))  # noqa: B023
                print(f"{size} {layout} {level}: {largest(at, 2, 256)} rows")


def models() -> None:
    """Heads in steps of 8, one row a device, blocks recomputed."""
    for layout in LAYOUTS.value:
        for level in LEVELS.value:
            at = lambda n: fits(result(size=str(8 * n), layout=layout, level=level, rows=1, parts=2))  # noqa: B023
            print(f"{layout} {level}: {8 * largest(at, 4, 24)} layers and heads")


# --- tables ---


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


PARTS = ("weights", "optimizer", "copies", "gradients", "vocabulary", "rest", "peak")


def print_steps() -> None:
    """GiB on a device by part; GB of weights and gradients among ranks of data parallelism in a step, as payload."""
    chosen = [r for r in results() if r["key"]["parts"] == 0 and r["memory"]]
    columns = ["machine", "GPT", "layout", "level", *PARTS, "to bf16", "paper", "sent, GB", "of 6 B", "of 4 B", "paper"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for r in chosen:
        key, memory = r["key"], r["memory"]
        base = next((b for b in chosen if b["key"] == {**key, "level": "none"}), None)
        change = f"{memory['peak'] / base['memory']['peak'] - 1:+.0%}" if base else ""
        tensor = TENSOR[key["size"]] if key["layout"] == "paper" else 1
        sent = sum(payload for _, _, ranks, _, payload, _ in r["wire"] if ranks != tensor)
        ratios, paper = ["", ""], ["", ""]
        if key["layout"] == "paper":
            ratios = [f"{sent * tensor / (size * r['parameters']):.1%}" for size in (6, 4)]
            bf16, fp8 = PAPER[key["size"]]
            if key["level"] in ("none", "O3", "O3-e4m3"):
                memory_gb, sent_gb = bf16 if key["level"] == "none" else fp8
                paper = [f"{memory_gb} GB ({memory_gb / bf16[0] - 1:+.0%})", f"{sent_gb} ({sent_gb / bf16[1]:.1%})"]
        names = [key[name] for name in ("machine", "size", "layout", "level")]
        cells = [
            *names,
            *(gib(memory[part]) for part in PARTS),
            change,
            paper[0],
            f"{sent / 1e9:.2f}",
            *ratios,
            paper[1],
        ]
        print(f"| {' | '.join(cells)} |")


def print_searches() -> None:
    """The largest that fit, of those that were tried."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for r in results():
        key = r["key"]
        if key["parts"] and fits(r):
            model = key["size"] not in TENSOR
            name = (key["machine"], "GPT" if model else key["size"], key["layout"], key["level"])
            size = r["parameters"] if model else key["rows"]
            if name not in found or size > found[name]["size"]:
                found[name] = {"size": size, "peak": r["memory"]["peak"], "rows": key["rows"]}
    print("\n| machine | GPT | layout | level | rows a rank | parameters | peak, GiB |\n|---|---|---|---|---|---|---|")
    for name, best in sorted(found.items()):
        parameters = f"{best['size'] / 1e9:.1f}B" if name[1] == "GPT" else ""
        print(f"| {' | '.join(name)} | {best['rows']} | {parameters} | {gib(best['peak'])} |")


def main(_: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    if DO.value == "table":
        print_steps()
        print_searches()
    else:
        {"steps": steps, "rows": rows, "models": models}[DO.value]()


if __name__ == "__main__":
    app.run(main)
