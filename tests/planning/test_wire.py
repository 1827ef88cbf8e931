"""Bytes on the wire, against small programs whose bytes are known by arithmetic."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from easylm_plus.planning.hlo import parse
from easylm_plus.planning.wire import (
    Traffic,
    collectives,
    describe,
    float_collectives,
    group_size,
    widened_f8,
    wire_bytes,
)

A, B = 2, 4  # mesh axes
X = (16, 8)  # what each device has; 128 elements


def compiled(function, *arrays):
    """The text of a program that runs `function` on every device of a mesh a=2, b=4, each with whole arrays."""
    mesh = jax.make_mesh((A, B), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: A * B])
    manual = jax.shard_map(function, mesh=mesh, in_specs=(P(),) * len(arrays), out_specs=P(), check_vma=False)
    return jax.jit(manual).lower(*arrays).compile().as_text()


def ones(dtype=jnp.float32, shape=X):
    return jnp.ones(shape, dtype)


def ring(n):
    return [(i, (i + 1) % n) for i in range(n)]


SIMPLE = {
    "gather": (lambda x: jax.lax.all_gather(x, "b"), "all-gather", 128 * B, 128 * (B - 1)),
    "gather over both": (lambda x: jax.lax.all_gather(x, ("a", "b")), "all-gather", 128 * 8, 128 * 7),
    "scatter": (lambda x: jax.lax.psum_scatter(x, "b"), "reduce-scatter", 128, 128 * (B - 1) / B),
    "sum": (lambda x: jax.lax.psum(x, "a"), "all-reduce", 128, 128 * 2 * (A - 1) / A),
    "sum over both": (lambda x: jax.lax.psum(x, ("a", "b")), "all-reduce", 128, 128 * 2 * 7 / 8),
    "exchange": (lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True), "all-to-all", 128, 128 * (B - 1) / B),
    "permute": (lambda x: jax.lax.ppermute(x, "b", ring(B)), "collective-permute", 128, 128),
}


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("dtype, size", [(jnp.uint8, 1), (jnp.float32, 4)], ids=["u8", "f32"])
def test_one_collective(name, dtype, size):
    function, kind, payload, wire = SIMPLE[name]
    shape = (B, 32) if name == "scatter" else X
    table = wire_bytes(compiled(function, ones(dtype, shape)))
    assert [key[0] for key in table] == [kind]
    traffic = table[kind, "u8" if size == 1 else "f32"]
    assert (traffic.payload, traffic.wire) == (payload * size, wire * size)


def test_a_cpu_program_widens_narrow_floats():
    """Which is why bytes of FP8 and bfloat16 are measured in programs for GPUs and TPUs, or sent as integers."""
    gather = SIMPLE["gather"][0]
    assert wire_bytes(compiled(gather, ones(jnp.bfloat16))) == {("all-gather", "f32"): Traffic(1, 2048.0, 1536.0)}
    assert wire_bytes(compiled(gather, ones(jnp.float8_e4m3fn))) == {("all-gather", "f16"): Traffic(1, 1024.0, 768.0)}


def test_arrays_of_one_instruction_count_by_dtype():
    both = lambda x, n: jax.lax.psum((x, x[:3], n), "b")
    text = compiled(both, ones(), ones(jnp.int32, (5, 5)))
    table = wire_bytes(text)
    assert table["all-reduce", "f32"] == Traffic(2, (16 + 3) * 8 * 4.0, (16 + 3) * 8 * 4 * 2 * 3 / 4)
    assert table["all-reduce", "s32"] == Traffic(1, 100.0, 150.0)


# --- loops ---


def nested(x):
    """3 x (5 x (gather, scatter), sum), and one more gather."""

    def inner(c, _):
        return 0.5 * jax.lax.psum_scatter(jax.lax.all_gather(c, "b", tiled=True), "b", tiled=True), None

    def outer(c, _):
        return jax.lax.psum(jax.lax.scan(inner, c, None, length=5)[0], "a"), None

    return jax.lax.all_gather(jax.lax.scan(outer, x, None, length=3)[0], "a")


@pytest.fixture(scope="module")
def nested_text():
    return compiled(nested, ones())


BYTES = 128 * 4
NESTED = {
    ("all-gather", "f32"): Traffic(16, BYTES * (15 * B + A), BYTES * (15 * (B - 1) + (A - 1))),
    ("reduce-scatter", "f32"): Traffic(15, BYTES * 15 * B, BYTES * 15 * (B - 1)),
    ("all-reduce", "f32"): Traffic(3, BYTES * 3, BYTES * 3 * 2 * (A - 1) / A),
}


def test_a_loop_counts_once_a_round(nested_text):
    assert wire_bytes(nested_text) == NESTED


def test_forgetting_the_rounds_is_seen(nested_text):
    """What counting the text, or only the inner loop, would give."""
    once = [dataclasses.replace(c, trips=1) for c in collectives(nested_text)]
    assert sum(c.wire for c in once) < 0.15 * sum(t.wire for t in NESTED.values())
    inner = nested_text.replace('"known_trip_count":{"n":"3"}', '"known_trip_count":{"n":"1"}')
    assert inner != nested_text
    assert wire_bytes(inner)["reduce-scatter", "f32"] == Traffic(5, BYTES * 5 * B, BYTES * 5 * (B - 1))


def without_counts(text):
    """As XLA prints for TPUs: without what it knows of a loop."""
    stripped = re.sub(r'"known_\w+":\{[^}]*\},?', "", text)
    assert stripped != text
    return stripped


def test_rounds_follow_from_the_loop_itself(nested_text):
    assert wire_bytes(without_counts(nested_text)) == NESTED


@pytest.mark.parametrize(
    "start, limit, step, test, rounds",
    [
        (0, 7, 1, jnp.less, 7),
        (3, 17, 1, jnp.less, 14),
        (2, 20, 3, jnp.less, 6),
        (2, 20, 3, jnp.less_equal, 7),
        (2, 21, 3, jnp.less, 7),
    ],
)
def test_counters_with_start_and_step(start, limit, step, test, rounds):
    def program(x):
        body = lambda c: (c[0] + step, jax.lax.psum(c[1] * 0.5, "a"))
        return jax.lax.while_loop(lambda c: test(c[0], limit), body, (jnp.int32(start), x))[1]

    text = compiled(program, ones())
    assert wire_bytes(text)["all-reduce", "f32"].arrays == rounds
    assert wire_bytes(without_counts(text) if "known_" in text else text)["all-reduce", "f32"].arrays == rounds


def unknown(x, n):
    return jax.lax.fori_loop(0, n, lambda _, c: jax.lax.psum(c * 0.5, "a"), x)


def test_an_unknown_number_of_rounds_is_an_error():
    text = compiled(unknown, ones(), jnp.int32(3))
    with pytest.raises(ValueError, match=r"loop while.* its number of rounds is not known"):
        wire_bytes(text)


def test_a_limit_that_moves_is_an_error():
    def program(x):
        body = lambda c: (c[0] + 1, c[1] - 1, jax.lax.psum(c[2] * 0.5, "a"))
        return jax.lax.while_loop(lambda c: c[0] < c[1], body, (jnp.int32(0), jnp.int32(9), x))[2]

    with pytest.raises(ValueError, match="not known"):
        wire_bytes(compiled(program, ones()))


def test_an_unknown_loop_that_sends_nothing_is_none():
    def program(x, n):
        return jax.lax.psum(jax.lax.fori_loop(0, n, lambda _, c: c * 0.5, x), "a")

    assert wire_bytes(compiled(program, ones(), jnp.int32(3))) == {("all-reduce", "f32"): Traffic(1, 512.0, 512.0)}


# --- calls, branches, forms ---


@pytest.mark.parametrize("swapped", [False, True])
def test_the_branch_that_sends_more_counts(swapped):
    less, more = (lambda x: jax.lax.psum(x, "a")), (lambda x: jax.lax.psum(x, ("a", "b")))
    branches = (more, less) if swapped else (less, more)
    table = wire_bytes(compiled(lambda x, n: jax.lax.cond(n > 0, *branches, x), ones(), jnp.int32(1)))
    assert table == {("all-reduce", "f32"): Traffic(1, BYTES, BYTES * 2 * 7 / 8)}


@pytest.mark.parametrize(
    "form, size",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups={{0,1,2},{3,4,5},{6,7}}", 3),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=[1,8]<=[2,2,2]T(2,1,0), use_global_device_ids=true", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
        ("source_target_pairs={{0,1},{1,0}}", 2),
        ("source_target_pairs={{0,0},{1,1}}", 1),
    ],
)
def test_sizes_of_groups(form, size):
    assert group_size(f"channel_id=1, {form}, dimensions={{0}}", 8) == size


@pytest.mark.parametrize("form", ["", "replica_groups=mesh['a'=2] {'c'}", "replica_groups=something[3]"])
def test_groups_that_cannot_be_read_are_an_error(form):
    with pytest.raises(ValueError, match="groups cannot be read"):
        group_size(f"channel_id=1, {form}", 8)


def test_groups_within_an_axis():
    """Not a whole axis of the mesh: written as a list."""
    pairs = lambda x: jax.lax.all_gather(x, "b", axis_index_groups=[[0, 1], [2, 3]])
    assert wire_bytes(compiled(pairs, ones())) == {("all-gather", "f32"): Traffic(1, 2 * BYTES, BYTES)}


ASYNCHRONOUS = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%wrapped (p: bf16[16,8]) -> bf16[64,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  ROOT %g = bf16[64,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="parallel"

ENTRY %main (x: f32[64,8], y: bf16[16,8], z: f8e4m3fn[16,8]) -> f32[16,8] {
  %x = f32[64,8]{1,0:T(8,128)S(1)} parameter(0), metadata={op_name="x = {, %y all-reduce(%z)"}
  %y = bf16[16,8]{1,0} parameter(1)
  %z = f8e4m3fn[16,8]{1,0:T(8,128)(4,1)} parameter(2)
  %r = ((f32[64,8]{1,0}), f32[16,8]{1,0}) reduce-scatter-start(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %rd = f32[16,8]{1,0} reduce-scatter-done(%r)
  %g = ((bf16[16,8]{1,0}), bf16[64,8]{1,0}, u32[]) async-start(%y), calls=%wrapped
  %gu = ((bf16[16,8]{1,0}), bf16[64,8]{1,0}, u32[]) async-update(%g), calls=%wrapped
  %gd = bf16[64,8]{1,0} async-done(%gu), calls=%wrapped
  %t = ((f8e4m3fn[16,8], bf16[16,8]), (f8e4m3fn[32,8], bf16[32,8])) all-gather-start(TYPE %z, /*index=1*/%y), GROUPS
  %td = (f8e4m3fn[32,8], bf16[32,8]) all-gather-done(%t)
  %p = (f32[64,8], f32[64,8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %pd = f32[64,8] collective-permute-done(%p)
  ROOT %o = f32[16,8] copy(%rd)
}
""".replace("TYPE", "f8e4m3fn[16,8]{1,0:T(8,128)(4,1)}").replace("GROUPS", "replica_groups=[4,2]<=[8]")


