"""Every experiment in configs/ is one that can run: it resolves, its arguments work, and its step lowers on a mesh."""

import contextlib
import functools
import importlib.util
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from easylm_plus import config as configs
from easylm_plus.config import base, check, parse_arg
from easylm_plus.errors import UserError
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer, abstract_parameters
from easylm_plus.numerics.precision import precision
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import axis_sizes, make_mesh
from easylm_plus.training import data as data_module
from easylm_plus.training.optimizer import adamw
from easylm_plus.training.state import new_state, state_shardings
from easylm_plus.training.step import make_train_step

FILES = sorted((tiny.ROOT / "configs").glob("*.py"))
DATA_FILES = sorted((tiny.ROOT / "configs" / "data").glob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
# Those that are another one at a different size would lower to the same program, but for its numbers and M32's experts.
OF_THEIR_OWN = [path for path in FILES if "base(" in path.read_text() or path.stem == "yuan_m32"]


@functools.cache
def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def resolved(path, arg=""):
    config = module(path).get_config(arg)
    if not (config.train.steps or config.train.epochs or config.train.tokens):
        config.train.steps = 10
    return config


def test_there_are_configs():
    assert {"debug", "koala13b", "koala7b", "llama7b", "koala_tiny"} <= {path.stem for path in FILES}


@every_file
def test_it_resolves_with_known_keys_alone(path):
    config = resolved(path)
    check(config)
    assert keys(config) == keys(base())
    assert config.log.dir != base().log.dir, "experiments do not share a folder"


def keys(config, prefix=""):
    if not isinstance(config, ConfigDict):
        return {prefix}
    return {key for name, value in config.items() for key in keys(value, f"{prefix}.{name}")}


@every_file
def test_its_docstring_gives_the_command(path):
    text = module(path).__doc__
    assert f"--config=configs/{path.name}" in text
    for arg in re.findall(rf"--config=configs/{path.name}:([\w=,]+)", text):
        check(resolved(path, arg))


@every_file
def test_its_arguments_are_those_it_names(path):
    build = module(path).get_config
    with pytest.raises(UserError, match="unknown config argument 'no_such'"):
        build("no_such=1")
    for section, name in (("train", "steps"), ("mesh", "fsdp"), ("mesh", "expert"), ("mesh", "tensor")):
        if re.search(rf"\b{name}\b", build.__doc__):
            assert build(f"{name}=3")[section][name] == 3


@every_file
def test_its_weights_are_those_of_the_model(path):
    """At full depth, by shapes alone."""
    config = resolved(path)
    shapes, axes = abstract_parameters(Transformer(configs.model_config(config)))
    leaves = jax.tree.leaves(shapes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert len(leaves) == len(jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)))
    assert sum(leaf.size for leaf in leaves) > 10_000


def lowered_step(config):
    """The text of a config's training step for its mesh on eight devices; nothing is allocated."""
    sizes = axis_sizes(config.mesh, 8)
    model = Transformer(configs.model_config(config), precision(config.numerics.precision))
    mesh, optimizer = make_mesh(sizes), adamw(config.optimizer, 10_000)
    with sharding.use(mesh, sharding.rules_for(mesh, model.config.num_heads, model.config.num_kv_heads)):
        shapes, axes = abstract_parameters(model)
        abstract = jax.eval_shape(lambda p: new_state(p, optimizer, config.train.ema > 0), shapes)
        shardings = state_shardings(abstract, sharding.shardings(axes, shapes, mesh), mesh)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        objective = LanguageModel(model, 3, **config.objective)
        step = make_train_step(objective, optimizer, config.train)
        batch = data_module.batch_shapes(config, data_module.batch_sharding(config, mesh))
        replicated = NamedSharding(mesh, PartitionSpec())
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated)).lower(state, batch).as_text()


@pytest.mark.parametrize("path", OF_THEIR_OWN, ids=lambda path: path.stem)
def test_its_step_lowers_on_eight_devices(path):
    """Two layers of the real width in the real precision; experts over an axis of their own."""
    config = resolved(path)
    config.model.num_layers = 2
    config.mesh.update({"fsdp": 2, "expert": 2, "tensor": 2} if config.model.num_experts else {"fsdp": 4, "tensor": 2})
    config.data.batch_size, config.data.length = 8 * config.train.accumulate, min(config.data.length, 512)
    text = lowered_step(config)
    assert "dot_general" in text and "sharding" in text
    assert ("bf16" in text) == (config.numerics.precision != "float32")


def test_the_step_of_koala13b_lowers_at_full_size():
    text = lowered_step(resolved(tiny.ROOT / "configs/koala13b.py"))
    assert "tensor<40x5120x13824xf32>" in text, "all 40 layers of mlp/up_proj"
    assert "tensor<128x2048xi32>" in text, "the whole batch"


