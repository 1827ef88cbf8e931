"""EasyLM's streaming checkpoints: every tensor lands where it belongs, rotary pairs are reordered.

The files are written here from the description of the format alone: msgpack's bytes put together by hand.
"""

import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from test_convert import run

from easylm_plus.errors import UserError
from easylm_plus.interop import easylm
from easylm_plus.interop.configs import read_raw
from easylm_plus.models.families import preset
from easylm_plus.models.rope import rotate, rotations
from easylm_plus.training.checkpoint import locate, read_parameters

CONFIG = preset("debug")
D, F, H, G, K, V, L = 64, 128, 4, 2, 16, 512, 2


def text(s):
    assert len(s) < 256
    return b"\xd9" + bytes([len(s)]) + s.encode()


def tensor(array):
    """flax's bytes of an array: extension type 1 around [shape, name of the dtype, bytes]."""
    shape = (
        b"\x9f"[:0] + bytes([0x90 + len(array.shape)]) + b"".join(b"\xce" + struct.pack(">I", n) for n in array.shape)
    )
    data = array.tobytes()
    packed = b"\x93" + shape + text(array.dtype.name) + b"\xc6" + struct.pack(">I", len(data)) + data
    return b"\xc9" + struct.pack(">I", len(packed)) + b"\x01" + packed


def record(path, value):
    return (
        b"\x92"
        + bytes([0x90 + len(path)])
        + b"".join(map(text, path))
        + b"\xc6"
        + struct.pack(">I", len(value))
        + value
    )


def weights(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"transformer/wte/embedding": (V, D), "transformer/ln_f/kernel": (D,), "lm_head/kernel": (D, V)}
    for i in range(L):
        layer = f"transformer/h/{i}/"
        shapes |= {f"{layer}attention/wq/kernel": (D, H * K), f"{layer}attention/wk/kernel": (D, G * K),
                   f"{layer}attention/wv/kernel": (D, G * K), f"{layer}attention/wo/kernel": (H * K, D),
                   f"{layer}feed_forward/w1/kernel": (D, F), f"{layer}feed_forward/w2/kernel": (F, D),
                   f"{layer}feed_forward/w3/kernel": (D, F), f"{layer}attention_norm/kernel": (D,),
                   f"{layer}ffn_norm/kernel": (D,)}  # fmt: skip
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(path, arrays, lead=("params",), extra=b""):
    path.write_bytes(extra + b"".join(record([*lead, *name.split("/")], tensor(x)) for name, x in arrays.items()))
    return path


@pytest.mark.parametrize("lead", (("params",), ("params", "params")))
def test_every_tensor_lands_where_it_belongs(tmp_path, lead):
    """A file of parameters, and a train state, whose optimizer is left out."""
    theirs = weights(ml_dtypes.bfloat16)
    step = record(["step"], b"\x01") + record(["opt_state", "0", "mu"], tensor(np.ones(3)))
    path = write(tmp_path / "streaming", theirs, lead, step if len(lead) == 2 else b"")
    run(input=path, output=tmp_path / "ours", model="debug", **{"from": "easylm"})
    ours = read_parameters(*locate(tmp_path / "ours"))
    layer = ours["layers"]["1"]
    expected = {
        "transformer/wte/embedding": ours["embed_tokens"]["embedding"],
        "transformer/ln_f/kernel": ours["norm"]["weight"],
        "lm_head/kernel": ours["lm_head"]["kernel"],
        "transformer/h/1/attention/wv/kernel": layer["self_attn"]["v_proj"]["kernel"],
        "transformer/h/1/attention/wo/kernel": layer["self_attn"]["o_proj"]["kernel"],
        "transformer/h/1/feed_forward/w1/kernel": layer["mlp"]["gate_proj"]["kernel"],
        "transformer/h/1/feed_forward/w2/kernel": layer["mlp"]["down_proj"]["kernel"],
        "transformer/h/1/feed_forward/w3/kernel": layer["mlp"]["up_proj"]["kernel"],
        "transformer/h/1/attention_norm/kernel": layer["input_layernorm"]["weight"],
        "transformer/h/1/ffn_norm/kernel": layer["post_attention_layernorm"]["weight"],
    }
    for name, array in expected.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("reordered", (True, False))
