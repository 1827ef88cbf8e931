"""PaLM's block and Switch's experts against a derivation of their own: NumPy, float64, one token after the other.

Nothing here is shared with the package but the parameters. Gradients are judged by differences of the float64 loss
along random directions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from easylm_plus.errors import UserError
from easylm_plus.models.families import preset
from easylm_plus.models.moe import kept
from easylm_plus.models.transformer import Transformer, abstract_parameters
from easylm_plus.objectives.lm import LanguageModel, stacked_statistics
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh

VOCAB, D, F, HEADS, K, LAYERS, EXPERTS = 40, 16, 24, 4, 8, 2, 4
ATOL = 5e-5
COMMON = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": F, "num_heads": HEADS, "head_dim": K,
    "num_layers": LAYERS, "scan_layers": False, "init": "fan_in", "norm_eps": 1e-5,
}  # fmt: skip
PALM = {"num_kv_heads": 1, "norm": "layer_no_bias", "parallel_block": True, "tie_embeddings": True, "logit_scale": 0.25}
SWITCH = {
    "num_kv_heads": HEADS, "activation": "relu", "gated": False, "num_experts": EXPERTS, "experts_per_token": 1,
    "norm_topk": False, "capacity_factor": 1.0,
}  # fmt: skip
BALANCE, Z = 0.3, 0.05
ROOM = 3  # tokens an expert takes: 12 / 4 experts
IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)


@functools.cache
def built(kind):
    """(model, parameters moved off their starting values, so that norm weights matter)."""
    model = Transformer(preset("debug", **COMMON, **{"palm": PALM, "switch": SWITCH}[kind]))
    params = tiny.fresh(model, 0)
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    moved = [np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32) for x in leaves]
    return model, jax.tree.unflatten(treedef, moved)


# --- the derivation ---


def layer_norm(x, weight):
    x = x - x.mean()
    return x / np.sqrt((x * x).mean() + 1e-5) * weight


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean() + 1e-5) * weight


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def turned(x, position):
    """Pairs (i, i + K/2) turned by position * 10000^(-2 i / K)."""
    half = len(x) // 2
    angle = position * 10000.0 ** (-np.arange(half) / half)
    return np.concatenate([x[:half] * np.cos(angle) - x[half:] * np.sin(angle),
                           x[half:] * np.cos(angle) + x[:half] * np.sin(angle)])  # fmt: skip


def attention(h, p):
    """h[T, D] -> [T, D]; the key heads are shared by groups of query heads."""
    q, k, v = ((h @ p[f"{n}_proj"]["kernel"]).reshape(len(h), -1, K) for n in "qkv")
    out = np.zeros((len(h), HEADS, K))
    for head in range(HEADS):
        group = head * k.shape[1] // HEADS
        for t in range(len(h)):
            query = turned(q[t, head], t)
            scores = softmax(np.array([query @ turned(k[s, group], s) for s in range(t + 1)]) / np.sqrt(K))
            out[t, head] = sum(w * v[s, group] for s, w in enumerate(scores))
    return out.reshape(len(h), -1) @ p["o_proj"]["kernel"]


def palm_logits(params, ids, parallel=True, norm=layer_norm, scale=0.25):
    x = params["embed_tokens"]["embedding"][ids]
    for i in range(LAYERS):
        p = params["layers"][str(i)]
        h = np.array([norm(row, p["input_layernorm"]["weight"]) for row in x])
        y = attention(h, p["self_attn"])
        if not parallel:
            h = np.array([norm(row, p["input_layernorm"]["weight"]) for row in x + y])
        gate, up = h @ p["mlp"]["gate_proj"]["kernel"], h @ p["mlp"]["up_proj"]["kernel"]
        x = x + y + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down_proj"]["kernel"]
    x = np.array([norm(row, params["norm"]["weight"]) for row in x])
    return scale * x @ params["embed_tokens"]["embedding"].T


def switch_experts(h, p, order, normed, capacity):
    """(y[T, D], the layer's terms of balance and z, dropped tokens)."""
    logits = h @ p["router"]["kernel"]
    y, load, chances, z, dropped = np.zeros_like(h), np.zeros(EXPERTS), np.zeros(EXPERTS), 0.0, 0
    taken = np.zeros(EXPERTS)
    for t in order(range(len(h))):
        probabilities = softmax(logits[t])
        expert = probabilities.argmax()
        load[expert] += 1
        chances += probabilities
        z += np.log(np.exp(logits[t]).sum()) ** 2
        if taken[expert] == capacity:
            dropped += 1
            continue
        taken[expert] += 1
        hidden = np.maximum(h[t] @ p["experts"]["up_proj"]["kernel"][expert], 0)
        y[t] = (1.0 if normed else probabilities[expert]) * (hidden @ p["experts"]["down_proj"]["kernel"][expert])
    return y, (load, chances, z), dropped


def switch_logits(params, ids, order=lambda tokens: tokens, normed=False, capacity=ROOM):
    """(logits, statistics of each layer, dropped tokens)."""
    x, stats, lost = params["embed_tokens"]["embedding"][ids], [], 0
    for i in range(LAYERS):
        p = params["layers"][str(i)]
        x = x + attention(np.array([rms_norm(row, p["input_layernorm"]["weight"]) for row in x]), p["self_attn"])
        h = np.array([rms_norm(row, p["post_attention_layernorm"]["weight"]) for row in x])
        y, terms, dropped = switch_experts(h, p["mlp"], order, normed, capacity)
        x, stats, lost = x + y, [*stats, terms], lost + dropped
    x = np.array([rms_norm(row, params["norm"]["weight"]) for row in x])
    return x @ params["lm_head"]["kernel"], stats, lost


def derived_logits(kind, params, **variant):
    if kind == "palm":
        return np.stack([palm_logits(params, row, **variant) for row in IDS])
    return np.stack([switch_logits(params, row, **variant)[0] for row in IDS])


def derived_loss(kind, params):
    """Cross-entropy over all but the last token, and Switch's two losses of the whole batch."""
    logits = derived_logits(kind, params)[:, :-1]
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, IDS[:, 1:, None], axis=-1)[..., 0]
    loss = (log_z - picked).mean()
    if kind == "switch":
        rows = [switch_logits(params, row)[1] for row in IDS]
        for layer in zip(*rows):
            load, chances, z = (sum(terms) / IDS.size for terms in zip(*layer))
            loss += (BALANCE * EXPERTS * (load * chances).sum() + Z * z) / LAYERS
    return loss


