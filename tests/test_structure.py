"""The house rules that a reader relies on, checked on the source: who may import whom, what multiplies weights, how
long things are. Every rule is shown to catch an offender.

Floors, top to bottom: a package imports from its own floor and from those below. `errors` and `tree` are for all;
`config` and `door` for the commands only. In data_pipelines what lies beside the doors is for all,
and no door imports another.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    "doors", "alignment", "compression", "planning", "evaluation", "inference", "training", "objectives", "interop",
    "models", "numerics", "parallel",
)  # fmt: skip
FOR_ALL = ("errors", "tree")
DATA_FLOORS = (
    "doors", "reporting", "synthesis", "batches", "mixing", "templates", "preparing", "stages", "contamination",
    "sources", "files", "tokenizers",
)  # fmt: skip
DATA_DOORS = ("prepare", "tokenize", "inspect", "report", "synthesize", "train_tokenizer")
FORBIDDEN_IMPORTS = {
    "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch", "transformers", "tensorflow",
    "aqt", "qwix",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
PRODUCTS = {"dot", "dot_general", "matmul", "einsum", "tensordot", "vdot", "inner", "conv_general_dilated", "Dense"}
LIBRARIES = {"jax", "jnp", "lax", "np", "numpy", "nn"}
ATTENTION_PRODUCTS = (
    'scores = jnp.einsum("bgqk,bgsk->bgqs", q_BGQK, k, preferred_element_type=jnp.float32) * K**-0.5',
    'y_BGQK = jnp.einsum("bgqs,bgsk->bgqk", weights, v)',
    'scores = jnp.einsum("gqk,gsk->gqs", block[0], block[1], preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5',
    'outputs.append(_by_head(jnp.einsum("gqs,gsk->gqk", weights, v_block), q))',
    'd_weights = jnp.einsum("gqk,gsk->gqs", dy_block, v_block, preferred_element_type=jnp.float32)',
    'dq.append(_by_head(jnp.einsum("gqs,gsk->gqk", d_scores, k_block), q))',
    'dk = dk.at[:, keys].add(jnp.einsum("gqs,gqk->gsk", d_scores, q_block, preferred_element_type=jnp.float32))',
    'dv = dv.at[:, keys].add(jnp.einsum("gqs,gqk->gsk", weights, dy_block, preferred_element_type=jnp.float32))',
)
# by the powers of decays, which a moving average makes of its weights
AVERAGE_PRODUCTS = (
    'both = jnp.einsum("dtc,dcx->dtx", jnp.concatenate([within, left], axis=1), x_DCX, precision=EXACT)',
    'carried = jnp.einsum("dnc,dnx->dcx", decays[..., 1:] * a.leave[..., None], before, precision=EXACT)',
)
# of a weight's errors by sums of its inputs' squares, which decide what it is rounded to before a model has it
COMPRESSION_PRODUCTS = ("product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)",)
ALLOWED_PRODUCTS = {
    "models/attend.py": ATTENTION_PRODUCTS,
    "models/ema.py": AVERAGE_PRODUCTS,
    "compression/surgeon.py": COMPRESSION_PRODUCTS,
}
LONGEST_FILE, LONGEST_STEP = 600, 45


def sources(package):
    """path below the root -> text, of every file of a package."""
    return {path.relative_to(ROOT): path.read_text("utf-8") for path in sorted((ROOT / package).rglob("*.py"))}


OURS, DATA = sources("easylm_plus"), sources("data_pipelines")


def imports(path, text):
    """(line, module imported), with `from a import b` as a.b; wherever in the file, relative ones made absolute."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = path.with_suffix("").parts
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def floor(parts):
    """("easylm_plus", "models", ...) -> its floor's number; None for what all may import."""
    name = parts[1] if len(parts) > 1 else "doors"
    if parts[0] == "data_pipelines":  # beside its doors lies what all may import
        return DATA_FLOORS.index(name) if name in DATA_FLOORS else 0 if name in DATA_DOORS else None
    if name in FOR_ALL:
        return None
    return FLOORS.index(name) if name in FLOORS else 0


