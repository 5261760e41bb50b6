"""What only a GPU can show: CUDA graphs and compiled functions compute what the plain code does."""

import copy
import dataclasses
import inspect

import pytest
import torch
from conftest import A, B, T, close, random_batch, tiny_agent, tiny_config
from test_fast import CELLS, stance  # noqa: F401  # a fixture
from test_shapes import parse
from torch.utils._pytree import tree_map

import fast
import mssm
from agent import Agent
from config import load_config
from methods import METHODS

pytestmark = pytest.mark.gpu
WARM_UP = fast.CudaGraph.WARM_UP  # calls before a graph is captured


def gpu_agent(graphs=True, **options):
    """A tiny agent on the GPU; without graphs its functions and objective are compiled none the less."""
    agent = tiny_agent(**{"device": "cuda", "precision": "float32"} | options)
    if not graphs:
        agent.graphs.clear()
    return agent


def gpu_batch(number=0, steps=5):
    torch.manual_seed(number)
    return tree_map(lambda x: x.cuda(), random_batch(steps))


def updates(agent, count=WARM_UP + 5):
    """Metrics of the updates that follow the warm-up, each on another batch."""
    batches = [gpu_batch(i) for i in range(count)]
    torch.manual_seed(0)
    return [{name: float(x) for name, x in agent.update(batch).items()} for batch in batches][WARM_UP:]


def weights(agent):
    return torch.cat([p.detach().flatten() for m in (agent.model, agent.actor, agent.critic) for p in m.parameters()])


