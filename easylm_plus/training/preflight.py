"""Before anything is built: is everything there that the run needs? What is not is told in one message."""

from pathlib import Path

from ml_collections import ConfigDict

from data_pipelines.batches.training_data import tokenizer_path
from data_pipelines.tokenizers.tokenizer import load_tokenizer
from easylm_plus.errors import UserError
from easylm_plus.training.checkpoint import steps
from easylm_plus.training.data import ensure_prepared


def preflight(config: ConfigDict) -> None:
    """Prepares the data if the config says how; raises UserError listing all that is missing, and its origin.

    For one process of the job, which the others wait for: they share the folders that the config names.
    """
    missing = []
    resuming = config.checkpoint.resume and steps(config.checkpoint.dir or Path(config.log.dir) / "checkpoints")
    if config.init_from.path and not resuming and not Path(config.init_from.path).exists():
        missing.append(_entry("weights", "init_from.path", config.init_from.path, config.init_from.origin))
    if not config.data.path:
        raise UserError("data.path is not set: expected a folder made by `python -m data_pipelines.prepare`")
    if not ensure_prepared(config):
        missing.append(_entry("data", "data.path", config.data.path, config.data.origin or _prepare(config)))
    if not missing or config.data.tokenizer:
        path = tokenizer_path(config.data)
        if not path.exists():
            missing.append(_entry("tokenizer", "data.tokenizer", str(path), config.data.tokenizer_origin))
        else:
            load_tokenizer(path)
    if missing:
        raise UserError("the run needs what is not there:\n" + "\n".join(missing))


def _entry(what: str, key: str, path: str, origin: str) -> str:
    return f"  {what}: {path} (config.{key})\n      {origin or 'set the key to where it is'}"


def _prepare(config: ConfigDict) -> str:
    source = f" --input={config.data.prepare_input}" if config.data.prepare_input else ""
    recipe = config.data.prepare or "configs/data/NAME.py"
    return f"made by: python -m data_pipelines.prepare --config={recipe}{source} --output={config.data.path}"
