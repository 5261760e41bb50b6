"""fast.py changes the time that things take and nothing else; where it fails, it goes on plainly and says so."""

import copy
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import A, B, D_C, D_H, D_X, M, T, close, observe, random_batch, take_the_mean, tiny_agent, tiny_model
from test_shapes import FUNCTIONS, parse

import fast
import mssm
from fast import FastMSSM, StepLinear
from methods import METHODS
from mssm import MSSM

ROOT = Path(__file__).parent.parent
COMPILED = {name for names in fast.COMPILED.values() for name in names}
CELLS = [(function, others) for function, others in FUNCTIONS if function.__qualname__ in COMPILED]  # and `scale`


@pytest.fixture
def float64(monkeypatch):
    """Everything in float64, where the code says `.float()` too: what then differs is no rounding."""
    fast.faster_exact_product()  # once for the process, and in float32
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def parameters(agent):
    return [p for module in (agent.model, agent.actor, agent.critic) for p in module.parameters()]


def relative(actual, expected, tolerance):
    """Two lists of tensors agree, each measured by the largest value of its own."""
    for x, y in zip(actual, expected, strict=True):
        largest = y.detach().abs().max().clamp(min=1e-30)
        close(x.detach() / largest, y.detach() / largest, tolerance)


def update(agent, batch, count=1):
    """Metrics, and the gradients of all parameters, of the last of `count` updates."""
    torch.manual_seed(1)
    for _ in range(count):
        metrics = agent.update(batch)
    return metrics, [p.grad for p in parameters(agent)]


# ---- 1. The same numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_with_and_without_it_an_update_is_the_same(float64, method):
    """In float64: float32 rounds differently where products are taken together, as the next test allows."""
    ends = {"continues": (torch.rand(5, B) > 0.2).double(), "first": torch.rand(5, B) < 0.3}
    batch = random_batch(5) | ends
    results = [update(tiny_agent(method, fast=f, continuation="on"), batch, count=2) for f in (True, False)]
    (metrics, gradients), (expected, expected_gradients) = results
    assert metrics.keys() == expected.keys() and all(x.dtype == torch.float64 for x in metrics.values())
    relative(metrics.values(), expected.values(), 1e-8)
    relative(gradients, expected_gradients, 1e-8)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("method", METHODS)
def test_with_and_without_it_an_update_in_float32_differs_by_rounding(method):
    """Sums in another order: an error of 1e-5 of the largest is a few last digits, whatever the processor."""
    batch = random_batch(5)
    (metrics, gradients), (expected, expected_gradients) = (update(tiny_agent(method, fast=f), batch) for f in (True, False))
    assert all(x.dtype == torch.float32 for x in (*metrics.values(), *gradients))
    relative(metrics.values(), expected.values(), 1e-5)
    relative(gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("explore", [True, False])
def test_with_and_without_it_decisions_are_the_same(method, explore):
    """Over an episode, with MPC: two iterations."""
    batch, actions = random_batch(5), []
    for on in (True, False):
        agent, taken = tiny_agent(method, fast=on, mpc_iterations=2, mpc_rate=1.0), []
        memory = agent.initial_memory(B)
        torch.manual_seed(1)
        for t in range(5):
            observation = {name: x[t] for name, x in batch["observation"].items()}
            action, memory = agent.act(memory, observation, batch["present"][t], torch.full((B,), t == 0), explore)
            taken += [action, *memory.state]
        actions.append(taken)
    relative(*actions, 1e-6)


@pytest.mark.dev(14)
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_near_float32(method):
    """Metrics to a hundredth (losses are in float32); each gradient in its direction."""
    batch = random_batch(5)
    exact, gradients = update(tiny_agent(method, precision="float32"), batch)
    metrics, rounded = update(tiny_agent(method, precision="bfloat16"), batch)
    for name, value in exact.items():
        close(metrics[name], value, 0.05 if "grad_norm" in name else 0.02)
    for x, y in zip(rounded, gradients, strict=True):
        assert x.dtype == torch.float32 and torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0) > 0.9


