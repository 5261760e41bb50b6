"""Docstrings keep their word: their shape rows are parsed, called with distinct sizes, and checked.

A row is `names  (shape)  more` or `names  {name: (shape)}  more`; `returns` and what follows `->`
in a one-line docstring are outputs. Inputs are built from the docstring alone.
"""

import inspect
import re

import pytest
import torch
from conftest import MODALITIES

import agent
import mssm
import mummi_loss

SIZES = dict(T=2, B=5, M=3, hidden=8, A=7, H=11, N=13, D=17, D_h=19, D_c=23, D_z=19 + 23, D_f=29, D_x=32)
ELLIPSIS, EVENT = (2, 5), (3, 7)  # ..., *event
SHAPE = re.compile(r"\((?:(?:\.\.\.|[A-Z*])[\w\s.,*-]*)?\)")  # (), (N,), (M, ..., D), (H - 1, N), (..., 2 D)
ROW = re.compile(r"(\w+(?:, \w+)*)  +(\S.*)")
BOOL = ("present", "observed")

model = mssm.MSSM(MODALITIES, SIZES["A"], d_h=SIZES["D_h"], d_c=SIZES["D_c"], d_f=SIZES["D_f"], units=8, hidden=8,
                  channels=1, fused_prior=True)  # fmt: skip
behaviour = agent.Agent(model, None, SIZES["A"], units=8, horizon=SIZES["H"])
start = mssm.State(torch.randn(SIZES["N"], SIZES["D_h"]), torch.randn(SIZES["N"], SIZES["D_c"]))

FUNCTIONS = [  # and the arguments for which a docstring gives no shape
    (mssm.gaussian, {}),
    (mssm.product_of_experts, {}),
    (model.prior, {}),
    (model.fused_prior, {}),
    (model.latent, {}),
    (model.reward, {}),
    (model.posterior, {}),
    (mummi_loss.gaussian_log_prob, dict(event_dims=len(EVENT))),
    (mummi_loss.gaussian_kl, {}),
    (mummi_loss.log_density_ratio, {}),
    (mummi_loss.log_inner_product, {}),
    (mummi_loss.info_nce, {}),
    (mummi_loss.mutual_information, {}),
    (mummi_loss.mummi_loss, {}),
    (mummi_loss.elbo_loss, {}),
    (behaviour.actor.forward, {}),
    (behaviour.actor.sample, {}),
    (behaviour.actor.mode, {}),
    (behaviour.actor.entropy, {}),
    (behaviour.critic.forward, {}),
    (agent.imagine, dict(model=model, policy=behaviour.actor.sample, state=start, horizon=SIZES["H"])),
    (agent.lambda_return, dict(lambda_=0.5)),
    (behaviour.returns, {}),
]


def sizes(shape):
    """'(M, ..., 2 D)' as a tuple of numbers."""
    result = []
    for dimension in shape.strip("()").replace("2 D", "2 * D").split(","):
        dimension = dimension.strip()
        if dimension in ("...", "*event"):
            result += ELLIPSIS if dimension == "..." else EVENT
        elif dimension:
            result.append(eval(dimension, {}, SIZES))
    return tuple(result)


def random_like(name, text):
    """An input as its row describes it, or a dictionary of one modality."""
    if text.startswith("{name: float}"):
        return {"rgb": 0.5}
    x = torch.rand(sizes(SHAPE.search(text).group()))
    x = x > 0.5 if name in BOOL else x
    return {"rgb": x} if text.startswith("{") else x


def parse(function):
    """The inputs a docstring describes, and its text about the output."""
    documentation, parameters = inspect.getdoc(function), list(inspect.signature(function).parameters)
    inputs, output = {}, None
    for row in filter(None, map(ROW.match, documentation.splitlines())):
        if row[1] == "returns":
            output = row[2]
        elif row[2][0] in "({":
            inputs |= {name: random_like(name, row[2]) for name in row[1].split(", ")}
    if output is None:  # one line: shapes -> shapes
        before, output = documentation.split("->")
        shapes = SHAPE.findall(before)
        shapes = shapes * len(parameters) if len(shapes) == 1 else shapes
        inputs = {name: random_like(name, shape) for name, shape in zip(parameters, shapes, strict=True)}
    return inputs, output


@pytest.mark.parametrize("function, others", FUNCTIONS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_docstring_shapes_are_true(function, others):
    inputs, output = parse(function)
    actual = function(**inputs, **others)
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = [sizes(shape) for shape in SHAPE.findall(output)]
    expected = expected * len(actual) if len(expected) == 1 else expected
    assert [tuple(x.shape) for x in actual] == expected


@pytest.mark.parametrize("kind", [mssm.State, mssm.Fused, mssm.Filtered])
def test_shape_comments_of_what_observe_returns_are_true(kind):
    T, B, A = (SIZES[letter] for letter in "TBA")
    observation = {name: torch.rand(T, B, *shape) for name, shape in MODALITIES.items()}
    filtered = model.observe(observation, torch.ones(T, B, 3), torch.rand(T, B, A))
    value = {mssm.State: mssm.State(filtered.h, filtered.s_c), mssm.Fused: filtered.fused, mssm.Filtered: filtered}[kind]
    comments = dict(re.findall(r"^    (\w+): torch.Tensor.*# (\([^)]*\))", inspect.getsource(kind), re.MULTILINE))
    assert len(comments) >= 2
    for name, shape in comments.items():
        assert getattr(value, name).shape == sizes(shape), name