# --- the comparison ---


def wide(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


@functools.cache
def ours(kind):
    model, params = built(kind)
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, IDS))(params))


@pytest.mark.parametrize("kind", ("palm", "switch"))
def test_logits(kind):
    np.testing.assert_allclose(ours(kind), derived_logits(kind, wide(built(kind)[1])), rtol=0, atol=ATOL)


WRONG = {
    "palm: one after the other": ("palm", {"parallel": False}),
    "palm: mean not removed": ("palm", {"norm": rms_norm}),
    "palm: logits not scaled": ("palm", {"scale": 1.0}),
    "switch: last tokens first": ("switch", {"order": reversed}),
    "switch: weight made 1": ("switch", {"normed": True}),
    "switch: room for all": ("switch", {"capacity": 99}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_derivation_is_noticed(name):
    kind, variant = WRONG[name]
    assert np.abs(ours(kind) - derived_logits(kind, wide(built(kind)[1]), **variant)).max() > 1000 * ATOL


def loss_and_gradients(kind, **coefficients):
    model, params = built(kind)
    objective = LanguageModel(model, 1, chunk=8, **coefficients)
    batch = tiny.next_token_batch(IDS)
    share = lambda p: objective(p, batch, objective.denominators(batch))
    return jax.jit(jax.value_and_grad(share, has_aux=True))(params)


@pytest.mark.parametrize("kind", ("palm", "switch"))
def test_loss_and_gradients(kind):
    """Along four directions; a gradient without the router's losses has another slope."""
    params = wide(built(kind)[1])
    (loss, sums), gradients = loss_and_gradients(kind, router_balance=BALANCE, router_z=Z)
    assert float(loss) == pytest.approx(derived_loss(kind, params), rel=1e-6)
    bare = loss_and_gradients(kind)[1]
    rng, step, missed = np.random.default_rng(2), 1e-6, 0.0
    for _ in range(4):
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        at = lambda s, way=way: derived_loss(kind, jax.tree.map(lambda x, d: x + s * d, params, way))
        slope = (at(step) - at(-step)) / (2 * step)
        along = lambda tree, way=way: sum(
            jax.tree.leaves(jax.tree.map(lambda g, d: (np.float64(g) * d).sum(), tree, way))
        )
        assert along(gradients) == pytest.approx(slope, rel=2e-4, abs=2e-5)
        missed = max(missed, abs(along(bare) - slope))
    assert (missed > 1e-3) == (kind == "switch")
    if kind == "switch":
        assert (
            sums["router"]["dropped"] * LAYERS == pytest.approx(dropped_tokens(params)) and dropped_tokens(params) > 2
        )


def dropped_tokens(params):
    return sum(switch_logits(params, row)[2] for row in IDS)


def test_capacity_does_not_bind_in_decoding():
    """One token at a time, with a cache: as if all experts had room."""
    model, params = built("switch")
    cache, out = model.init_cache(len(IDS), IDS.shape[1]), []
    decode = jax.jit(lambda ids, cache: model.apply({"params": params}, ids, None, None, cache))
    for t in range(IDS.shape[1]):
        logits, cache = decode(IDS[:, t : t + 1], cache)
        out.append(logits)
    roomy = derived_logits("switch", wide(params), capacity=99)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), roomy, rtol=0, atol=ATOL)