def test_scores_are_those_of_neighbouring_pairs(tmp_path, reordered):
    """q k' of vectors turned as EasyLM turns them, (0, 1), (2, 3) ..., and as we do; not reordered, they differ."""
    theirs = weights()
    path = write(tmp_path / "streaming", theirs)
    source = easylm.EasyLMStream(path)
    read = {rule.ours[0]: rule.read for rule in easylm.EASYLM}
    T = 6
    x = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)

    def their_heads(name, heads):
        pairs = (x @ theirs[f"transformer/h/0/attention/{name}/kernel"]).reshape(T, heads, K // 2, 2)
        angles = np.arange(T)[:, None, None] * 10000.0 ** (-2 * np.arange(K // 2) / K)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(T, heads, K)

    def our_heads(name, heads):
        kernel = source.read(f"transformer/h/0/attention/w{name}/kernel")
        if reordered:
            (kernel,) = read[f"layers/{{i}}/self_attn/{name}_proj/kernel"]((kernel,), CONFIG)
        y = (x @ kernel).reshape(1, T, heads, K)
        return np.asarray(rotate(y, *rotations(np.arange(T)[None], CONFIG))[0])

    scores = lambda q, k: np.einsum("thk,shk->hts", q, np.repeat(k, H // G, axis=1))
    found = scores(our_heads("q", H), our_heads("k", G))
    expected = scores(their_heads("wq", H), their_heads("wk", G))
    assert np.allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max()) == reordered


def test_an_export_names_the_tokens_of_the_tokenizer(tmp_path):
    """The file does not say what a model's special tokens are; transformers would take its own."""
    path, options = write(tmp_path / "streaming", weights()), {"model": "debug", "from": "easylm", "to": "hf"}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    for name, tokenizer, expected in (("with", {"tokenizer": tiny.data() / "tokenizer"}, (1, 2, 0)),
                                      ("without", {}, (None, None, None))):  # fmt: skip
        run(input=path, output=tmp_path / name, **options, **tokenizer)
        raw = read_raw(tmp_path / name)
        assert tuple(raw[key] for key in keys) == expected


def test_the_rules_are_undone():
    rng = np.random.default_rng(0)
    for rule in easylm.EASYLM:
        (array,) = (rng.normal(size=(D, H * K)),)
        np.testing.assert_array_equal(rule.write(rule.read((array,), CONFIG), CONFIG)[0], array)


def test_large_tensors_that_flax_cuts_in_chunks(tmp_path, monkeypatch):
    """flax writes an array beyond 2^30 bytes as a dict of chunks."""
    from flax import serialization

    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    array = np.arange(4096, dtype=np.float32).reshape(64, 64)
    (tmp_path / "stream").write_bytes(record(["params", "lm_head", "kernel"], serialization.to_bytes(array)))
    source = easylm.EasyLMStream(tmp_path / "stream")
    assert source.shape("lm_head/kernel") == (64, 64)
    np.testing.assert_array_equal(source.read("lm_head/kernel"), array)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda data: data[:-10], "damaged after byte"),
        (lambda data: b"\x80\x04\x95" + data, "damaged after byte 0"),
        (lambda data: b"", "found no parameters, expected a stream of EasyLM"),
        (lambda data: record(["params", "x"], b"\x01"), "found int, expected a tensor"),
        (lambda data: b"\x92\x07\x08", "found 7 after byte 0, expected a path of strings"),
        (lambda data: b"\x92\x92\xa6params\x07\x08", r"found \['params', 7\] after byte 0, expected a path"),
        (lambda data: b"\x92\x90\x08", r"found \[\] after byte 0, expected a path"),
    ),
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    path = write(tmp_path / "streaming", weights())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"streaming: {message}"):
        easylm.EasyLMStream(path)


@pytest.mark.parametrize(
    ("model", "message"),
    (
        ("", "--model is not set; expected the preset that .*streaming holds"),
        ("tiny", r"transformer/wte/embedding has shape \[512, 64\], expected \[1024, 128\]"),
        ("nonsense", "unknown model 'nonsense'"),
    ),
)
def test_the_wrong_preset_is_named(tmp_path, model, message):
    path = write(tmp_path / "streaming", weights())
    with pytest.raises(UserError, match=message):
        run(input=path, output=tmp_path / "ours", model=model, **{"from": "easylm"})
    assert not (tmp_path / "ours").exists()


def test_a_missing_and_an_unknown_tensor_are_named(tmp_path):
    arrays = weights()
    kernel = arrays.pop("transformer/h/1/feed_forward/w3/kernel")
    path = write(tmp_path / "streaming", arrays)
    with pytest.raises(UserError, match=r"found no tensor transformer/h/1/feed_forward/w3/kernel \[64, 128\]"):
        run(input=path, output=tmp_path / "ours", model="debug", **{"from": "easylm"})
    write(path, {**arrays, "transformer/h/1/feed_forward/w3/kernel": kernel, "transformer/h/1/attention/wz": kernel})
    with pytest.raises(UserError, match="found transformer/h/1/attention/wz"):
        run(input=path, output=tmp_path / "ours", model="debug", **{"from": "easylm"})


def test_old_differences_are_added_in_floating_point(tmp_path, capsys):
    """As Koala was published: target - base, rounded to bfloat16, without a checksum."""
    base, target = weights(ml_dtypes.bfloat16), weights(ml_dtypes.bfloat16, seed=1)
    difference = {name: (target[name].astype(np.float32) - base[name]).astype(base[name].dtype) for name in base}
    run(input=write(tmp_path / "base_stream", base), output=tmp_path / "base", model="debug", **{"from": "easylm"})
    path = write(tmp_path / "diff_stream", difference)
    options = {"diff_base": tmp_path / "base", "recover": True, "model": "debug", "from": "easylm"}
    run(input=path, output=tmp_path / "koala", **options)
    assert "carries no checksum" in capsys.readouterr().err
    found = read_parameters(*locate(tmp_path / "koala"))
    name = "transformer/h/1/feed_forward/w1/kernel"
    sum_ = (base[name].astype(np.float32) + difference[name].astype(np.float32)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["layers"]["1"]["mlp"]["gate_proj"]["kernel"], sum_)
    close = lambda x: np.abs(np.asarray(x, np.float32) - target[name].astype(np.float32)).max() < 0.1
    assert close(sum_) and not close(base[name])
    assert len(jax.tree.leaves(found)) == len(base)