def test_asynchronous_forms_count_once():
    assert wire_bytes(ASYNCHRONOUS) == {
        ("reduce-scatter", "f32"): Traffic(1, 2048.0, 1536.0),
        ("all-gather", "bf16"): Traffic(2, 1024.0 + 512, 768.0 + 256),
        ("all-gather", "f8e4m3fn"): Traffic(1, 256.0, 128.0),
        ("collective-permute", "f32"): Traffic(1, 2048.0, 2048.0),
    }


def test_a_fused_scatter_of_a_tpu_counts_as_one():
    """XLA for TPUs writes it as a sum and a slice, in a computation with a name of its own."""
    sliced = ASYNCHRONOUS.replace("%wrapped", "%all-reduce-scatter.1").replace(
        "all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}",
        "all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add",
    )
    assert wire_bytes(sliced)["reduce-scatter", "bf16"] == Traffic(1, 256.0, 192.0)
    plain = sliced.replace("%all-reduce-scatter.1", "%fused")
    assert wire_bytes(plain)["all-reduce", "bf16"] == Traffic(1, 256.0, 384.0)


def test_attributes_may_go_on_in_the_next_line():
    """As those of Pallas kernels do, with a line that begins like the end of a computation."""
    broken = ASYNCHRONOUS.replace(
        "), calls=%wrapped\n  %gu", '), frontend_attributes={a={\n"b":"c"\n}}, calls=%wrapped\n  %gu'
    )
    assert broken != ASYNCHRONOUS
    assert wire_bytes(broken) == wire_bytes(ASYNCHRONOUS)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("copy(%rd)", "copy(%nobody)", "has an operand 'nobody' that is not there"),
        ("ROOT %o", "%o", "computation main has no ROOT"),
        ("copy(%rd)\n}", "copy(%rd)", "computation main has no end"),
    ],
)
def test_a_text_that_is_not_read_right_is_an_error(old, new, message):
    assert old in ASYNCHRONOUS
    with pytest.raises(ValueError, match=message):
        wire_bytes(ASYNCHRONOUS.replace(old, new))


