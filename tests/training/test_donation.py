"""The step writes its new state over the old one, and nothing keeps a second copy of the parameters beside it."""

import gc
import re
from unittest import mock

import jax
import pytest
import tiny

from easylm_plus import train
from easylm_plus.training.checkpoint import read_meta

WIDTH = 40  # of the feed-forward: no other test's arrays have this shape
SHAPE = (16, WIDTH)
PARAMETERS = 4  # of that shape: gate and up of two layers
SMALL = {"model__intermediate_size": WIDTH, "train__steps": 2, "checkpoint__every": 2, "mesh__fsdp": 4,
         "mesh__tensor": 2}  # fmt: skip
REAL_JIT = jax.jit


class Seen:
    """What a run shows of itself: the text of its compiled step, and how many arrays of SHAPE live after each step."""

    def __init__(self):
        self.step, self.alive = "", []

    def formats(self, text):
        self.step = text
        return "seen"

    def push(self, *_):
        gc.collect()
        self.alive.append(sum(x.shape == SHAPE and not x.is_deleted() for x in jax.live_arrays()))


def seen(folder, jit=REAL_JIT):
    """Of a run of two steps whose programs are made by `jit`."""
    folder.mkdir()
    watch = Seen()
    with (
        mock.patch.object(train, "matmul_formats", watch.formats),
        mock.patch.object(train.Meter, "push", watch.push),
        mock.patch.object(jax, "jit", jit),
    ):
        status, output = tiny.inside(f"--config={tiny.write_config(folder, **SMALL)}")
    assert status == 0, output
    return watch


def donated(watch):
    """The inputs that the compiled step writes its outputs over."""
    alias = re.search(r"input_output_alias=\{(.*?) \}, ", watch.step)
    return {int(number) for number in re.findall(r": \((\d+), ", alias[1])} if alias else set()


def test_a_run_holds_one_copy_of_its_state(tmp_path):
    watch = seen(tmp_path / "run")
    leaves = read_meta(tmp_path / "run/checkpoints", 2)["arrays"]
    assert donated(watch) == set(range(len(leaves))), "all leaves of the state, and none of the batch"
    assert watch.alive == [3 * PARAMETERS] * 2, "parameters and Adam's two moments"


def kept(kept_arrays):
    """jax.jit as if the first parameters stayed alive: their program's arguments are not donated but held."""

    def jit(f, **options):
        if "donate_argnums" not in options or getattr(f, "__name__", "") != "<lambda>":
            return REAL_JIT(f, **options)
        program = REAL_JIT(f, out_shardings=options["out_shardings"])
        return lambda params: kept_arrays.append(params) or program(params)

    return jit


def test_a_second_copy_is_seen(tmp_path):
    without = lambda f, **options: REAL_JIT(f, **{k: v for k, v in options.items() if k != "donate_argnums"})
    assert donated(seen(tmp_path / "not donated", without)) == set()
    held = []
    assert seen(tmp_path / "kept", kept(held)).alive == [4 * PARAMETERS] * 2 and len(held) == 1


@pytest.mark.parametrize("donates", [True, False])
def test_the_state_given_to_a_step_is_gone(donates):
    """What donation means here: the old arrays are deleted, and the new ones lie where they were."""
    state = {"w": jax.device_put(jax.numpy.arange(8.0), jax.devices()[0])}
    place = state["w"].unsafe_buffer_pointer()
    new = REAL_JIT(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0 if donates else ())(state)
    assert state["w"].is_deleted() == donates == (new["w"].unsafe_buffer_pointer() == place)
