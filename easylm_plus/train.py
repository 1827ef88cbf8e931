"""Train or fine-tune a model.

    python -m easylm_plus.train --config=configs/koala_tiny.py
    python -m easylm_plus.train --config=configs/koala13b.py:size=7b --config.optimizer.learning_rate=1e-5

Running the same command again continues from the last checkpoint. Read from top to bottom, this file is the whole
story of a run.
"""

import datetime
import time
import warnings

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags
from rich.table import Table

from data_pipelines.batches.prefetch import Prefetch
from data_pipelines.batches.run_mixture import phase_lines
from easylm_plus import config as configs
from easylm_plus.door import console
from easylm_plus.door import run as door
from easylm_plus.errors import UserError
from easylm_plus.evaluation.loss import make_evaluate
from easylm_plus.evaluation.samples import make_sampler
from easylm_plus.models.config import train_flops_per_token
from easylm_plus.models.transformer import init_parameters
from easylm_plus.numerics.rules import attach, for_use
from easylm_plus.parallel import cluster, sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning.memory import estimate
from easylm_plus.planning.products import matmul_formats
from easylm_plus.training import checkpoint, contents, restore
from easylm_plus.training import data as data_module
from easylm_plus.training.assembly import assemble
from easylm_plus.training.curves import draw
from easylm_plus.training.meter import Meter, device_peak_tflops
from easylm_plus.training.metrics import MetricsLog
from easylm_plus.training.preemption import EXIT_STATUS, Preemption
from easylm_plus.training.preflight import preflight
from easylm_plus.training.profile import Profiler
from easylm_plus.training.progress import ProgressLine
from easylm_plus.training.step import fingerprint

CONFIG = config_flags.DEFINE_config_file("config", None, "the experiment", lock_config=True)


