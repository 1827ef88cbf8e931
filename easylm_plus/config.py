"""The configuration of a run: every key with its default, and the checks that make a wrong one an error.

A config file is a Python function, `get_config(arg="") -> ConfigDict`, that starts from `base()` and changes what
the experiment changes. On the command line

    --config=configs/koala13b.py:size=7b,fsdp=8 --config.optimizer.learning_rate=1e-5

the part after ":" goes to `get_config` (read it with `parse_arg`), and `--config.<section>.<key>` overrides one
value. Unknown keys and values of another type are errors that name the nearest key, in all three places.
"""

import dataclasses
import difflib
from typing import Any

from ml_collections import ConfigDict

from data_pipelines.batches.packing import PACKINGS
from easylm_plus.errors import UserError
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.families import preset


def base(model: str = "llama-7b", **overrides: Any) -> ConfigDict:
    """All sections with their defaults; `model` names a preset, whose keys `overrides` replace.

    The result is locked: setting a key that is not there is an error, in a config file as on the command line.
    """
    config = ConfigDict(
        {
            "model": dataclasses.asdict(preset(model, **overrides)),
            "init_from": {
                "path": "",  # a run's checkpoint folder, or a Hugging Face folder; "": random weights
                "origin": "",  # where a person gets it, for the message when it is not there
                "rename": (),  # "regex=replacement" applied to the names in that checkpoint
            },
            "data": {
                "path": "",  # a folder made by data_pipelines.prepare
                "prepare": "",  # the data config that makes it, for when it is not there yet
                "prepare_input": "",  # the raw files that config reads; "" where it generates its own
                "sources": (),  # "name" or "name=weight"; (): all, with the weights of the prepared data
                "weigh": "",  # what weights are shares of: examples | tokens; "": what the prepared data says
                "temperature": 1.0,  # above 1 shares are more even (T5)
                "max_epochs": (),  # "name=epochs": a source is read so often at most
                "schedule": (),  # "STEP: name=weight, name=weight": the weights from that step on
                "origin": "",  # where a person gets the raw files, for the message when they are not there
                "tokenizer_origin": "",  # likewise
                "tokenizer": "",  # file or folder; "": the one in the data folder
                "template": "koala",  # koala | yuan | chat | text | tokenizer (its own chat template) | .jinja file
                "date": "",  # YYYY-MM-DD that a chat template's strftime_now writes; none: it has no such function
                "fim_rate": 0.0,  # share of the documents that are cut in three, to fill in the middle
                "fim_spm_rate": 0.5,  # share of these in suffix-prefix-middle order
                "corruption": "none",  # none | spans (T5) | masked (BERT; needs model.causal = False)
                "corruption_rate": 0.15,  # share of a document's tokens that are masked
                "span_length": 3.0,  # tokens of a span, on average
                "sentinels": "<extra_id_{}>",  # what stands for spans: names of special tokens, or ids as 32000:32100
                "mask_token": "",  # a special token or an id; "": <mask> or [MASK]
                "length": 2048,  # tokens a row
                "batch_size": 8,  # rows a step, over all devices
                "packing": "best_fit",  # best_fit | first_fit | concat_split | none (data_pipelines/batches/packing.py)
                "pool": 1024,  # examples packed together; padding is about half a row a pool
                "shards": 0,  # logical shards of the data order; 0: batch_size
                "workers": 1,  # batches prepared ahead
            },
            "numerics": {
                "precision": "bf16",  # float32 | bf16 | bf16_pure
                "fp8_level": "none",  # none | O1 | O2 | O3 (docs/precision.md)
                "fp8_window": 1,  # steps that scales look back (FP8-LM 16); 1: scales from the tensor at hand
                "fp8_reduction": "two_shot",  # two_shot | ring (FP8-LM's, with its factor mu)
                "lora": (),  # "regex=rank": only low-rank adapters of these matrices learn; (): all weights do
                "lora_alpha": 16.0,  # adapters are multiplied by lora_alpha / rank
                "fp8_accumulate": "float32",  # float32 | e4m3 (FP8-LM's): sums of FP8 gradients over micro-batches
                "fp8_smooth": False,  # features of the feed-forward's product that stand out are evened out
                # "regex=plain|ternary|fp8|narrow", with lora also nf4|nf4_double: what matrices become instead
                "rules": (),
                "ternary_warmup": 0,  # steps over which ternary matrices become so, of a model that was not; 0: at once
                "deterministic": True,  # GPU: refuse kernels whose sums depend on timing
            },
            "mesh": {
                "stage": 1,
                "replica": 1,
                "fsdp": -1,
                "sequence": 1,
                "expert": 1,
                "tensor": 1,
                "sequence_parallel": False,  # tensor also cuts the length of what lies between the matrices
            },
            "optimizer": {
                "learning_rate": 2e-5,
                "end_learning_rate": 0.0,
                "schedule": "cosine",  # constant | linear | cosine | two_stage | two_stage_cosine
                "warmup_steps": 0,
                "warmup_share": 0.0,  # of the run, instead of warmup_steps
                "stage_at": 0.5,  # two stages: when the second line starts, as a share of the run
                "stage_learning_rate": 0.0,  # two stages: where it starts
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "stage_weight_decay": -1.0,  # two stages: from stage_at on; -1: as before it
                "decay": r"(kernel|embedding)$",  # which weights decay
                "clip_norm": 1.0,
                # formats of the transformed matrices: float32 | bf16 | fp16 | e4m3 | e5m2; "": what the level says
                "master": "",
                "first_moment": "",
                "second_moment": "",
                "rounding": "stochastic",  # of masters in less than 32 bits: stochastic | nearest
                "zero": "none",  # over mesh.replica: none (copies) | sharded (ZeRO-1) | whole_tensor (by FP8-LM)
            },
            "objective": {
                "z_loss": 0.0,
                "chunk": 1024,  # tokens a device whose logits exist at a time
                "router_balance": 0.0,  # experts: coefficient of the load-balance loss (Switch 0.01)
                "router_z": 0.0,  # experts: coefficient of the router's z-loss (ST-MoE 0.001)
            },
            "train": {
                "steps": 0,  # one of steps, epochs and tokens says how long
                "epochs": 0.0,
                "tokens": 0,
                "seed": 0,
                "accumulate": 1,  # micro-batches a step
                "ema": 0.0,  # decay of the weight average; 0: none
                "spike_factor": 0.0,  # skip steps whose gradient norm exceeds this many times its mean; 0: never
                "max_skipped": 20,  # steps skipped in a row that stop the run
                "profile": "",  # "10:13" traces those steps; "": no trace
            },
            "checkpoint": {
                "dir": "",  # "": <log.dir>/checkpoints
                "every": 1000,  # steps
                "keep": 3,  # the last ones; 0: all
                # also keep the best by this figure, as "eval/loss", of the checkpoints of steps that are evaluated
                "keep_best": "",
                "minutes": 30.0,  # a temporary one when this long has passed without; 0: never
                "resume": True,
                "force": False,  # resume although config or data changed
            },
            "eval": {
                "every": 500,  # steps; 0: never
                "examples": 200,  # held-out examples a source
                "samples": 4,  # answers written to the log at each evaluation
                "max_new_tokens": 64,
            },
            "log": {
                "dir": "runs/default",
                "every": 10,  # steps
                "params_hash": False,  # a hash of the parameters in each row, for comparing runs bit for bit
                "peak_tflops": 0.0,  # of one device, for MFU where the device is unknown; 0: look it up
            },
        },
        # () of a tuple must not be taken for the type of its elements
        convert_dict=True,
    )
    return config.lock()


