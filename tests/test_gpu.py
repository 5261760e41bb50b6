"""What only a GPU can show: CUDA graphs and compiled kernels compute what the plain functions do."""

import copy
import dataclasses

import pytest
import torch
from conftest import A, B, close, random_batch, tiny_agent, tiny_config
from test_shapes import FUNCTIONS, parse
from torch.utils._pytree import tree_map

import mssm
import runs
import train
from config import load_config
from methods import METHODS

pytestmark = pytest.mark.gpu
WARM_UP = 3  # calls before a graph is recorded
CELLS = [(function, others) for function, others in FUNCTIONS if hasattr(function, "__wrapped__")]


def gpu_agent(**options):
    return tiny_agent(**{"device": "cuda", "precision": "float32"} | options)


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


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_recorded_and_plain_updates_agree(method, precision, tolerance):
    """Five updates from equal seeds and batches; the random numbers are the same, too."""
    options = dict(method=method, precision=precision, deterministic=True)  # Adam magnifies the last bit of a gradient
    plain = updates(gpu_agent(cuda_graphs=False, **options))
    recorded = updates(gpu_agent(**options))
    for expected, actual in zip(plain, recorded):
        for name in expected:
            assert actual[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


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
    expected = (batch["reward"].square().mean() / batch["reward"].var(correction=0)).item()  # of a prediction of 0
    assert agent.update(batch)["reward_error"].item() == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_can_be_loaded_into_a_recorded_agent():
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


def test_another_shape_is_recorded_for_itself():
    agent = gpu_agent()
    updates(agent)
    for _ in range(WARM_UP + 2):
        agent.update(gpu_batch(steps=4))
    assert len(agent.update.graphs) == 2
    assert all(x.isfinite() for x in agent.update(gpu_batch(steps=5)).values())


@pytest.mark.parametrize("explore", [True, False])
def test_recorded_and_plain_decisions_agree(explore):
    """Over an episode: what the memory holds is carried from replay to replay."""
    batch, actions = gpu_batch(steps=8), []
    for cuda_graphs in (True, False):
        agent, taken = gpu_agent(cuda_graphs=cuda_graphs), []
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


@pytest.mark.parametrize("function, others", CELLS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_compiled_cells_compute_what_they_say(function, others):
    """Forwards and backwards, on inputs of the shapes in their docstrings."""
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


@pytest.mark.parametrize("x", [
    torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8), 12 * torch.rand(5, 64, 64, 1), 12 * torch.rand(5, 64, 64, 1).half(),
    torch.rand(5, 2), torch.randint(0, 256, (2, 5, 64, 64, 3), dtype=torch.uint8),
], ids=lambda x: f"{x.dtype} {x.ndim}")  # fmt: skip
def test_observations_are_normalised_alike(x):
    close(mssm.normalise(x.cuda()).cpu(), mssm.normalise(x))


def test_a_run_trains_on_the_gpu_and_goes_on_where_it_was(tmp_path, monkeypatch):
    """`train.main` with its thread of batches, its graphs and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(
        tiny_config(), task="toy", device="cuda", precision="auto", num_envs=2, steps=600, prefill=200, first_updates=10,
        updates_per_1000=100, eval_every=300, eval_episodes=2, batch_size=4, batch_length=8, capacity=1000, log_every=5,
    )  # fmt: skip
    train.main(config)
    assert runs.load_checkpoint("runs/toy-mummi-1")["updates"] >= 40
    train.main(dataclasses.replace(load_config("runs/toy-mummi-1"), steps=900, resume="runs/toy-mummi-1"))
    assert runs.load_checkpoint("runs/toy-mummi-1")["steps"] >= 900