def test_what_cannot_be_counted_is_an_error():
    ragged = ASYNCHRONOUS.replace("copy(%rd)", "ragged-all-to-all(%rd), replica_groups={}")
    with pytest.raises(ValueError, match="ragged-all-to-all o"):
        wire_bytes(ragged)
    with pytest.raises(ValueError, match="expected the text of a compiled HLO module"):
        wire_bytes("module @jit_f {}")


def test_the_text_is_read_whole():
    program = parse(ASYNCHRONOUS)
    assert (list(program.computations), program.entry, program.devices) == (["add", "wrapped", "main"], "main", 8)
    main = program.computations["main"]
    assert len(main.instructions) == 13 and main.root == "o"
    assert main.instructions["t"].operands == ("z", "y")
    assert main.instructions["x"].source == "x = {, %y all-reduce(%z)"


def test_description():
    lines = describe({("all-reduce", "f32"): Traffic(3, 1e9, 1.5e9), ("all-gather", "u8"): Traffic(1200, 4e9, 3e9)})
    assert lines.splitlines()[0] == "all-gather u8: 1,200 arrays, payload 4.000 GB, wire 3.000 GB"


# --- floats that travel ---


def test_float_collectives():
    def program(x, scale):
        codes = jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)
        body = lambda c, _: (jax.lax.pmax(c * 0.5, "b"), None)
        return jax.lax.all_gather(codes, "b"), jax.lax.scan(body, scale, None, length=6)[0], jax.lax.all_gather(x, "a")

    found = float_collectives(compiled(program, ones(), jnp.float32(1)))
    assert sorted(found) == [("f32", (), "all-reduce", 6), ("f32", (A, 1, *X), "all-gather", 1)]