# --- queries and keys of one projection ---


@pytest.mark.parametrize(("scales", "same"), (((0, 1), True), ((1, 0), False)), ids=("as it is", "exchanged"))
def test_shared_queries_and_keys_are_two_scaled_copies(scales, same):
    """A plain model whose q and k are u w[0] + b[0] and u w[1] + b[1], written out, gives the same logits."""
    keys = {**COMMON, "num_kv_heads": HEADS}
    shared = Transformer(preset("debug", **keys, share_qk=True))
    params = jax.tree.map(np.asarray, tiny.fresh(shared, 0))
    rng, written = np.random.default_rng(3), {**params, "layers": {}}
    for i, layer in params["layers"].items():
        attention = layer["self_attn"]
        for name in ("qk_weight", "qk_bias"):
            attention[name] = rng.normal(size=attention[name].shape).astype(np.float32)
        u, (w, b) = attention["qk_proj"]["kernel"], (attention["qk_weight"], attention["qk_bias"])
        plain = {f"{n}_proj": {"kernel": u * w[at], "bias": b[at]} for n, at in zip("qk", scales)}
        plain["v_proj"] = {**attention["v_proj"], "bias": np.zeros(D * 2, np.float32)}
        written["layers"][i] = {**layer, "self_attn": {**plain, "o_proj": attention["o_proj"]}}
    ours = jax.jit(shared.apply)({"params": params}, IDS)
    theirs = jax.jit(Transformer(preset("debug", **keys, qkv_bias=True)).apply)({"params": written}, IDS)
    assert (np.abs(ours - theirs).max() < ATOL) == same


# --- both ways ---


