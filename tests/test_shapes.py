"""Docstrings keep their word: their shape rows are parsed, called with distinct sizes, and checked.

A row is `names  (shape)  more` or `names  {name: (shape)}  more`; `returns` and what follows `->`
in a one-line docstring are outputs. Inputs are built from the docstring alone.
"""

import inspect
import re

import numpy as np
import pytest
import torch
from conftest import MODALITIES

import agent
import fast
import methods
import mssm
import mummi_loss
import replay

# Primes, all different, but for what is made of others: D_z = D_h + D_c, D_x = 32 channels.
SIZES = dict(T=2, B=5, M=3, hidden=31, A=7, H=11, N=13, D=17, D_h=19, D_c=23, D_z=19 + 23, D_f=29, D_x=32, L=59)
ELLIPSIS, EVENT = (2, 5), (37, 41)  # ... stands for T, B; *event
SHAPE = re.compile(r"\((?:(?:\.\.\.|[A-Z*])[\w\s.,*-]*)?\)")  # (), (N,), (M, ..., D), (H - 1, N), (..., 2 D)
ROW = re.compile(r"(\w+(?:, \w+)*)  +(\S.*)")
BOOL = ("present", "observed")

model = mssm.MSSM(MODALITIES, SIZES["A"], d_h=SIZES["D_h"], d_c=SIZES["D_c"], d_f=SIZES["D_f"], units=8, hidden=31,
                  channels=1, fused_prior=True, continuation=True)  # fmt: skip
behaviour = agent.Agent(model, mummi_loss.mummi, SIZES["A"], units=8, horizon=SIZES["H"])
start = mssm.State(torch.randn(SIZES["N"], SIZES["D_h"]), torch.randn(SIZES["N"], SIZES["D_c"]))

FUNCTIONS = [  # and the arguments for which a docstring gives no shape
    (mssm.gaussian, {}),
    (mssm.sample, {}),
    (mssm.add_elu, {}),
    (mssm.posterior_or_prior, {}),
    (agent.tanh_normal, dict(initial_std=5.0)),
    (agent.squash, dict(initial_std=5.0)),
    (mssm.product_of_experts, {}),
    (mssm.gru, {}),
    (model.transition, dict(state=start)),
    (model.prior, {}),
    (model.fused_prior, {}),
    (model.latent, {}),
    (model.reward, {}),
    (model.continuation, {}),
    (model.posterior, {}),
    (model.posterior_from_h, {}),
    (mummi_loss.gaussian_log_prob, dict(event_dims=len(EVENT))),
    (mummi_loss.gaussian_kl, {}),
    (mummi_loss.mean_over, {}),
    (mummi_loss.log_density_ratio, {}),
    (mummi_loss.log_inner_product, {}),
    (mummi_loss.info_nce, {}),
    (mummi_loss.mutual_information, {}),
    (mummi_loss.mummi_loss, {}),
    (mummi_loss.elbo_loss, {}),
    (behaviour.actor.forward, {}),
    (behaviour.actor.sample, {}),
    (behaviour.actor.mode, {}),
    (behaviour.critic.forward, {}),
    (agent.imagine, dict(model=model, policy=behaviour.actor.sample, state=start, horizon=SIZES["H"])),
    (agent.lambda_return, dict(lambda_=0.5)),
    (agent.actor_loss, {}),
    (agent.critic_loss, {}),
    (behaviour.returns, {}),
    (behaviour.imagine, dict(policy=behaviour.actor.sample, state=start)),
]
BY_HAND = {  # take or return states and dictionaries: the last tests
    "scale", "MSSM.imagine_step", "MSSM.decode", "MSSM.state", "MSSM.scale", "MSSM.encode", "MSSM.fuse", "MSSM.expert_shares",
    "MSSM.observe", "Steps.__call__", "contrastive_loss",
    "Agent.update", "Agent.act", "Agent.forget", "Agent.plan", "Column.read", "Column.write", "Replay.add",
    "Replay.record", "Replay.sample", "Replay.buffers", "Replay.read", "Batches.next", "shared_terms",
}  # fmt: skip