E4 = jnp.float8_e4m3fn


def in_a_loop(x):
    """The same array each round, converted outside."""
    body = lambda c, _: (c * 0.5 + jax.lax.all_gather(x, "b").astype(jnp.float32).sum(), None)
    return jax.lax.scan(body, jnp.float32(0), None, length=3)[0]


@pytest.mark.parametrize(
    "function, widened",
    [
        (lambda x: jax.lax.all_gather(x, "b"), True),
        (lambda x: jax.lax.all_gather(x.T.reshape(4, 32), "b"), True),
        (lambda x: jax.lax.all_gather(x.astype(jnp.float32), "b"), True),
        (lambda x: jax.lax.psum(x.astype(jnp.float32), "b"), True),
        (in_a_loop, True),
        (lambda x: jax.lax.all_gather(jax.lax.bitcast_convert_type(x, jnp.uint8), "b"), False),
        (lambda x: jax.lax.all_gather(jnp.sin(x.astype(jnp.float32)), "b"), False),
    ],
    ids=["gather", "moved", "decoded", "summed", "in a loop", "as integers", "another array"],
)
def test_fp8_that_was_widened(function, widened):
    found = widened_f8(compiled(function, ones(E4)))
    assert bool(found) == widened
    assert all(c.dtype in ("f16", "f32") for c in found)