@pytest.mark.parametrize("causal", (True, False))
def test_a_bidirectional_model_sees_later_tokens_of_its_document_only(causal):
    model = Transformer(preset("debug", **COMMON, num_kv_heads=2, causal=causal))
    params = tiny.fresh(model, 0)
    apply = jax.jit(lambda ids, segments: model.apply({"params": params}, ids, None, segments))
    segments = np.repeat([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]], 2, axis=0)
    other = IDS.copy()
    other[:, 5] = (IDS[:, 5] + 1) % VOCAB  # the last token of the first document
    change = np.abs(apply(other, segments) - apply(IDS, segments)).max((0, 2))
    assert (change[:5] > 1e-3).all() == (not causal) and (change[:5] == 0).all() == causal
    assert change[5] > 0.1 and change[6:].max() == 0
    if not causal:
        with pytest.raises(UserError, match=r"model\.causal = False: a bidirectional model has no next token"):
            model.init_cache(1, 8)


# --- capacity ---


def one_choice(**overrides):
    model = Transformer(preset("debug", **COMMON, **SWITCH, **overrides))
    return model, tiny.fresh(model, 0)


def test_what_is_dropped_does_not_depend_on_neighbours_or_padding():
    """Of a document alone, after another one in the same row, and before padding."""
    model, params = one_choice()
    run = jax.jit(lambda ids, segments: model.apply({"params": params}, ids, None, segments, mutable=["router"]))
    rng = np.random.default_rng(0)
    ids, other = rng.integers(0, VOCAB, (2, 1, 12)).astype(np.int32)
    alone, state = run(ids, np.ones_like(ids))
    positions = np.concatenate([np.arange(12), np.arange(12)])[None]
    packed = jax.jit(lambda ids, segments: model.apply({"params": params}, ids, positions, segments))(
        np.concatenate([other, ids], axis=1), np.repeat([[1, 2]], 12, axis=1)
    )
    padded, padded_state = run(np.pad(ids, ((0, 0), (0, 20))), np.pad(np.ones_like(ids), ((0, 0), (0, 20))))
    np.testing.assert_allclose(packed[:, 12:], alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(padded[:, :12], alone, rtol=0, atol=1e-5)
    dropped = [float(stacked_statistics(s["router"]["layers"])["dropped"].sum()) for s in (state, padded_state)]
    assert dropped[0] == dropped[1] > 0
    roomy = jax.jit(lambda ids: model.roomy().apply({"params": params}, ids))(ids)
    assert np.abs(roomy - alone).max() > 1e-2, "drops change the logits, so the above says something"


def test_rows_with_padding_and_capacity_on_a_mesh():
    """Logits, loss and what is logged of routing are those of one device."""
    model, params = one_choice()
    batch = {name: x[:8] for name, x in tiny.documents_batch("none", VOCAB).items()}
    assert (batch["segment_ids"] == 0).any()
    objective = LanguageModel(model, 2, chunk=32, router_balance=0.1, router_z=0.01)
    share = lambda params, batch: objective(params, batch, objective.denominators(batch))
    (loss, sums), mesh = jax.jit(share)(params, batch), make_mesh({"fsdp": 2, "expert": 2, "sequence": 2})
    with sharding.use(mesh, sharding.rules_for(mesh, HEADS, HEADS)):
        shapes, axes = abstract_parameters(model)
        placed = jax.device_put(params, sharding.shardings(axes, shapes, mesh))
        cut = NamedSharding(mesh, sharding.spec_of(("batch", "length"), batch["inputs"].shape, mesh))
        other, others = jax.jit(share)(placed, jax.device_put(batch, cut))
    assert float(other) == pytest.approx(float(loss), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums, others)
    assert 0 < float(sums["router"]["dropped"] / sums["router"]["tokens"]) < 1


def test_half_a_token_of_room_is_rounded_up():
    """100 tokens, 10 experts: 1.1 times an even share are 11, not the 12 that 11.000000000000002 would give."""
    config = preset("debug", num_experts=10, experts_per_token=1, norm_topk=False, capacity_factor=1.1)
    same, ones = np.zeros((1, 100, 1), np.int32), np.ones((1, 100), np.int32)
    assert kept(same, ones, config, may_drop=True).sum() == 11
    assert kept(same[:, :95], ones[:, :95], config, may_drop=True).sum() == 11  # of 10.45
    assert kept(same, ones, config, may_drop=False).sum() == 100