def upward_imports(path, text):
    """Imports of a file from a floor of its package above its own, and of commands' utilities by packages; of doors
    of data_pipelines by each other."""
    here, floors = path.with_suffix("").parts, DATA_FLOORS if path.parts[0] == "data_pipelines" else FLOORS
    own = floor(here)
    own = len(floors) if own is None else own  # what all may import imports nothing
    for line, module in imports(path, text):
        parts = module.split(".")
        if parts[0] != here[0]:
            continue
        target = floor(parts)
        another_door = parts[0] == "data_pipelines" and target == own == 0
        if target is not None and (target < own or another_door):
            yield f"{path}:{line} ({floors[own] if own < len(floors) else 'for all'}) imports {module}"


def forbidden(path, text):
    """Imports and calls that run code from data, or bring another framework."""
    for line, module in imports(path, text):
        if module.split(".")[0] in FORBIDDEN_IMPORTS:
            yield f"{path}:{line} imports {module}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            yield f"{path}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"{path}:{node.lineno} allows pickles"


def products(path, text, allowed=()):
    """Matrix products, other than the lines allowed: operators, functions of a library, methods that are called."""
    lines, nodes = text.splitlines(), list(ast.walk(ast.parse(text)))
    of_a_library_or_called = {node.func for node in nodes if isinstance(node, ast.Call)} | {
        node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in LIBRARIES
    }
    for node in nodes:
        operator = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult)
        named = isinstance(node, ast.Attribute) and node.attr in PRODUCTS and node in of_a_library_or_called
        imported = isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & PRODUCTS
        if (operator or named or imported) and lines[node.lineno - 1].strip() not in allowed:
            yield f"{path}:{node.lineno} {lines[node.lineno - 1].strip()}"


def too_long(path, text):
    if (count := text.count("\n")) > LONGEST_FILE:
        yield f"{path} has {count} lines, more than {LONGEST_FILE}"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or node.name != "train_step":
            continue
        if (count := node.end_lineno - node.lineno + 1) > LONGEST_STEP:
            yield f"{path}:{node.lineno} train_step has {count} lines, more than {LONGEST_STEP}"


def foreign(path, text):
    """What a plain data machine does not have."""
    for line, module in imports(path, text):
        if module.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax", "easylm_plus"):
            yield f"{path}:{line} imports {module}"


def found(rule, files):
    return [offence for path, text in files.items() for offence in rule(path, text)]


def test_every_package_has_a_floor():
    packages = {path.parts[1] for path in OURS if len(path.parts) > 2}
    assert packages <= set(FLOORS)
    assert "models" in packages


def test_imports_point_down():
    assert found(upward_imports, OURS | DATA) == []


def test_every_room_of_the_data_has_a_floor():
    rooms = {path.parts[1] for path in DATA if len(path.parts) > 2}
    assert rooms == set(DATA_FLOORS) - {"doors"}


def test_data_pipelines_needs_neither_jax_nor_the_model():
    assert found(foreign, DATA) == []
    assert len(DATA) > 10


def test_only_verbs_multiply_by_a_weight():
    elsewhere = {path: text for path, text in OURS.items() if path.parts[1] != "numerics"}
    allowed = {Path("easylm_plus") / name: lines for name, lines in ALLOWED_PRODUCTS.items()}
    assert found(lambda path, text: products(path, text, allowed.get(path, ())), elsewhere) == []
    for path, lines in allowed.items():
        assert all(line in OURS[path] for line in lines)  # the exceptions are still there


def test_no_code_from_data_and_no_other_framework():
    assert found(forbidden, OURS | DATA) == []


def test_files_and_the_step_are_short():
    assert found(too_long, OURS | DATA) == []
    assert any("def train_step" in text for text in OURS.values())


