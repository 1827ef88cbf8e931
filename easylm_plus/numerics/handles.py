"""What is differentiated in a tree of weights.

A cotangent has the dtypes of its primal, so the gradient of a weight that is stored in 8 bits cannot be taken with
respect to it. Each leaf therefore names a *handle*: what stands in its place when the loss is differentiated, and whose
cotangent is the gradient, in whatever form suits the leaf. A plain array is its own handle.

    view                       arrays and typed leaves, as the model multiplies by them
    handles(view)              what is differentiated, or None where nothing is learned
    held(view, handles)        the view with its handles put in
    cotangents(view, handles)  of a view, given those of its handles: for a `custom_vjp` that takes leaves
    gradients(cotangents)      the tree of gradients: arrays, or formats.Scaled
    observations(cotangents)   what the backward pass has measured beside them: {name of the weight: array}
"""

from functools import singledispatch
from typing import Any

import jax

from easylm_plus.tree import path_name


@singledispatch
def handle_of(leaf: Any) -> Any:
    """What is differentiated in the place of a leaf."""
    return leaf


@singledispatch
def hold(leaf: Any, handle: Any) -> Any:
    """The leaf with this handle."""
    return handle


@singledispatch
def cotangent_of(leaf: Any, handle: Any) -> Any:
    """What a `custom_vjp` returns for a leaf, given its handle's cotangent: nothing but that."""
    return handle


@singledispatch
def gradient_of(cotangent: Any) -> Any:
    """The gradient that a handle's cotangent is."""
    return cotangent


@singledispatch
def observation_of(cotangent: Any) -> Any:
    """What else a handle's cotangent tells; None: nothing."""
    return None


def handles(view: Any) -> Any:
    return jax.tree.map(handle_of, view, is_leaf=is_typed)


def held(view: Any, handles: Any) -> Any:
    return jax.tree.map(hold, view, handles, is_leaf=is_typed)


def gradients(cotangents: Any) -> Any:
    return jax.tree.map(gradient_of, cotangents, is_leaf=is_typed)


def cotangents(view: Any, handles: Any) -> Any:
    """What a `custom_vjp` returns for a view, given its handles' cotangents."""
    return jax.tree.map(cotangent_of, view, handles, is_leaf=is_typed)


def observations(cotangents: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(cotangents, is_leaf=is_typed)
    seen = {path_name(path): observation_of(leaf) for path, leaf in leaves}
    return {name: value for name, value in seen.items() if value is not None}


def is_typed(x: Any) -> bool:
    """Whether x is a typed leaf, or the handle of one."""
    registered = lambda verb: verb.dispatch(type(x)) is not verb.dispatch(object)
    return registered(handle_of) or registered(gradient_of)