def agree(actual, expected, tolerance):
    for metrics, others in zip(actual, expected, strict=True):
        assert metrics.keys() == others.keys()
        for name in metrics:
            assert metrics[name] == pytest.approx(others[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_an_update_as_a_graph_is_the_same(method, precision, tolerance):
    """Five updates from equal seeds and batches; the random numbers are the same, too."""
    options = dict(method=method, precision=precision, deterministic=True)  # Adam magnifies the last bit of a gradient
    agent = gpu_agent(**options)
    captured = updates(agent)
    assert len(agent.graphs["update"].graphs) == 1  # and no fall-back
    agree(captured, updates(gpu_agent(graphs=False, **options)), tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_with_and_without_fast_updates_agree(method):
    """Compiled, captured, with one fused Adam, weight gradients in one product: the plain code's numbers."""
    options = dict(method=method, deterministic=True)
    quick, plain = gpu_agent(**options), gpu_agent(fast=False, **options)  # the first sets the process's precision
    assert type(plain) is Agent
    agree(updates(quick), updates(plain), 1e-4)


def test_noise_differs_from_replay_to_replay():
    agent, batch = gpu_agent(model_lr=0.0), gpu_batch()
    losses = [float(agent.update(batch)["model_loss"]) for _ in range(WARM_UP + 4)]
    assert len(set(losses[WARM_UP:])) == 4


def test_results_are_copies_that_later_calls_leave_alone():
    agent = gpu_agent()
    kept = [agent.update(gpu_batch(i))["model_loss"] for i in range(WARM_UP + 3)][WARM_UP:]
    assert len({float(x) for x in kept}) == 3


def test_a_changed_learning_rate_is_seen():
    agent = gpu_agent()
    updates(agent)
    rates = [group["lr"] for optimiser in agent.optimisers.values() for group in optimiser.param_groups]
    for rate in rates:
        rate.zero_()
    before = weights(agent)
    agent.update(gpu_batch())
    assert torch.equal(weights(agent), before)
    for rate in rates:
        rate.fill_(1e-3)
    agent.update(gpu_batch())
    assert not torch.equal(weights(agent), before)


def test_changed_parameters_are_seen():
    agent = gpu_agent()
    updates(agent)
    with torch.no_grad():
        for parameter in agent.model.reward_net.parameters():
            parameter.zero_()
    batch = gpu_batch()
    expected = batch["reward"].square().mean().item()  # of a prediction of 0
    assert agent.update(batch)["reward_square_error"].item() == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_can_be_loaded_into_an_agent_with_graphs():
    agent, other = gpu_agent(seed=1, deterministic=True), gpu_agent(seed=2, deterministic=True)
    updates(agent)
    updates(other)
    state = copy.deepcopy(agent.state_dict())
    expected = updates(agent)
    other.load_state_dict(tree_map(lambda x: x.cpu() if torch.is_tensor(x) else x, state))
    for before, after in zip(expected, updates(other)):
        assert before == pytest.approx(after, rel=1e-4, abs=1e-4)


def test_a_checkpoint_moves_between_gpu_and_cpu():
    agent = gpu_agent()
    updates(agent)
    cpu = tiny_agent()
    cpu.load_state_dict(tree_map(lambda x: x.cpu() if torch.is_tensor(x) else x, agent.state_dict()))
    cpu.update(random_batch())
    agent.load_state_dict(cpu.state_dict())
    close(weights(agent).cpu(), weights(cpu))
    updates(agent)


def test_another_shape_gets_a_graph_of_its_own():
    agent = gpu_agent()
    updates(agent)
    for _ in range(WARM_UP + 2):
        agent.update(gpu_batch(steps=4))
    assert len(agent.graphs["update"].graphs) == 2
    assert all(x.isfinite() for x in agent.update(gpu_batch(steps=5)).values())


def test_the_world_model_alone_gets_a_graph_of_its_own():
    agent = gpu_agent()
    for i in range(WARM_UP + 2):
        metrics = agent.update(gpu_batch(i), behaviour=False)
    assert "actor_loss" not in metrics and len(agent.graphs["update"].graphs) == 1
    updates(agent)
    assert len(agent.graphs["update"].graphs) == 2


@pytest.mark.parametrize("explore", [True, False])
@pytest.mark.parametrize("options", [dict(graphs=False), dict(fast=False)], ids=str)
def test_decisions_as_a_graph_are_the_same(explore, options):
    """Over an episode: what the memory holds is carried from replay to replay."""
    batch, actions = gpu_batch(steps=8), []
    for chosen in ({}, options):
        agent, taken = gpu_agent(**chosen), []
        memory = agent.initial_memory(B)
        torch.manual_seed(0)
        for t in range(8):
            observation = {name: x[t] for name, x in batch["observation"].items()}
            first = torch.full((B,), t == 0, device="cuda")
            action, memory = agent.act(memory, observation, batch["present"][t], first, explore=explore)
            taken.append(action)
        actions.append(torch.stack(taken))
    assert actions[0].shape == (8, B, A)
    close(*actions)


def test_an_update_that_cannot_be_captured_goes_on_plainly(stance, recwarn):  # noqa: F811
    """One that waits for a value: it says so once, and the random numbers go on."""
    agent, batch = gpu_agent(graphs=True), gpu_batch()
    objective = agent.objective

    def waiting(model, filtered, batch):
        assert batch["reward"].sum().item() >= 0
        return objective(model, filtered, batch)

    agent.objective = waiting
    for _ in range(WARM_UP):
        agent.update(batch)
    with pytest.warns(UserWarning, match="update could not be compiled or captured on this GPU"):
        agent.update(batch)
    recwarn.clear()
    losses = [float(agent.update(batch)["model_loss"]) for _ in range(3)]
    assert len(set(losses)) == 3 and list(recwarn) == []
    updates(gpu_agent(graphs=False))  # nor are others the worse for it


@pytest.mark.parametrize("function, others", CELLS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_compiled_functions_compute_what_they_say(function, others):
    """Forwards and backwards, on inputs of the shapes in their docstrings."""
    function = fast.one_kernel(inspect.unwrap(function))
    inputs = {**parse(function)[0], **others}
    if "std" in inputs:
        inputs["std"] = inputs["std"] + mssm.MIN_STD  # no precision of 1e8
    results = []
    for device in ("cpu", "cuda"):
        moved = {k: x.to(device) if torch.is_tensor(x) else x for k, x in inputs.items()}
        learnt = [x.requires_grad_() for x in moved.values() if torch.is_tensor(x) and x.is_floating_point()]
        result = function(**moved)
        result = result if isinstance(result, tuple) else (result,)
        loss = sum((x * torch.linspace(0, 1, x.numel(), device=device).view_as(x)).sum() for x in result)
        results.append([*result, *torch.autograd.grad(loss, learnt)])
    for expected, actual in zip(*results, strict=True):
        close(actual.detach().cpu(), expected.detach())


@pytest.mark.parametrize("shape", [(64, 64, 3), (64, 64, 1), (2,)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_observations_are_scaled_alike(shape, kind):
    x, size = 12 * torch.rand(T, B, *shape), shape[-1]
    x = x.to(torch.uint8 if size == 3 else kind)
    arguments = x, torch.rand(T, B) > 0.5, torch.rand(size), 1 + torch.rand(size)
    scale = fast.one_kernel(inspect.unwrap(mssm.scale))
    close(scale(*(x.cuda() for x in arguments)).cpu(), scale(*arguments))


def test_a_run_trains_on_the_gpu_and_goes_on_where_it_was(tmp_path, monkeypatch):
    """`train.main` with its thread of batches, its graphs and a checkpoint."""
    import checkpoint
    import train

    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(
        tiny_config(), task="toy", device="cuda", precision="auto", num_envs=2, steps=600, prefill=200, first_updates=10,
        updates_per_1000=100, eval_every=300, eval_episodes=2, batch_size=4, batch_length=8, capacity=1000, log_every=5,
    )  # fmt: skip
    train.main(config)
    assert checkpoint.load_checkpoint("runs/toy-mummi-1")["updates"] >= 40
    train.main(dataclasses.replace(load_config("runs/toy-mummi-1"), steps=900, resume="runs/toy-mummi-1"))
    assert checkpoint.load_checkpoint("runs/toy-mummi-1")["steps"] >= 900
