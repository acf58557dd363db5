"""Hypothesis strategies of recipes for `helpers.drawn_models`."""

import keras
from helpers.drawn_layers import CELLS, MERGERS, OPERATIONS, Part
from helpers.drawn_models import Head, Recipe
from hypothesis import strategies as st

JAX = keras.backend.backend() == "jax"
POLICIES = ("mixed_float16", "mixed_bfloat16", "float32")
SHAPES = ("functional", "sequential", "deferred", "subclassed")
ACTIVATIONS = ("linear", "relu", "gelu", "tanh", "sigmoid", "softmax")
# Models, and other parts that have no policy of their own.
_MODELS = {"inner", "functional", "sequential"}
_NO_DTYPE = {"again", "borrow", "op"} | _MODELS
_ATTENTION = {"mha", "gqa"}


def _made(cls, *arguments):
    # `st.builds` would also try to draw the arguments with defaults.
    return st.tuples(*arguments).map(lambda values: cls(*values))


def _parts(kinds, options=None, inner=None):
    return _made(
        Part,
        st.sampled_from(kinds),
        st.none() if options is None else st.sampled_from(options),
        st.just(()) if inner is None else inner,
    )


def _cells():
    names = st.sampled_from(sorted(CELLS))
    return _made(Part, st.just("cells"), st.lists(names, min_size=1, max_size=2).map(tuple))


_PRODUCTS = _parts(["dense", "einsum", "conv"], ACTIVATIONS)
_IN_TIME = _parts(["dense", "activation"], ACTIVATIONS) | _parts(["layer_norm", "softmax"])
_CHAIN = st.one_of(
    _PRODUCTS,
    _parts(["layer_norm", "batch_norm", "unit_norm", "rescaling", "softmax", "relu", "masking"]),
    _parts(["activation"], ACTIVATIONS),
    _parts(["dropout"], (0.0, 0.25, 0.5)),
    _parts(["normalization"], (True, False)),
    _parts(["bidirectional", "recurrent"], sorted(CELLS)),
    _cells(),
    _parts(["time"], inner=st.tuples(_IN_TIME)),
    _parts(["spectral"], inner=st.tuples(_parts(["dense", "conv"], ACTIVATIONS))),
)
_GRAPH = st.one_of(
    _CHAIN,
    _parts(sorted(_ATTENTION)),
    _parts(["again"], (0, 1, 2)),
    _parts(["merge"], sorted(MERGERS)),
    _parts(["op"], sorted(OPERATIONS)),
)


def _holding(inside, chain):
    """Return parts that hold up to three others."""
    several = st.lists(inside, min_size=1, max_size=3).map(tuple)
    alone = st.lists(chain, min_size=1, max_size=3).map(tuple)
    return _parts(["block", "inner", "functional"], inner=several) | _parts(
        ["sequential"], inner=alone
    )


_HOLDING = _holding(_GRAPH | _holding(_GRAPH, _CHAIN), _CHAIN | _holding(_GRAPH, _CHAIN))
_HEADS = _made(
    Head,
    st.sampled_from(["flat", "last", "pool", "whole"]),
    st.sampled_from(["linear", "softmax", "sigmoid", None]),
)

# A case that is drawn too rarely: a subclassed model with a functional one, and a layer held twice.
HOLDING = Recipe(
    "subclassed",
    ("float",),
    "one",
    (Part("functional", inner=(Part("dense", "relu"),)), Part("mha"), Part("borrow", 0)),
    (Head("flat"),),
)
# Fixed recipes: that one, and a graph that forks, masks, calls a layer twice and nests.
FEW = {
    "holding": HOLDING,
    "graph": Recipe(
        "functional",
        ("tokens", "float"),
        "dict",
        (
            Part("dense", "gelu"),
            Part("block", inner=(Part("layer_norm"), Part("activation", "softmax"))),
            Part("again", 0, back=1),
            Part("merge", min(MERGERS)),
            Part("op", min(OPERATIONS)),
        ),
        (Head("pool"), Head("last", "softmax", 1)),
    ),
}


@st.composite
def recipes(draw, *, overrides=True, shapes=SHAPES):
    """Draw a recipe.

    Args:
        draw: From Hypothesis.
        overrides: Whether layers may have their own policy.
        shapes: The allowed kinds of models.
    """
    shape = draw(st.sampled_from(shapes))
    one_way = shape in {"sequential", "deferred"}
    part = (_CHAIN if one_way else _GRAPH) | _HOLDING
    if shape == "subclassed":  # its file stores the recipe
        part |= _parts(["borrow"], (0, 1, 2))
    parts = draw(st.lists(part, min_size=1, max_size=5))
    if overrides:
        parts = [_overridden(draw, each) for each in parts]
    if one_way:
        inputs, form, heads = [draw(st.sampled_from(["float", "tokens"]))], "one", [draw(_HEADS)]
    else:
        parts = [each._replace(back=draw(st.integers(0, 2))) for each in parts]
        form = draw(st.sampled_from(["one", "list", "dict"]))
        most = 1 if form == "one" else 2
        inputs = draw(st.lists(st.sampled_from(["float", "tokens"]), min_size=1, max_size=most))
        heads = draw(st.lists(_HEADS, min_size=1, max_size=most))
        heads = [each._replace(back=draw(st.integers(0, 2))) for each in heads]
    recipe = Recipe(shape, tuple(inputs), form, tuple(parts), tuple(heads))
    if _masks(recipe):
        return recipe._replace(parts=tuple(map(_without_softmax, parts)))
    return recipe


def _overridden(draw, part):
    if part.kind in _NO_DTYPE:
        return part
    return part._replace(
        dtype=draw(st.sampled_from([None, None, None, "float32", "mixed_bfloat16"]))
    )


def _without_softmax(part):
    # Keras's Softmax would add a mask of (2, 3) to inputs of (2, 3, 4), which is an error.
    kind, option = ("activation", "softmax") if part.kind == "softmax" else part[:2]
    return part._replace(kind=kind, option=option, inner=tuple(map(_without_softmax, part.inner)))


def built_alike(recipe):
    """Return whether Keras builds the same graph for a recipe under every policy.

    It drops the mask of a half-precision tensor that enters a model with a float32 Input: a graph
    built in float32 has the mask, and one built in half precision does not.
    """
    return not (_masks(recipe) and _any(recipe.parts, _MODELS))


def _masks(recipe):
    return "tokens" in recipe.inputs or _any(recipe.parts, {"masking"})


def _any(parts, kinds):
    return any(part.kind in kinds or _any(part.inner, kinds) for part in parts)


def feasible(recipe, policy):
    """Return the policy, or bfloat16 for attention in float16, which JAX lacks on a CPU."""
    if JAX and policy == "mixed_float16" and _any(recipe.parts, _ATTENTION):
        return "mixed_bfloat16"
    return policy