def main() -> int:
    """Runs the experiment that --config names; returns the exit status."""
    config = CONFIG.value

    ####################################### What the run needs #######################################
    configs.check(config)
    cluster.set_backend_flags(config.numerics.precision, config.numerics.deterministic)
    cluster.use_compilation_cache()
    cluster.join()
    first = jax.process_index() == 0
    if first:
        preflight(config)
    cluster.meet("preflight")

    ####################################### Mesh and data #############################################
    mesh = make_mesh(config.mesh)
    batch_sharding = data_module.batch_sharding(config, mesh)
    data = data_module.open_data(config)
    data_module.check_best(config, data)
    steps = data_module.total_steps(config, data)
    rows = data_module.local_rows(batch_sharding, config.data.batch_size, config.data.length)
    loader = data_module.make_loader(config, data, rows)
    put = lambda batch: data_module.put(batch, batch_sharding, rows, config.data.batch_size)

    ####################################### Model, objective, optimizer ###############################
    run = assemble(config, mesh, len(data.sources), steps)

    with sharding.use(mesh, run.rules):
        ################################### What it will take #########################################
        tokens = config.data.batch_size * config.data.length
        parts, chunk = config.train.accumulate, config.objective.chunk
        policy, cut_residual = run.model.precision, config.mesh.sequence_parallel
        needed = estimate(
            run.state, run.shardings, run.model.config, policy, tokens, parts, chunk, run.numerics, cut_residual
        )
        banner = two_columns()
        weights = sum(x.size for x in jax.tree.leaves(run.shapes))
        banner.add_row("model", f"{weights:,} parameters, {run.model.precision.name}")
        banner.add_row("devices", f"{mesh.size} x {jax.devices()[0].device_kind}, mesh " + describe_mesh(mesh))
        if shares := sharding.cut_shares(run.axes, run.shapes, mesh):
            banner.add_row("weights", ", ".join(f"{share:.1%} cut over {axis}" for axis, share in shares.items()))
        banner.add_row("data", ", ".join(f"{n} {len(s):,}" for n, s in data.train.items()))
        for line in phase_lines(loader.mixture):
            banner.add_row("mixture", line)
        if data.tokens or data.unused_tokens:
            banner.add_row("tokens", data_module.where_tokens_are(data))
        banner.add_row("batch", f"{config.data.batch_size} rows x {config.data.length} = {tokens:,} tokens a step")
        banner.add_row("run", f"{steps:,} steps, {steps * tokens:,} tokens")
        banner.add_row("memory", f"about {needed} a device")
        console.print(banner)

        ################################### State: resume, warm start, or random ######################
        saved = checkpoint.Checkpoints(config.checkpoint.dir or f"{config.log.dir}/checkpoints", config.checkpoint)
        start = saved.latest()
        if start is not None and not config.checkpoint.resume:
            raise UserError(
                f"checkpoint.resume = False: {saved.directory} already has step {start}; set another log.dir"
            )
        meter_state, owes_evaluation = None, False
        if start is not None:
            if not config.checkpoint.force:
                place, defaults = f"{saved.directory}/{start}", configs.base().to_dict()
                contents.compare_runs(saved.meta(start), config.to_dict(), defaults, data.hash, place)
            state, position = saved.restore(start, run.saved)
            state = run.from_saved(state)
            owes_evaluation = position["owes_evaluation"]
            meter_state, origin = position["meter"], f"step {start} of {saved.directory}"
            try:
                loader.set_state(position["loader"])
            except ValueError as error:
                if not config.checkpoint.force:
                    raise
                meter_state = None
                console.print(f"the data starts from its beginning: {error}", markup=False)
        else:
            key = jax.random.key(config.train.seed)
            fresh = lambda: init_parameters(run.model, key)
            if config.init_from.path:
                empty = jax.tree.map(lambda x, s: x.update(sharding=s), run.shapes, run.param_shardings)
                path, rename = config.init_from.path, config.init_from.rename
                codings, ternary = run.numerics.codings, run.numerics.ternary
                params, taken = restore.warm_start(empty, path, run.model, rename, fresh, codings, ternary)
                origin = f"weights of {path}"
                console.print(restore.table(taken))
            else:
                params, origin = jax.jit(fresh, out_shardings=run.param_shardings)(), "random weights"
            with warnings.catch_warnings():  # where masters are narrower, nothing can take the place of what is given
                warnings.filterwarnings("ignore", "Some donated buffers were not usable")
                state = jax.jit(run.make_state, out_shardings=run.shardings, donate_argnums=0)(params)
            del params  # the state has them; a second copy would live as long as this function
        start = start or 0

        ################################### Compile the step ##########################################
        replicated = NamedSharding(mesh, PartitionSpec())
        compiling = time.perf_counter()
        example = data_module.batch_shapes(config, batch_sharding)
        train_step = run.step.lower(run.state, example).compile()
        compiled = two_columns()
        compiled.add_row("state", f"starts from {origin}")
        compiled.add_row("attention", run.model.config.attention)
        if run.model.config.num_experts:
            compiled.add_row("experts", f"{run.model.config.num_experts}, products {run.model.config.grouped}")
        if told := run.numerics.describe():
            compiled.add_row("weights", told)
        compiled.add_row("matmuls", matmul_formats(train_step.as_text() or ""))
        compiled.add_row("compiled", f"in {time.perf_counter() - compiling:.1f} s")
        console.print(compiled)

        ################################### Evaluation and logs #######################################
        params_hash = jax.jit(fingerprint)
        evaluate_loss = make_evaluate(run.objective, data.sources, replicated)
        sampler = make_sampler(
            run.model, data.tokenizer, data.template, data.heldout, config.eval.samples, config.eval.max_new_tokens
        )
        log = MetricsLog(config.log.dir, start, owes_evaluation, enabled=first)
        log.text(start, "config", str(config))
        peak = mesh.size * device_peak_tflops(jax.devices()[0], config.log.peak_tflops)
        flops = train_flops_per_token(run.model.config, config.data.length)
        meter = Meter(log, config.log.every, data.sources, tokens, flops, peak, config.train.max_skipped)
        if meter_state:
            meter.set_state(meter_state)
        scores: dict[str, float] = {}

        def evaluate(step: int) -> None:
            """Held-out loss and a few sampled answers, into the log."""
            params = attach(run.named(state.params if state.ema is None else state.ema), for_use(config.numerics.rules))
            scores.update(evaluate_loss(params, (put(b) for b in data_module.heldout_batches(config, data, rows))))
            log.write(step, scores)
            texts = sampler(params)
            for name, text in texts.items():
                log.text(step, f"samples/{name}", text)
            console.print(f"step {step}: held-out loss {scores['eval/loss']:.4f}")

        def evaluation_due(step: int) -> bool:
            return config.eval.every > 0 and (step % config.eval.every == 0 or step == steps)

        def save(step: int) -> None:
            """A checkpoint of everything; the log is on disk first, so that it never knows less."""
            meter.drain()
            log.flush()
            position = {
                "loader": data_module.merged_state(loader_state),
                "meter": meter.get_state(),
                "owes_evaluation": bool(stopped and evaluation_due(step)),
            }
            meta = {"config": config.to_dict(), "data_hash": data.hash}
            saved.save(step, run.to_saved(state), position, meta, scores)

        ################################### The loop ##################################################
        progress = ProgressLine(console, start, steps, enabled=first)
        if first:
            data.tokenizer.save(saved.directory / "tokenizer")
        step, stopped, last_save = start, False, datetime.datetime.now()
        if config.eval.every and (start == 0 or owes_evaluation):
            evaluate(start)
        with log, progress, Preemption() as preemption, Prefetch(loader, config.data.workers) as batches:
            profiler = Profiler(config.train.profile, config.log.dir)
            meter.restart_clock()
            while step < steps:
                waiting = time.perf_counter()
                batch, loader_state = next(batches)
                meter.waited(time.perf_counter() - waiting)
                profiler.before(step)
                state, metrics = train_step(state, put(batch))
                step += 1
                scores.clear()  # those of another step say nothing about this one's checkpoint
                profiler.after(step, state)
                if config.log.params_hash:
                    metrics["params_hash"] = params_hash(run.named(state.params))
                meter.push(step, metrics, data_module.told(batch, rows, config.data.batch_size))
                progress.update(step, meter.last)
                last, stopped = step == steps, preemption.requested(step)
                if evaluation_due(step) and not stopped:
                    meter.drain()
                    evaluate(step)
                    meter.restart_clock()
                due = checkpoint.due(last_save, config.checkpoint.minutes, step)
                if step % config.checkpoint.every == 0 or last or stopped or due:
                    save(step)
                    last_save = datetime.datetime.now()
                    meter.restart_clock()
                if stopped:
                    break
            meter.drain()
            saved.wait()

    ####################################### After the run #############################################
    saved.close()
    if stopped:
        console.print(f"stopped by a signal after step {step}; the same command continues from there")
        return EXIT_STATUS
    if first:
        console.print(data_module.statistics_table(loader.stats()))
        picture = draw(config.log.dir)
        console.print(f"done: {step} steps; curves in {picture}, checkpoints in {saved.directory}")
    return 0


def two_columns() -> Table:
    """A table without lines, of names and values; a long value, such as a path, goes on in the next line."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def describe_mesh(mesh: jax.sharding.Mesh) -> str:
    """The axes that are not 1, as "fsdp 8 x tensor 2"."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"


if __name__ == "__main__":
    door(main)
