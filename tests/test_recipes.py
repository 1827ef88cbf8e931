"""The experiments in configs/ are what was published: sizes, tokens a step and in all; and what their docstrings say
of memory is what the estimate gives. Without data, each ends in one message that says where to get it."""

import functools
import re

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.templates.template import load_template
from data_pipelines.tokenizers.tokenizer import load_tokenizer
from easylm_plus import config as configs
from easylm_plus.errors import UserError
from easylm_plus.models.transformer import Transformer, abstract_parameters
from easylm_plus.numerics.levels import Numerics
from easylm_plus.numerics.precision import precision
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import AXES, axis_sizes
from easylm_plus.planning.memory import estimate
from easylm_plus.training.data import load_config_file
from easylm_plus.training.optimizer import adamw
from easylm_plus.training.schedules import schedule, weight_decay
from easylm_plus.training.state import new_state, state_shardings

T, B, M = 1e12, 1e9, 2**20
FILES = sorted((tiny.ROOT / "configs").glob("*.py"))
OURS = {"debug", "koala_tiny"}  # no published experiment; they make their own data

# Of each config: billions of parameters (elements in the released weights, or what the paper prints; of FP8-LM, whose
# vocabulary is ours, what that makes of its sizes), tokens a step, tokens in all (None: by epochs), peak learning rate.
# Sources: as in the docstrings; a step's "4M" and "16M" are powers of two.
PUBLISHED = {
    "bitnet_700m": (0.77799, 1 * M, 100 * B, 1.5e-3),
    "bitnet_1_3b": (1.3391, 1 * M, 100 * B, 1.2e-3),
    "bitnet_3b": (3.4268, 1 * M, 100 * B, 1.2e-3),
    "bitnet_3b:size=700m,twin=true": (0.77787, 1 * M, 100 * B, 2.5e-4),
    "bitnet_3_9b": (4.4652, 1 * M, 100 * B, 1.2e-3),
    "bitnet_2b4t": (2.4128, 4 * M, 4 * T, 1.2e-3),
    "codellama34b": (33.744, 4 * M, 500 * B, 1.5e-4),
    "codellama34b:stage=long": (33.744, 1 * M, 11_000 * M, 2e-5),
    "codellama7b": (6.7385, 4 * M, 500 * B, 3e-4),
    "codellama7b:stage=long": (6.7385, 2 * M, 6000 * M, 2e-5),
    "gpt_fp8_125m": (0.16213, 1 * M, 100 * B, 6e-4),
    "gpt_fp8_7b": (6.855, 4 * M, 100 * B, 3e-4),
    "gpt_fp8_13b": (13.10, 4 * M, 100 * B, 3e-4),
    "gpt_fp8_175b": (175.2, 1 * M, 40 * B, 3e-5),
    "koala13b": (13.016, 128 * 2048, None, 2e-5),
    "koala7b": (6.7384, 128 * 2048, None, 2e-5),
    "koala13b_qlora": (13.016, 16 * 2048, None, 2e-4),
    "llama7b": (6.7384, 4 * M, 1 * T, 3e-4),
    "llama2_7b": (6.7384, 4 * M, 2 * T, 3e-4),
    "llama2_13b": (13.016, 4 * M, 2 * T, 3e-4),
    "llama2_70b": (68.977, 4 * M, 2 * T, 1.5e-4),
    "llama3_8b": (8.0303, 8 * M, 15 * T, 3e-4),
    "mixtral": (46.703, 4 * M, 2 * T, 3e-4),
    "palm8b": (8.63, 1 * M, 780 * B, 1e-2 / 64),
    "palm62b": (62.50, 2 * M, 795 * B, 1e-2 / 8192**0.5),
    "palm540b": (540.35, 4 * M, 780 * B, 1e-2 / 18432**0.5),
    "phind34b": (33.744, 64 * 4096, None, 2e-5),
    "skywork13b": (13.854, 16 * M, 2 * T, 6e-4),
    "skywork13b:session=2": (13.854, 16 * M, 1 * T, 6e-5),
    "skywork13b:session=3": (13.854, 16 * M, 0.13 * T, 6e-5),
    "switch": (3.677, 1 * M, 576.7 * B, 1e-3),
    "yuan2b": (2.089, 384 * 8192, 300 * B, 2e-4),
    "yuan2b_sft": (2.089, 1152 * 4096, None, 8e-5),
    "yuan51b": (51.84, 1152 * 4096, 300 * B, 9e-5),
    "yuan102b": (102.58, 1152 * 4096, 300 * B, 3e-5),
    "yuan_m32": (39.94, 1536 * 4096, 2 * T, 1e-4),
}


def loaded(name):
    stem, _, arg = name.partition(":")
    config = load_config_file(f"{tiny.ROOT}/configs/{stem}.py:{arg}")
    configs.check(config)
    return config