def random_observation(*steps):
    """uint8 colour, all else float."""
    observation = {name: torch.rand(*steps, *shape) for name, shape in MODALITIES.items()}
    return observation | {"rgb": (255 * observation["rgb"]).to(torch.uint8)}


def sizes(shape):
    """'(M, ..., 2 D)' as a tuple of numbers."""
    result = []
    for dimension in re.sub(r"(\d) ([A-Z])", r"\1 * \2", shape.strip("()")).split(","):
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
        named = row[1].split(", ")
        is_argument = "returns" in parameters and "returns" not in inputs
        if named[-1] == "returns" and not is_argument:
            output = row[2]
            named.pop()
        if row[2][0] in "({":
            inputs |= {name: random_like(name, row[2]) for name in named}
    if output is None:  # one line: shapes -> shapes, or "all" of one shape
        before, arrow, output = documentation.partition("->")
        shapes = SHAPE.findall(before)
        shapes = shapes * len(parameters) if len(shapes) == 1 else shapes
        inputs = {name: random_like(name, shape) for name, shape in zip(parameters, shapes, strict=True)}
        output = output if arrow else before
    return inputs, output


@pytest.mark.parametrize("function, others", FUNCTIONS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_docstring_shapes_are_true(function, others):
    inputs, output = parse(function)
    actual = function(**inputs | others)
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = [sizes(shape) for shape in SHAPE.findall(output)]
    expected = expected * len(actual) if len(expected) == 1 else expected
    assert [tuple(x.shape) for x in actual] == expected


@pytest.mark.parametrize("kind", [mssm.State, mssm.Fused, mssm.Filtered])
def test_shape_comments_of_what_observe_returns_are_true(kind):
    T, B, A = (SIZES[letter] for letter in "TBA")
    filtered = model.observe(random_observation(T, B), torch.ones(T, B, 3), torch.rand(T, B, A))
    value = {mssm.State: mssm.State(filtered.h, filtered.s_c), mssm.Fused: filtered.fused, mssm.Filtered: filtered}[kind]
    comments = dict(re.findall(r"^    (\w+): torch.Tensor.*# (\([^)]*\))", inspect.getsource(kind), re.MULTILINE))
    assert len(comments) >= 2
    for name, shape in comments.items():
        assert getattr(value, name).shape == sizes(shape), name


def test_every_docstring_with_shapes_is_checked():
    """Above from its rows, or below by hand."""
    checked = {function.__qualname__ for function, _ in FUNCTIONS} | BY_HAND
    promising = set()
    for module in (mssm, mummi_loss, agent, replay, methods, fast):
        own = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
        functions = [f for x in own for f in (vars(x).values() if inspect.isclass(x) else [x]) if inspect.isfunction(f)]
        shape = r"\((?:T|B|N|M|H|L|\.\.\.)(?:,| -)"
        promising |= {f.__qualname__ for f in functions if re.search(shape, f.__doc__ or "")}
    assert promising <= checked, "add these to FUNCTIONS"
    assert BY_HAND <= promising, "these promise no shapes any more"


@pytest.fixture(scope="module")
def batch():
    """T steps of B sequences, with the letters' sizes."""
    T, B, M, A = (SIZES[letter] for letter in "TBMA")
    return {"observation": random_observation(T, B), "present": torch.rand(T, B, M) > 0.3, "action": torch.rand(T, B, A),
            "reward": torch.rand(T, B)}  # fmt: skip


def test_shapes_of_what_the_model_makes_of_dictionaries(batch):
    T, B, M, A, N = (SIZES[letter] for letter in "TBMAN")
    present = batch["present"]
    for x in (torch.zeros(*ELLIPSIS, 64, 64, 3, dtype=torch.uint8), torch.zeros(*ELLIPSIS, 64, 64, 1), torch.zeros(*ELLIPSIS, 17)):
        scaled = mssm.scale(x, torch.ones(ELLIPSIS).bool(), torch.tensor(0.0), torch.tensor(1.0))
        assert scaled.shape == x.shape and scaled.dtype == torch.float32
    assert {name: x.shape for name, x in model.scale(batch["observation"], present).items()} == {
        name: (T, B, *shape) for name, shape in MODALITIES.items()
    }
    layers = {torch.nn.Linear(17, size): None for size in (5, 3)}
    steps = fast.Steps({layer: (layer.weight, layer.bias) for layer in layers})
    assert [x.shape for x in steps(torch.rand(B, 17)).values()] == [(B, 5), (B, 3)]
    features = model.encode(batch["observation"], present)
    assert [x.shape for x in features] == M * [sizes("(T, B, D_x)")]
    features, everything = list(torch.rand(M, *ELLIPSIS, SIZES["D_x"])), torch.ones(*ELLIPSIS, M).bool()
    fused = model.fuse(features, everything)
    assert fused.s_f.shape == sizes("(..., D_f)") and fused.observed.shape == ELLIPSIS
    assert model.expert_shares(fused, everything).shape == sizes("(..., M)")
    filtered = model.observe(**{name: batch[name] for name in ("observation", "present", "action")})
    state = model.state(filtered)
    assert (state.h.shape, state.s_c.shape) == ((T * B, SIZES["D_h"]), (T * B, SIZES["D_c"]))
    state = model.imagine_step(start, torch.rand(N, A))
    assert (state.h.shape, state.s_c.shape) == (sizes("(N, D_h)"), sizes("(N, D_c)"))
    latent, log_reward, kl, metrics = mummi_loss.shared_terms(model, filtered, batch, mummi_loss.Weights())
    assert (latent.shape, log_reward.shape, kl.shape) == ((T * B, SIZES["D_z"]), (T * B,), (T * B,))
    assert {x.shape for x in metrics.values()} == {()}
    log_f, rows = {"rgb": torch.rand(N, N)}, {"rgb": torch.rand(N) > 0.3}
    loss, nats = mummi_loss.contrastive_loss(log_f, rows, torch.rand(N), torch.rand(N), mummi_loss.Weights())
    assert loss.shape == () and {name: x.shape for name, x in nats.items()} == {"information_rgb": ()}
    decoding = mssm.MSSM(MODALITIES, A, heads="decoders", channels=1, d_h=SIZES["D_h"], d_c=SIZES["D_c"])
    decoded = decoding.decode(latent.unflatten(0, (T, B)))
    assert {name: x.shape[2:] for name, x in decoded.items()} == MODALITIES
    assert all(x.shape[:2] == (T, B) for x in decoded.values())


def test_shapes_of_what_the_agent_makes_of_dictionaries(batch):
    B, A = SIZES["B"], SIZES["A"]
    objective = lambda model, filtered, batch: (filtered.h.square().mean() + filtered.fused.mean.mean(), {})  # noqa: E731
    learner = agent.Agent(mssm.MSSM(MODALITIES, A, channels=1), objective, A, units=8, horizon=3)
    assert all(value.shape == () for value in learner.update(batch).values())
    memory, first = learner.initial_memory(B), torch.zeros(B, dtype=torch.bool)
    assert learner.forget(memory, first).action.shape == (B, A)
    observation = {name: x[0] for name, x in batch["observation"].items()}
    action, memory = learner.act(memory, observation, batch["present"][0], first, explore=True)
    assert action.shape == memory.action.shape == (B, A)
    assert learner.plan(memory.state, learner.actor.mode).shape == (B, A)


def test_shapes_of_what_the_replay_keeps(tmp_path):
    T, B, L, D = (SIZES[letter] for letter in "TBLD")
    store = replay.Replay(tmp_path, {"x": ((D,), "float32")}, capacity=200)
    store.add({"x": np.zeros((L, D), np.float32)})
    store.begin(B)
    for t in range(L):
        episodes = store.record({"x": np.zeros((B, D), np.float32)}, np.full(B, t == L - 1))
    assert [episode["x"].shape for episode in episodes] == [(L, D)] * B
    parts, buffers = store.choose(B, T, np.random.default_rng(0)), store.buffers(B, T)
    assert parts.shape == (B, 4) and buffers["x"].shape == (B, T, D)
    assert store.read(parts, buffers)["x"].shape == store.sample(B, T, np.random.default_rng(0))["x"].shape == (T, B, D)
    store.columns["x"].write(7, np.ones((L, D), np.float32))
    store.columns["x"].read(7, rows := np.zeros((L, D), np.float32))
    assert (rows == 1).all()