def write_llama(folder, vocab, hidden, ffn, layers, heads):
    """A LLaMA with random weights, in Hugging Face's form."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)
    norm = np.ones(hidden, np.float32)
    tensors = {"model.embed_tokens.weight": draw(vocab, hidden), "lm_head.weight": draw(vocab, hidden)}
    tensors["model.norm.weight"] = norm
    for i in range(layers):
        here = f"model.layers.{i}."
        tensors |= {f"{here}self_attn.{name}_proj.weight": draw(hidden, hidden) for name in "qkvo"}
        tensors |= {f"{here}mlp.{name}_proj.weight": draw(ffn, hidden) for name in ("gate", "up")}
        tensors |= {f"{here}mlp.down_proj.weight": draw(hidden, ffn)}
        tensors |= {f"{here}{name}_layernorm.weight": norm for name in ("input", "post_attention")}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    described = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": "silu",
        "num_key_value_heads": heads, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_koala13b_trains_from_files_of_the_right_shape(tmp_path):
    """Its own recipe, prompt format, precision and warm start; a LLaMA of 2 layers and a tokenizer of 300 pieces."""
    weights = write_llama(tmp_path / "llama", vocab=300, hidden=32, ffn=80, layers=2, heads=2)
    overrides = {
        "model.vocab_size": 300, "model.hidden_size": 32, "model.intermediate_size": 80, "model.num_layers": 2,
        "model.num_heads": 2, "model.num_kv_heads": 2, "model.head_dim": 16, "init_from.path": weights,
        "data.path": tiny.data(), "data.tokenizer": tiny.data() / "tokenizer", "data.length": 64,
        "data.batch_size": 8, "train.epochs": 0, "train.steps": 6, "log.every": 1, "log.dir": tmp_path,
        "optimizer.learning_rate": 1e-2, "eval.samples": 0,
    }  # fmt: skip
    arguments = (f"--config.{key}={value}" for key, value in overrides.items())
    status, output = tiny.run("--config=configs/koala13b.py", *arguments)
    assert status == 0 and f"starts from weights of {weights}" in output, output[-2000:]
    assert "│ 12 weights │" in output and "starts random" not in output, "each tensor of the file is taken"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5


@every_file
def test_the_data_it_prepares_are_described(path):
    if spec := resolved(path).data.prepare:
        assert data_module.load_config_file(str(tiny.ROOT / spec)).sources


def test_there_are_configs_of_data():
    assert {"embedded", "koala", "text"} <= {path.stem for path in DATA_FILES}


@pytest.mark.skipif(not (shutil.which("git") and (tiny.ROOT / ".git").exists()), reason="no git, or no clone of it")
def test_no_config_is_ignored_by_git():
    """A clone would lack it."""
    ask = lambda *paths: subprocess.run(["git", "check-ignore", *paths], cwd=tiny.ROOT, capture_output=True, text=True)
    if (control := ask("runs/x")).returncode != 0:
        pytest.skip(f"git does not answer: {control.stderr}")
    found = ask(*FILES, *DATA_FILES)
    assert (found.returncode, found.stdout) == (1, ""), found.stderr


@pytest.mark.parametrize("path", DATA_FILES, ids=lambda path: path.stem)
def test_data_configs(path):
    from data_pipelines.preparing.settings import plan_all, read_settings
    from data_pipelines.stages.source import PrepareError

    config = module(path).get_config("")
    if path.stem.startswith("synthesis_"):  # of another command, whose tests read it
        assert config.route in ("code", "maths")
    else:
        settings = read_settings(config)
        with contextlib.suppress(PrepareError):  # there are no files, but every option is looked at before that is said
            plan_all(settings, None)
            assert set(settings["sources"]) <= {
                "pydoc",
                "reversal",
                "conversion",
                "sorting",
                "addition",
                "date",
                "counting",
                "maximum",
            }, "these need none"
    assert f"configs/data/{path.name}" in module(path).__doc__
    with pytest.raises(ValueError):
        module(path).get_config("no_such=1")


# --- defaults and arguments ---


def test_the_defaults_are_complete_but_for_the_data_and_the_length():
    with pytest.raises(UserError, match="train: set exactly one of steps, epochs and tokens; found none of them"):
        check(base())
    config = base("tiny", num_layers=3)
    assert configs.model_config(config) == ModelConfig(**config.model.to_dict()) and config.model.num_layers == 3


def test_keys_cannot_be_made_up():
    """Not in a config file either: a mistyped key would be ignored in silence."""
    config = base("debug")
    for section, key, nearest in (("data", "lenght", "length"), ("optimizer", "learning_rat", "learning_rate")):
        with pytest.raises((AttributeError, KeyError), match=nearest):
            setattr(config[section], key, 1)
    with pytest.raises((AttributeError, KeyError), match="optimizer"):
        config.optimiser = ConfigDict()
    with pytest.raises(TypeError):
        config.data.length = "long"


def test_parse_arg():
    defaults = {"size": "13b", "fsdp": -1, "rate": 0.1, "tiny": False}
    assert parse_arg("", **defaults).to_dict() == defaults
    found = parse_arg("size=7b,fsdp=8,rate=1e-3,tiny", **defaults)
    assert found.to_dict() == {"size": "7b", "fsdp": 8, "rate": 1e-3, "tiny": True}
    assert parse_arg("tiny=false,size=a=b", **defaults).to_dict() == {**defaults, "size": "a=b"}


@pytest.mark.parametrize(
    "arg, message",
    [
        ("siez=7b", "unknown config argument 'siez': did you mean 'size'?"),
        ("zzz", "unknown config argument 'zzz': known are fsdp, rate, size, tiny"),
        ("fsdp=many", "config argument fsdp=many: expected int"),
        ("fsdp=1.5", "config argument fsdp=1.5: expected int"),
        ("fsdp", "config argument fsdp=true: expected int"),
        ("rate=low", "config argument rate=low: expected float"),
        ("tiny=maybe", "config argument tiny=maybe: expected true or false"),
    ],
)
def test_parse_arg_refuses(arg, message):
    with pytest.raises(UserError) as error:
        parse_arg(arg, size="13b", fsdp=-1, rate=0.1, tiny=False)
    assert str(error.value) == message


@pytest.mark.parametrize("key", configs.POSITIVE)
def test_what_must_be_positive(key):
    config = base("debug")
    config.train.steps = 1
    section, name = key.split(".")
    config[section][name] = 0
    with pytest.raises(UserError, match=rf"{re.escape(key)} = 0: expected a positive number"):
        check(config)