def test_autocast_reaches_networks_and_not_losses():
    for precision, kind in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        agent = tiny_agent(precision=precision)
        nets = [agent.model.experts[0], agent.model.prior_net, agent.model.g, agent.model.reward_net, agent.actor.net, agent.critic.net]
        seen = {net: set() for net in nets}
        for net in nets:
            net.register_forward_hook(lambda net, x, y, seen=seen: seen[net].add(y.dtype))
        metrics = agent.update(random_batch())
        assert list(seen.values()) == len(nets) * [{kind}]
        assert all(x.dtype == torch.float32 for x in metrics.values())


@pytest.mark.parametrize("method", METHODS)
def test_everything_inferred_is_float32_under_autocast(method):
    """Heads that read it outside of an update, for a picture say, are in float32."""
    batch = random_batch()
    filtered = tiny_agent(method, precision="bfloat16").model.observe(batch["observation"], batch["present"], batch["action"])
    tensors = {**filtered._asdict(), **filtered.fused._asdict()}
    kinds = {name: x.dtype for name, x in tensors.items() if torch.is_tensor(x) and x.is_floating_point()}
    assert "s_f" in kinds and set(kinds.values()) == {torch.float32}, kinds


# ---- 2. Weight gradients of a loop ---------------------------------------------------------------


def both_models(**options):
    """An MSSM and a FastMSSM with the same parameters."""
    plain, quick = tiny_model(**options), tiny_model(kind=FastMSSM, **options)
    quick.load_state_dict(plain.state_dict())
    return plain, quick