def parse_arg(arg: str, **defaults: Any) -> Any:
    """Reads "size=7b,fsdp=8,tiny" against typed defaults; a bare name means True.

    Returns a ConfigDict of the defaults with what was given. Raises UserError for an unknown key (naming the
    nearest) and for a value that does not have its default's type.
    """
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            raise UserError(f"unknown config argument {key!r}: {nearest(key, defaults)}")
        values[key] = _typed(key, text if "=" in item else "true", defaults[key])
    return ConfigDict(values)


def _typed(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"config argument {key}={text}: expected true or false")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError as error:
        raise UserError(f"config argument {key}={text}: expected {type(default).__name__}") from error


def nearest(key: str, known: Any) -> str:
    """ "did you mean ...?" for an unknown key."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"


def model_config(config: ConfigDict) -> ModelConfig:
    """The `model` section as the value that the modules read."""
    return ModelConfig(**config.model)


POSITIVE = (
    "data.length",
    "data.batch_size",
    "data.pool",
    "train.accumulate",
    "objective.chunk",
    "log.every",
    "checkpoint.every",
)
PLACES = ("data.path", "data.prepare_input", "data.tokenizer", "init_from.path", "checkpoint.dir", "log.dir")


def check(config: ConfigDict) -> None:
    """What can be told to be wrong from the config alone. Raises UserError naming the key."""
    model_config(config)
    lengths = [key for key in ("steps", "epochs", "tokens") if config.train[key]]
    if len(lengths) != 1:
        found = " and ".join(lengths) or "none of them"
        raise UserError(f"train: set exactly one of steps, epochs and tokens; found {found}")
    for name in POSITIVE:
        section, key = name.split(".")
        if config[section][key] < 1:
            raise UserError(f"{name} = {config[section][key]}: expected a positive number")
    if config.data.packing not in PACKINGS:
        raise UserError(f"data.packing = {config.data.packing!r}: expected one of {', '.join(PACKINGS)}")
    if (config.data.corruption == "masked") == config.model.causal:
        raise UserError(
            f"model.causal = {config.model.causal}: expected False with data.corruption = 'masked', and only then; "
            f"found data.corruption = {config.data.corruption!r}"
        )
    if not config.model.causal and config.eval.every and config.eval.samples:
        raise UserError(f"eval.samples = {config.eval.samples}: expected 0; a model of masked tokens writes no answers")
    if config.data.batch_size % config.train.accumulate:
        raise UserError(
            f"train.accumulate = {config.train.accumulate}: "
            f"expected a divisor of data.batch_size = {config.data.batch_size}"
        )
    for name in PLACES:
        section, key = name.split(".")
        if "://" in config[section][key]:
            raise UserError(f"{name} = {config[section][key]!r}: expected a path of a file system; mount the bucket")
    if config.mesh.stage != 1:
        raise UserError(f"mesh.stage = {config.mesh.stage}: expected 1; nothing is cut over this axis yet")
    if config.data.length > config.model.max_length:
        raise UserError(
            f"data.length = {config.data.length}: longer than model.max_length = {config.model.max_length}; "
            "raise model.max_length if the model may be trained beyond the positions it was made for"
        )