@functools.cache
def weights(name):
    """The shapes and logical axes of a config's weights."""
    config = loaded(name)
    return abstract_parameters(Transformer(configs.model_config(config), precision(config.numerics.precision)))


def figures(config, shapes):
    """(billions of parameters, tokens a step, tokens in all or None, peak learning rate)."""
    step = config.data.batch_size * config.data.length
    whole = config.train.tokens or config.train.steps * step or None
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9
    return count, step, whole, config.optimizer.learning_rate


def differences(found, published):
    """Names of the figures that are not the published ones: steps exactly, the rest as far as they are printed."""
    close = {"parameters": 5e-4, "tokens a step": 0, "tokens": 1e-3, "peak": 1e-9}
    differ = lambda a, b, rel: a is not b if None in (a, b) else abs(a - b) > rel * b
    return [name for (name, rel), a, b in zip(close.items(), found, published, strict=True) if differ(a, b, rel)]


def test_every_config_is_here_and_in_the_readme():
    table = (tiny.ROOT / "README.md").read_text().partition("| config |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {path.stem for path in FILES}
    assert {path.stem for path in FILES} - OURS == {name.partition(":")[0] for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_what_was_published(name):
    assert not differences(figures(loaded(name), weights(name)[0]), PUBLISHED[name])


@pytest.mark.parametrize("name", ["palm540b", "yuan2b"])
def test_what_is_not_as_published_is_seen(name):
    """One layer more, a row more, a hundredth of the peak, a percent of the run."""
    config = loaded(name)
    config.data.batch_size += 1
    config.model.num_layers += 1
    config.optimizer.learning_rate *= 1.01
    config.train.update({key: config.train[key] * 101 // 100 for key in ("tokens", "steps")})
    shapes, _ = abstract_parameters(Transformer(configs.model_config(config)))
    assert differences(figures(config, shapes), PUBLISHED[name]) == ["parameters", "tokens a step", "tokens", "peak"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_schedule_ends_where_it_says(name):
    """The peak is reached, and the end of the run has the end's rate."""
    config = loaded(name)
    steps = config.train.steps or config.train.tokens // (config.data.batch_size * config.data.length) or 1000
    rate = jax.vmap(schedule(config.optimizer, steps))
    warm = config.optimizer.warmup_steps or round(config.optimizer.warmup_share * steps)
    first, peak, last = map(float, rate(np.array([0, max(0, warm - 1), steps])))
    assert peak == pytest.approx(config.optimizer.learning_rate, rel=1e-3)
    assert last == pytest.approx(config.optimizer.end_learning_rate, rel=1e-3, abs=1e-9)
    assert first <= peak and (warm == 0 or first == pytest.approx(peak / warm, rel=1e-3))


# --- memory ---

STATED = re.compile(r"about (\d+) GiB on (?:each of )?(\d+|one) devices?(?: \((\w+=[\w=,]+)\))?")


def statements():
    """(config with arguments, GiB, devices) of every sentence about memory."""
    for path in FILES:
        text = re.sub(r"\s+", " ", path.read_text().split('"""')[1])
        for gib, devices, arg in STATED.findall(text):
            yield f"{path.stem}:{arg}", int(gib), 1 if devices == "one" else int(devices)


def estimated(name, devices):
    """GiB on each of so many devices, of which none has to be there."""
    config = loaded(name)
    sizes = axis_sizes(config.mesh, devices)
    mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    micro = config.data.batch_size // config.train.accumulate
    assert micro % (sizes["replica"] * sizes["fsdp"] * sizes["expert"]) == 0, "rows for every device"
    shapes, axes = weights(name)
    optimizer, model = adamw(config.optimizer, 10**9), configs.model_config(config)
    policy = precision(config.numerics.precision)
    token = sharding._rules.set(sharding.rules_for(mesh, model.num_heads, model.num_kv_heads))
    try:
        numerics = Numerics(config.numerics, config.optimizer, policy, shapes, axes)
        abstract = jax.eval_shape(lambda p: new_state(p, optimizer, config.train.ema > 0, numerics), shapes)
        shardings = state_shardings(abstract, sharding.shardings(axes, shapes, mesh), mesh)
    finally:
        sharding._rules.reset(token)
    tokens, parts = config.data.batch_size * config.data.length, config.train.accumulate
    needed = estimate(abstract, shardings, model, policy, tokens, parts, config.objective.chunk, numerics)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert needed.parameters < 1.1 * whole / sizes["fsdp"], (
        "all but norms is cut: a size that does not divide cuts nothing"
    )
    return needed.total / 2**30


@pytest.mark.parametrize("name, gib, devices", list(statements()))
def test_the_memory_it_says_is_what_is_estimated(name, gib, devices):
    assert abs(estimated(name, devices) - gib) < 0.6


def test_every_experiment_says_its_memory():
    assert {name.partition(":")[0] for name, _, _ in statements()} == {path.stem for path in FILES} - OURS
    assert abs(estimated("koala7b:", 8) - estimated("koala7b:", 4)) > 10, "it depends on the devices"


# --- without data ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_data_one_message_says_where_to_get_it(name, tmp_path, monkeypatch):
    """The literal command of the docstring, in a folder that has the configs and nothing else."""
    (tmp_path / "configs").symlink_to(tiny.ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    stem, _, arg = name.partition(":")
    status, output = tiny.inside(f"--config=configs/{stem}.py" + (f":{arg}" if arg else ""))
    text, config = " ".join(output.split()), loaded(name)
    assert status == 1 and output.count("the run needs what is not there") == 1 and "Traceback" not in output
    assert "set the key to where it is" not in text, "an origin is missing"
    wanted = [(config.data.path, config.data.origin), (config.data.tokenizer, config.data.tokenizer_origin)]
    if config.init_from.path:
        wanted.append((config.init_from.path, config.init_from.origin))
    for path, origin in wanted:
        assert path in text and " ".join(origin.split()) in text
    assert sorted(tmp_path.iterdir()) == [tmp_path / "configs"], "nothing is written"


# --- single recipes ---


def test_bitnet_drops_its_rate_and_its_decay_halfway():
    """Table 2 of the training tips: 700M's lines start at 1.5e-3 and 1e-3, and decay ends; its twin is not ternary."""
    config, steps = loaded("bitnet_700m"), 1000
    rate, decay = schedule(config.optimizer, steps), weight_decay(config.optimizer, steps)
    config.optimizer.warmup_steps = 0
    at = lambda step: (float(schedule(config.optimizer, steps)(np.int32(step))), float(decay(np.int32(step))))
    assert at(499) == pytest.approx((1.5e-3 * 0.501, 0.1), rel=1e-3)
    assert at(500) == pytest.approx((1e-3 * 0.5, 0.0), rel=1e-3)
    assert float(rate(np.int32(374))) == pytest.approx(1.5e-3)
    twin = loaded("bitnet_700m:twin=true")
    assert len(config.numerics.rules) == 1 and not twin.numerics.rules
    assert config.model.sub_norms and not twin.model.sub_norms
    assert {k for k, v in config.model.items() if v != twin.model[k]} == {"sub_norms"}


def test_what_is_learned_of_the_documents():
    assert [(loaded(n).data.fim_rate, loaded(n).data.fim_spm_rate) for n in ("yuan2b", "yuan_m32", "codellama7b")] == [
        (0.5, 0.5), (0.5, 0.5), (0.9, 0.5)]  # fmt: skip
    assert loaded("codellama34b").data.fim_rate == loaded("yuan2b_sft").data.fim_rate == 0
    assert (loaded("switch").data.corruption, loaded("switch").data.corruption_rate) == ("spans", 0.15)


def test_code_llama_turns_its_positions_more_slowly_on_long_rows():
    short, long = (loaded(f"codellama34b:stage={stage}").model for stage in ("code", "long"))
    assert (short.rope_theta, short.max_length, long.rope_theta, long.max_length) == (1e4, 4096, 1e6, 16_384)


def test_sessions_and_stages_follow_each_other():
    assert loaded("skywork13b:session=2").init_from.path == loaded("skywork13b").log.dir
    assert loaded("skywork13b:session=3").init_from.path == loaded("skywork13b:session=2").log.dir
    assert loaded("codellama34b:stage=long").init_from.path == loaded("codellama34b").log.dir
    assert loaded("yuan2b_sft").init_from.path == loaded("yuan2b").log.dir
    for name in ("skywork13b:session=4", "codellama34b:stage=short", "koala_tiny:data=other"):
        with pytest.raises(UserError, match=f"config argument {name.partition(':')[2]}: expected"):
            loaded(name)


@pytest.mark.parametrize("stem", [path.stem for path in FILES if re.search(r"Arguments: .*\bsize\b", path.read_text())])
def test_a_size_that_is_not_there_is_one_message(stem):
    with pytest.raises(UserError, match=r"size=3t: expected|unknown model '.*3t': did you mean"):
        loaded(f"{stem}:size=3t")


def test_phind_learns_the_answers_alone():
    tokenizer = load_tokenizer(tiny.data() / "tokenizer")
    template = load_template(loaded("phind34b").data.template, tokenizer)
    turns = (Turn("system", "Be brief.", 0.0), Turn("user", "Add.", 0.0), Turn("assistant", "a + b", 1.0))
    (example,) = template.encode_many([Conversation("mine", "0", turns)])
    learned = example.ids[example.weights > 0]
    assert tokenizer.decode(learned[:-1].tolist()) == "a + b" and learned[-1] == tokenizer.eos_id
    text = tokenizer.decode([i for i in example.ids.tolist() if i not in tokenizer.special_tokens.values()])
    assert text == "### System Prompt\nBe brief.\n\n### User Message\nAdd.\n\n### Assistant\na + b\n\n"