def loop_gradients(model, batch):
    """Of all parameters, of a loss that every output of two filterings has a part in."""
    torch.manual_seed(0)
    first, second = (observe(model, batch) for _ in range(2))  # both before the way back
    loss = sum((x.cos() * torch.linspace(0, 1, x.numel()).view_as(x)).sum() for f in (first, second) for x in f[:6])
    return torch.autograd.grad(loss, [p for name, p in model.named_parameters() if not name.startswith(("reward", "g."))])


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_gradient_for_all_steps_at_once_is_the_sum_over_the_steps(bfloat16):
    (plain, quick), batch = both_models(), random_batch(5)
    quick.bfloat16 = bfloat16
    at_once = loop_gradients(quick, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        summed = loop_gradients(plain, batch)
    assert all(expected.abs().max() > 0 for expected in summed)
    relative(at_once, summed, 2e-2 if bfloat16 else 1e-5)


def test_layers_that_read_the_same_share_a_product_and_each_gets_its_own_gradient():
    """Of sizes that differ, called in any order, some twice with the same input, some not at every step."""
    layers = [StepLinear(4, size) for size in (3, 5, 2)]
    for layer in layers:
        torch.nn.init.normal_(layer.bias)
    inputs = [torch.randn(7, 4, requires_grad=True) for _ in range(4)]
    calls = [(0, 2), (2, 1), (0, 1), (0, 1), (1, 0), (3, 2), (2, 2)]  # input, layer

    def gradients(groups):
        with fast.loop(groups):
            outputs = [layers[layer](inputs[x]) for x, layer in calls]
        loss = sum((y.sin() * (i + 1)).sum() for i, y in enumerate(outputs))
        learnt = [*inputs, *(p for layer in layers for p in layer.parameters())]
        return torch.autograd.grad(loss, learnt, materialize_grads=True)

    expected = gradients([])
    one_group = [{layer: (layer.weight, layer.bias) for layer in layers}]
    relative(gradients(one_group), expected, 1e-5)
    relative(gradients([{layer: pair} for layer, pair in one_group[0].items()]), expected, 1e-5)


def test_a_backward_pass_that_needs_no_parameters_leaves_nothing_to_the_next():
    """As of a saliency map: the gradient of the observation alone, then that of everything."""
    (plain, quick), batch = both_models(), random_batch(5)
    batch["observation"]["touch"].requires_grad_()

    def gradient(model, look_first):
        torch.manual_seed(0)
        loss = observe(model, batch).s_c.cos().sum()
        seen = []
        if look_first:
            seen = [torch.autograd.grad(loss, batch["observation"]["touch"], retain_graph=True)[0] for _ in range(2)]
        return torch.autograd.grad(loss, model.gru_h.weight)[0], *seen

    (expected, *touch), (actual, *same) = gradient(plain, True), gradient(quick, True)
    assert expected.abs().max() > 0 and touch[0].abs().max() > 0
    close(actual, expected)
    close(gradient(quick, look_first=False)[0], expected)
    relative(same, touch, 1e-5)


def test_two_backward_passes_through_one_loop_are_each_right():
    """Two losses of one filtering, as an actor's and a critic's of one imagination."""
    (plain, quick), batch = both_models(), random_batch(5)
    results = []
    for model in (plain, quick):
        torch.manual_seed(0)
        filtered = observe(model, batch)
        results.append([
            torch.autograd.grad(loss, [model.gru_h.weight, model.posterior_net[0].weight], retain_graph=True)[i]
            for loss in (filtered.h.sin().sum(), filtered.std.sum(), filtered.h[2].square().sum()) for i in range(2)
        ])  # fmt: skip
    relative(results[1], results[0], 1e-5)


def test_a_backward_pass_within_another_leaves_it_its_steps():
    """Both through one graph, as of two threads that share it, but in a known order: after two of the steps back."""
    (plain, quick), batch = both_models(), random_batch(5)
    results = []
    for model in (plain, quick):
        torch.manual_seed(0)
        filtered, inner = observe(model, batch), []
        loss = filtered.h.sin().sum()

        def differentiate(model=model, loss=loss):
            return torch.autograd.grad(loss, [model.gru_h.weight, model.gru_x.bias], retain_graph=True)

        def once(gradient, inner=inner, differentiate=differentiate):
            if not inner:
                inner.append(None)
                inner[:] = differentiate()

        graph = loss.grad_fn
        while graph.name() != "StackBackward0":
            graph = graph.next_functions[0][0]
        graph.next_functions[2][0].register_prehook(lambda gradients, once=once: once(gradients))  # of h_2
        results.append([*differentiate(), *inner])
    assert len(results[0]) == 4
    relative(results[1], results[0], 1e-5)


def test_nothing_is_kept_on_the_model_while_it_runs():
    """Neither attribute nor buffer of any of its layers; and after it, or after an error, no layer is in a loop."""
    model, batch, during = tiny_model(kind=FastMSSM), random_batch(), []

    def attributes():
        return {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()}

    model.transition_in.register_forward_hook(lambda *_: during.append((attributes(), len(fast.LOOP.get()))))
    before = attributes()
    observe(model, batch)
    assert len(during) == T and all(x == (before, 7) for x in during) and attributes() == before
    assert fast.LOOP.get() == {}
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        observe(model, batch | {"action": torch.zeros(T, B, A + 1)})
    assert fast.LOOP.get() == {}
    x = torch.randn(B, model.gru_h.in_features)
    assert torch.equal(model.gru_h(x), torch.nn.functional.linear(x, model.gru_h.weight, model.gru_h.bias))


def test_two_threads_may_use_one_model_at_the_same_time(monkeypatch):
    """Each gets the gradients that it gets alone: filtered and differentiated side by side, many times."""
    take_the_mean(monkeypatch)  # of the random numbers all threads share one generator
    model, batches = tiny_model(kind=FastMSSM), [random_batch(4), random_batch(6)]
    learnt = [model.gru_h.weight, model.gru_x.bias, model.posterior_net[0].weight, model.prior_net[0].weight]

    def gradients(batch):
        filtered = observe(model, batch)
        return torch.autograd.grad(filtered.s_c.cos().sum() + filtered.prior_std.sum(), learnt)

    alone, barrier, wrong = [gradients(batch) for batch in batches], threading.Barrier(2, timeout=60), []

    def work(which):
        for _ in range(40):
            barrier.wait()
            try:
                together = gradients(batches[which])
                if not all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(together, alone[which])):
                    wrong.append(which)
            except Exception as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_a_copy_of_a_model_is_independent():
    model, batch = tiny_model(kind=FastMSSM), random_batch()
    expected = loop_gradients(model, batch)
    copied = copy.deepcopy(model)
    relative(loop_gradients(copied, batch), expected, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.SGD(copied.parameters(), 1.0)
    observe(copied, batch).h.square().sum().backward()
    assert all(p.grad is None for p in model.parameters()) and copied.gru_h.weight.grad.abs().max() > 0
    optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert not torch.equal(copied.gru_h.weight, model.gru_h.weight)
    torch.manual_seed(0)
    with torch.no_grad():
        changed = observe(copied, batch).h
    torch.manual_seed(0)
    assert not torch.allclose(changed, observe(model, batch).h)


def test_second_derivatives_are_refused_and_right_without_it(float64):
    """The directional derivative of the gradient against central differences; a FastMSSM would have given another."""
    (plain, quick), batch = both_models(), random_batch(3)

    def first(model, create_graph=False):
        torch.manual_seed(0)
        filtered = observe(model, batch)
        loss = filtered.s_c.cos().sum() + filtered.h.square().sum() + filtered.prior_std.sum()
        learnt = [model.gru_h.weight, model.posterior_net[0].weight, model.prior_net[2].bias, model.transition_in.weight]
        return learnt, torch.autograd.grad(loss, learnt, create_graph=create_graph)

    learnt, gradients = first(plain, create_graph=True)
    directions = [torch.randn_like(p) for p in learnt]
    products = torch.autograd.grad(sum((g * v).sum() for g, v in zip(gradients, directions)), learnt)
    sides = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, v in zip(learnt, directions):
                p += step * v
        sides.append(first(plain)[1])
    for product, above, below in zip(products, *sides):
        close(product, (above - below) / 2e-5, 1e-6)
    with pytest.raises(RuntimeError, match="no second derivatives .*: use an MSSM, or --no-fast"):
        first(quick, create_graph=True)
    assert all(gradient.isfinite().all() for gradient in first(quick)[1])  # and is none the worse for it


def test_without_gradients_and_outside_of_a_loop_layers_are_plain(monkeypatch):
    model, batch = tiny_model(kind=FastMSSM), random_batch()
    monkeypatch.setattr(fast, "Steps", None)
    with torch.no_grad():
        observe(model, batch)
    model.imagine_step(mssm.State(torch.randn(B, model.d_h), torch.randn(B, model.d_c)), torch.zeros(B, A))
    assert {type(layer) for layer in model.modules()} == {StepLinear if type(x) is StepLinear else type(x) for x in model.modules()}
    assert isinstance(model, MSSM) and list(model.state_dict()) == list(tiny_model().state_dict())


# ---- 3. What is absent is not computed -----------------------------------------------------------


@pytest.mark.parametrize("rate", [0, 0.3, 1])
def test_features_of_absent_steps_are_zeros_and_all_others_as_ever(rate):
    """Also where everything or nothing is present; 40 steps, so that some rows are left out."""
    (plain, quick), batch = both_models(), random_batch(40)
    present = torch.rand(batch["present"].shape) < rate
    expected = plain.encode(batch["observation"], present)
    left_out = 0
    for m, (x, y) in enumerate(zip(quick.encode(batch["observation"], present), expected, strict=True)):
        close(x[present[..., m]], y[present[..., m]], 1e-5)
        left_out += int((x[~present[..., m]] == 0).all(-1).sum())
    assert (left_out > 0) == (rate < 1)
    torch.manual_seed(0)
    fused = quick.fuse(expected, present)
    torch.manual_seed(0)
    same = plain.fuse(expected, present)
    relative([fused.s_f, fused.mean, fused.std], [same.s_f, same.mean, same.std], 1e-5)
    assert fast.PRESENT.get() == {}


@pytest.mark.parametrize("method", ["dreamer", "mssm_e"])
def test_decoders_compute_only_what_is_present(method):
    agent, batch, rows = tiny_agent(method), random_batch(5), []
    for decoder in agent.model.decoders:
        decoder[-1].register_forward_hook(lambda layer, x, y: rows.append(len(y)))
    agent.update(batch)
    assert rows == batch["present"].flatten(0, 1).sum(0).tolist() and max(rows) < 5 * B
    agent.model.decode(torch.zeros(7, D_C + D_H))  # outside of an update: everything
    assert rows[-M:] == M * [7]


@pytest.mark.parametrize("rows", [2, T * B, 2 * T * B])
def test_rows_that_are_not_the_batchs_are_all_computed(rows):
    """Those of the batch are zeros where absent, as FastMSSM says."""
    quick, latent, present = tiny_agent("mssm_e").model, torch.randn(rows, D_C + D_H), torch.rand(T, B, M) < 0.5
    with fast.present_rows(quick.decoders, present):
        inside = quick.decode(latent)
    outside, here = quick.decode(latent), present.flatten(0, 1)
    for m, name in enumerate(quick.modalities):
        shown = here[:, m] if rows == T * B else torch.ones(rows).bool()
        close(inside[name][shown], outside[name][shown])


def test_a_step_without_batch_axes_is_fused_as_by_an_mssm():
    quick, present = tiny_agent("mummi").model, torch.tensor([True, False, True])
    features = [torch.randn(D_X) for _ in range(M)]
    close(quick.fuse(features, present).mean, quick.fuse([x[None] for x in features], present[None]).mean[0])


def test_there_are_at_most_16_numbers_of_rows(monkeypatch):
    """Each is a convolution to be compiled anew."""
    network, seen = torch.nn.Sequential(torch.nn.Linear(3, 2)), set()
    network.__class__ = fast.PresentRows
    network[0].register_forward_hook(lambda layer, x, y: seen.add(len(y)))
    for count in range(101):
        with fast.present_rows([network], (torch.arange(100) < count)[:, None]):
            network(torch.randn(100, 3))
    assert len(seen) <= 16 and max(seen) == 100 and min(seen) == 7


@pytest.mark.parametrize("channels, size, kernel", [((3, 2), 1, 5), ((4, 8), 5, 5), ((2, 3), 13, 6), ((3, 1), 30, 6), ((4, 9), 5, 5)])
def test_transposed_convolutions_in_other_forms_are_the_same(float64, channels, size, kernel):
    layer, x = torch.nn.ConvTranspose2d(*channels, kernel, stride=2), torch.randn(2, channels[0], size, size, requires_grad=True)
    results = []
    for layer.__class__ in (torch.nn.ConvTranspose2d, fast.FastConvTranspose):
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), (x, layer.weight, layer.bias))])
    relative(*results, 1e-10)