@pytest.mark.parametrize("package", ("easylm_plus", "data_pipelines"))
def test_importing_the_package_does_not_load_jax(package):
    script = f"import sys, {package}; print(sorted(m for m in ('jax', 'jaxlib', 'flax', 'torch') if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert run.stdout.strip() == "[]", run.stderr
    with_jax = script.replace("import sys,", "import sys, jax,")
    run = subprocess.run([sys.executable, "-c", with_jax], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert "'jax'" in run.stdout


def test_importing_every_data_module_does_not_load_jax():
    beam = importlib.util.find_spec("apache_beam")
    paths = [path for path in DATA if path.name != "beam_graph.py" or beam]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    script = f"import sys, {', '.join(modules)}; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert run.stdout.strip() == "False", run.stderr


# --- every rule catches an offender, and leaves alone what is right ---


@pytest.mark.parametrize(
    ("place", "line", "caught"),
    (
        ("models/new.py", "from easylm_plus.training.state import TrainState", True),
        ("models/new.py", "from easylm_plus.models.config import ModelConfig", False),
        ("models/new.py", "from easylm_plus import training", True),
        ("models/new.py", "from easylm_plus import numerics", False),
        ("models/new.py", "from ..interop import huggingface", True),
        ("models/new.py", "from . import rope", False),
        ("models/new.py", "def f():\n    import easylm_plus.objectives.lm", True),
        ("parallel/new.py", "from easylm_plus.numerics.verbs import project", True),
        ("parallel/new.py", "from easylm_plus.errors import UserError", False),
        ("training/new.py", "from easylm_plus.config import base", True),
        ("inference/new.py", "from easylm_plus.door import run", True),
        ("train.py", "from easylm_plus.config import base", False),
        ("errors.py", "from easylm_plus.parallel import mesh", True),
        ("__init__.py", "from easylm_plus.train import main", False),
    ),
)
def test_a_wrong_import_is_caught(place, line, caught):
    assert bool(list(upward_imports(Path("easylm_plus") / place, line))) == caught


@pytest.mark.parametrize(
    ("place", "line", "caught"),
    (
        ("sources/new.py", "from data_pipelines.stages.chunk import Sample", True),
        ("sources/new.py", "from data_pipelines.conversation import Turn", False),
        ("batches/new.py", "from data_pipelines.tokenize import main", True),
        ("batches/new.py", "from data_pipelines.mixing import turns", False),
        ("datasets.py", "from data_pipelines.batches import packing", True),
        ("datasets.py", "from data_pipelines.errors import InputError", False),
        ("prepare.py", "from data_pipelines.inspect import rows", True),
        ("prepare.py", "from data_pipelines.reporting.page import render", False),
    ),
)
def test_a_wrong_import_within_the_data_is_caught(place, line, caught):
    assert bool(list(upward_imports(Path("data_pipelines") / place, line))) == caught


@pytest.mark.parametrize(
    ("rule", "text", "caught"),
    (
        (foreign, "import jax.numpy as jnp", True),
        (foreign, "def f():\n    from easylm_plus.errors import UserError", True),
        (foreign, "import jaxtyping", False),
        (forbidden, "import pickle", True),
        (forbidden, "def f():\n    from torch import nn", True),
        (forbidden, "eval('1')", True),
        (forbidden, "model.eval(); re.compile('x')", False),
        (forbidden, "np.load(path, allow_pickle=True)", True),
        (forbidden, "np.load(path, allow_pickle=False)", False),
        (products, "y = x @ w", True),
        (products, "y @= w", True),
        (products, "y = jnp.einsum('ij,jk', x, w)", True),
        (products, "f = jax.lax.dot_general", True),
        (products, "y = x.dot(w)", True),
        (products, "with matmul_precision(policy.matmul): pass", False),
        (products, "from jax.numpy import matmul", True),
        (products, "@property\ndef f(self): return self.x * 2", False),
        (too_long, "x = 1\n" * 601, True),
        (too_long, "x = 1\n" * 600, False),
        (too_long, "def train_step(state):\n" + "    x = 1\n" * 45, True),
        (too_long, "def train_step(state):\n" + "    x = 1\n" * 44, False),
    ),
)
def test_an_offender_is_caught(rule, text, caught):
    assert bool(list(rule(Path("easylm_plus/models/new.py"), text))) == caught


def test_an_allowed_product_is_allowed_by_its_whole_line_only():
    allowed = "    " + ATTENTION_PRODUCTS[2]
    text = f"def f():\n{allowed}\n{allowed.replace('block[1]', 'w')}"
    assert [re.search(r":(\d+)", offence)[1] for offence in products(Path("f.py"), text, ATTENTION_PRODUCTS)] == ["3"]