# ---- 4. What a GPU compiles ----------------------------------------------------------------------


def test_every_function_to_compile_is_there():
    for module, names in fast.COMPILED.items():
        assert all(callable(getattr(module, name)) for name in names)
    assert {function.__qualname__ for function, _ in CELLS} == COMPILED - {"scale"}


def cell_results(function, inputs):
    """Outputs, and the gradients of all inputs that can have one."""
    inputs = {k: x.detach().clone() if torch.is_tensor(x) else x for k, x in inputs.items()}
    learnt = [x.requires_grad_() for x in inputs.values() if torch.is_tensor(x) and x.is_floating_point()]
    result = function(**inputs)
    result = result if isinstance(result, tuple) else (result,)
    loss = sum((x * torch.linspace(0, 1, x.numel()).view_as(x)).sum() for x in result)
    return [*result, *torch.autograd.grad(loss, learnt)]


@pytest.mark.parametrize("function, others", CELLS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_each_function_is_one_graph(function, others):
    """Forwards and backwards, as a GPU would have it but for the kernels."""
    inputs = {**parse(function)[0], **others}
    if "std" in inputs:
        inputs["std"] = inputs["std"] + mssm.MIN_STD  # no precision of 1e8
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    relative(cell_results(compiled, inputs), cell_results(function, inputs), 1e-6)


@pytest.mark.parametrize("shape", [(64, 64, 3), (64, 64, 1), (2,)], ids=str)
def test_scale_is_one_graph(shape):
    x = 12 * torch.rand(T, B, *shape)
    x = x.to(torch.uint8) if shape[-1] == 3 else x
    arguments = x, torch.rand(T, B) > 0.5, torch.rand(shape[-1]), 1 + torch.rand(shape[-1])
    compiled = torch.compile(mssm.scale, fullgraph=True, dynamic=False, backend="aot_eager")
    close(compiled(*arguments), mssm.scale(*arguments), 1e-6)


@pytest.mark.parametrize("method", ["mummi", "mssm_e"])
def test_an_update_through_compiled_functions_is_the_same(monkeypatch, method):
    """The wiring of a GPU, without its kernels: functions and objective compiled, the latter as a whole."""
    batch = random_batch()
    expected, expected_gradients = update(tiny_agent(method), batch)

    def one_kernel(function):
        compiled = torch.compile(function, dynamic=False, backend="aot_eager")
        called.add(function.__name__)
        return lambda *inputs, **options: (function if torch.compiler.is_compiling() else compiled)(*inputs, **options)

    called = set()
    for module, names in fast.COMPILED.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    monkeypatch.setattr(FastMSSM, "decode", FastMSSM.decode)
    monkeypatch.setattr(fast, "one_kernel", one_kernel)
    with torch._dynamo.config.patch(recompile_limit=8):
        fast.compile_functions.__wrapped__()
        agent = tiny_agent(method)
        agent.objective = torch.compile(agent.objective, dynamic=False, backend="aot_eager")
        metrics, gradients = update(agent, batch)
    assert called == COMPILED
    relative(metrics.values(), [expected[name] for name in metrics], 1e-5)
    relative(gradients, expected_gradients, 1e-4)


def test_functions_are_compiled_for_tensors_on_a_gpu_alone(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda x: compiled.append(function) or function(x))
    double = fast.one_kernel(lambda x: 2 * x)
    assert torch.equal(double(torch.ones(3)), 2 * torch.ones(3)) and compiled == []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert torch.equal(double(torch.ones(3)), 2 * torch.ones(3)) and len(compiled) == 1


# ---- 5. Where it fails ---------------------------------------------------------------------------


@pytest.fixture
def stance():
    """The compiler as it was."""
    yield
    torch.compiler.set_stance("default")


class Broken:
    """A CUDA graph that cannot be captured."""

    def __init__(self, error):
        self.error, self.calls, self.graphs = error, 0, {}

    def __call__(self, method, *arguments, **options):
        self.calls += 1
        raise self.error


def gpu_agent(monkeypatch, error, generators=()):
    """An agent on the CPU that takes it for a GPU, and whose graphs fail."""
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    agent = tiny_agent()
    agent.cuda, broken = True, Broken(error)
    agent.graphs = {"update": broken, "act": broken}
    return agent, broken


def test_where_a_graph_cannot_be_captured_it_goes_on_plainly_and_says_so_once(monkeypatch, stance, recwarn):
    batch, states = random_batch(), []
    generator = SimpleNamespace(clone_state=lambda: "a copy", graphsafe_set_state=states.append)
    agent, broken = gpu_agent(monkeypatch, RuntimeError("capture\n  failed"), (generator,))
    expected = update(tiny_agent(), batch, count=3)
    with pytest.warns(UserWarning, match=r"^update could not .* starts over .* more slowly \(RuntimeError: capture failed\)$"):
        torch.manual_seed(1)
        agent.update(batch)
    assert states == ["a copy"]  # a capture that broke off may hold the generator
    recwarn.clear()
    agent.update(batch)
    metrics = agent.update(batch)
    assert all(torch.equal(x, expected[0][name]) for name, x in metrics.items())
    assert all(torch.equal(p.grad, x) for p, x in zip(parameters(agent), expected[1]))
    first = torch.ones(B).bool()
    agent.act(agent.initial_memory(B), {k: x[0] for k, x in batch["observation"].items()}, batch["present"][0], first, True)
    assert broken.calls == 1 and agent.graphs == {} and list(recwarn) == []
    agent.load_state_dict(agent.state_dict())  # and has no graphs to clear


def test_what_is_wrong_with_the_inputs_is_no_reason_to_go_on_plainly(monkeypatch, stance, recwarn):
    agent, broken = gpu_agent(monkeypatch, ValueError("modality 'rgb' is wrong"))
    for _ in range(2):
        with pytest.raises(ValueError, match="modality 'rgb' is wrong"):
            agent.update(random_batch())
    assert broken.calls == 2 and agent.cuda and agent.graphs and list(recwarn) == []


def test_an_error_that_is_not_the_graphs_comes_back(monkeypatch, stance):
    """Plainly it fails as well, with its own message."""
    agent, _ = gpu_agent(monkeypatch, RuntimeError("capture failed"))
    monkeypatch.setattr(agent, "objective", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="capture failed"), pytest.raises(ZeroDivisionError):
        agent.update(random_batch())


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), ValueError("no C++ compiler"), OSError("disk full")], ids=str)
def test_where_compiling_fails_it_goes_on_plainly_and_says_so_once(monkeypatch, stance, recwarn, error):
    """Whatever the compiler raises."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        raise error

    batch = random_batch()
    expected, _ = update(tiny_agent(), batch)
    agent, _ = gpu_agent(monkeypatch, None)
    agent.graphs = {}
    agent.objective = torch.compile(agent.objective, dynamic=False, backend=backend)
    with pytest.warns(UserWarning, match=f"update could not be compiled .*{re.escape(str(error))}"):
        torch.manual_seed(1)
        metrics = agent.update(batch)
    assert metrics.keys() == expected.keys() and metrics["model_loss"].isfinite()
    recwarn.clear()
    for _ in range(2):
        assert all(x.isfinite() for x in agent.update(batch).values())
    assert len(compilations) == 1 and list(recwarn) == []


# ---- 6. The process ------------------------------------------------------------------------------


@pytest.mark.parametrize("vendor, exact, expected", [
    ("vendor_id : AuthenticAMD", True, "medium"),
    ("AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", True, "medium"),  # Windows
    ("vendor_id : AuthenticAMD", False, "highest"),  # with AMX it would be bfloat16
    ("vendor_id : GenuineIntel", True, "highest"),
    ("arm", True, "highest"),
])  # fmt: skip
@pytest.mark.parametrize("before", ["highest", "medium"])
def test_the_faster_product_is_taken_if_it_is_float32(monkeypatch, vendor, exact, expected, before):
    matmul = torch.Tensor.__matmul__

    def product(a, b):
        amx = torch.get_float32_matmul_precision() == "medium" and not exact and a.dtype == torch.float32
        rounded = a.bfloat16() if amx else a
        return matmul(rounded.double(), b.double()).to(a.dtype)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(fast, "processor", lambda: vendor)
    process, generator = torch.get_float32_matmul_precision(), torch.get_rng_state()
    torch.set_float32_matmul_precision(before)
    try:
        assert fast.faster_exact_product.__wrapped__(64) == expected
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(process)
    assert torch.equal(torch.get_rng_state(), generator)  # a run's random numbers do not depend on it


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only these name a vendor")
def test_the_vendor_is_known():
    assert any(vendor in fast.processor() for vendor in ("AuthenticAMD", "GenuineIntel", "HygonGenuine"))


def test_products_of_an_agent_on_the_cpu_are_float32():
    tiny_agent()
    a, b = torch.randn(300, 500), torch.randn(500, 200)
    exact = a.double() @ b.double()
    assert (a @ b - exact).norm() / exact.norm() < 1e-5


def started(arguments, folder, **environment):
    """Lines that a program printed which restarts itself: one a start, then threads, variables and arguments."""
    (folder / "program.py").write_text(
        "import os, sys\n"
        "import fast\n"
        "if __name__ == '__main__':\n"
        "    print('started', flush=True)\n"
        "    fast.restart_with_quiet_threads()\n"
        "    print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'), sys.argv[1:], sys.flags.utf8_mode)\n"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    environment = kept | {"PYTHONPATH": f"{ROOT}:{folder}"} | environment
    run = subprocess.run([sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("how", [
    ["program.py"],
    ["-X", "utf8", "-m", "program"],
    ["-c", "import sys; exec(open('program.py').read())"],
], ids=lambda how: how[0] + how[-1][:4])  # fmt: skip
def test_a_program_of_several_threads_starts_again_once_with_its_arguments(tmp_path, how):
    lines = started([*how, "--name", "two words", ""], tmp_path, OMP_NUM_THREADS="2")
    utf8 = int("utf8" in how)
    assert lines == ["started", "started", f"passive 1000 ['--name', 'two words', ''] {utf8}"]


def test_a_program_of_one_thread_or_of_set_variables_does_not_start_again(tmp_path):
    assert started(["program.py"], tmp_path, OMP_NUM_THREADS="1") == ["started", "None None [] 0"]
    own = dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="active", GOMP_SPINCOUNT="7")
    assert started(["program.py"], tmp_path, **own) == ["started", "active 7 [] 0"]
    own.pop("GOMP_SPINCOUNT")  # what was set stays
    assert started(["program.py"], tmp_path, **own) == ["started", "started", "active 1000 [] 0"]
