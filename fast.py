"""Make MuMMI fast from outside: mssm.py, mummi_loss.py and agent.py know nothing of it.

`methods.make_agent` builds a `FastAgent` around a `FastMSSM` where it would build an `Agent` around an `MSSM`. Both
compute the same numbers in float32 (`--no-fast` takes the plain ones). Shapes: as in `mssm.py` and `agent.py`.

    prepare(device, bfloat16=True, exact_losses=False, deterministic=False)     # settings of the process
    agent = FastAgent(FastMSSM(...), objective, action_size, bfloat16=True, cuda_graphs=True)
"""

import ctypes
import os
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial, wraps
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import agent as behaviour
import mssm
from agent import Agent
from envs import TOY
from mssm import MSSM

# ---- 1. The process: threads, memory, precision of products ---------------------------------------


def restart_with_quiet_threads():
    """Start this program again, once, with variables that OpenMP reads only while torch is being loaded.

    By default, idle OpenMP threads busy-wait and starve the environments (up to 100 times slower); sleeping at
    once makes small updates 1.5 times slower.
    """
    quiet = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
    if torch.get_num_threads() > 1 and not quiet.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], quiet | os.environ)


def prepare(device, bfloat16, exact_losses, deterministic):
    """Settings of the whole process. exact_losses: the losses' products read float32 layers, and must not be TF32."""
    if device.type == "cpu":
        libc = ctypes.CDLL(None)  # keep freed activations: their pages need not be faulted in again
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        torch.set_float32_matmul_precision(faster_exact_product())
        return
    # TF32 loses nothing of factors that come from bfloat16 layers; on the way back it rounds the other to 11 bits.
    tf32 = bfloat16 and not exact_losses
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    compile_functions()


def choose_precision(config, device):
    """float32 or bfloat16: what `--precision auto` means on this machine."""
    if config.precision != "auto":
        return config.precision
    small = config.preset == "small" and config.task not in TOY  # whose networks are too small to gain by it
    faster = device.type == "cuda" or (small and torch.cpu._is_avx512_bf16_supported())
    return "bfloat16" if faster and config.fast else "float32"


@cache
def faster_exact_product(size=512):
    """The setting of `torch.set_float32_matmul_precision` whose product is faster on this CPU, and exact to float32.

    "highest" is MKL's, slow on AMD's Zen 4 and 5. "medium" is oneDNN's: float32 too, unless the processor has AMX.
    Not timed: a choice that depends on how busy the machine is would change the last bits of a resumed run.
    """
    if "AuthenticAMD" not in processor():
        return "highest"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    error = (a @ b - exact).norm() / exact.norm()
    torch.set_float32_matmul_precision(before)
    return "medium" if error < 1e-5 else "highest"


def processor():
    """The system's description of the processor, with its vendor."""
    return Path("/proc/cpuinfo").read_text()


# ---- 2. The weight gradient of a layer in a loop: one product for all steps -----------------------

LOOP: ContextVar = ContextVar("{layer: Steps} of the loop that runs in this thread", default={})  # noqa: B039


@contextmanager
def loop(groups):
    """Inside this context, layers collect their inputs and gradients over the loop.

    groups  of {layer: (weight, bias)}; the layers of one group read the same tensors: one product a step for all

    Plain autograd multiplies two small matrices for each step and layer, and adds up the results. One large
    product of all steps gives the same sum. Nothing is kept on the layers, so threads may share a model.
    """
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    token = LOOP.set({} if plain else {layer: steps for steps in map(Steps, groups) for layer in steps.layers})
    try:
        yield
    finally:
        LOOP.reset(token)


class Steps:
    """The steps of layers that read the same tensors; see `loop`."""

    def __init__(self, group):
        self.layers, (weights, biases) = list(group), zip(*group.values())
        self.sizes = [len(weight) for weight in weights]
        self.x, self.y, self.passed = None, {}, {}  # passed: {backward pass: [(x, gradient) of each step]}
        device = weights[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights[0].dtype
        self.weight, self.bias = Parameters.apply(torch.cat(weights), torch.cat(biases), self.passed, dtype)

    def __call__(self, x):
        """What each layer makes of x. (B, D) -> {layer: (B, D)}"""
        if x is not self.x:
            y = Step.apply(x, self.weight, self.bias, self.passed)
            self.x, self.y = x, dict(zip(self.layers, y.split(self.sizes, -1) if len(self.sizes) > 1 else [y]))
        return self.y


class Step(torch.autograd.Function):
    """One step's F.linear(x, weight, bias), which leaves the parameters' gradients to `Parameters`."""

    @staticmethod
    def forward(ctx, x, weight, bias, passed):
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight)
        ctx.passed = passed
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("a FastMSSM has no second derivatives (create_graph=True): use an MSSM, or --no-fast")
        x, weight = ctx.saved_tensors
        steps = ctx.passed.setdefault(torch._C._current_graph_task_id(), [])  # this backward pass's own
        steps.append((x.detach(), gradient))  # with its graph, x would keep this node, and itself, alive
        return gradient @ weight, None, None, None


class Parameters(torch.autograd.Function):
    """Weight and bias as all steps see them. Its backward pass comes after that of every step."""

    @staticmethod
    def forward(ctx, weight, bias, passed, dtype):
        ctx.set_materialize_grads(False)
        ctx.passed = passed
        return weight.to(dtype), bias.to(dtype)

    @staticmethod
    def backward(ctx, *_):
        steps = ctx.passed.pop(torch._C._current_graph_task_id())
        x, gradient = (torch.cat(side) for side in zip(*steps))  # (T * B, D)
        return gradient.T @ x, gradient.sum(0), None, None


class StepLinear(nn.Linear):
    """nn.Linear for a loop over time: within `loop`, `Steps` computes it."""

    def forward(self, x):
        steps = None if torch.compiler.is_compiling() else LOOP.get().get(self)
        return super().forward(x) if steps is None else steps(x)[self]


def use_step_linear(*nets):
    """Turn every nn.Linear of the networks into a `StepLinear`."""
    for layer in (layer for net in nets for layer in net.modules() if type(layer) is nn.Linear):
        layer.__class__ = StepLinear


def plain(layer):
    """A layer of a group of `loop` with all of its parameters."""
    return {layer: (layer.weight, layer.bias)}


# ---- 3. What is absent is not computed, on a CPU -------------------------------------------------

PRESENT: ContextVar = ContextVar("{network: rows that it computes} in this thread", default={})  # noqa: B039


@contextmanager
def present_rows(networks, present):
    """Inside this context, the network of each modality computes only the rows at which it is present.

    The number of rows is rounded up to one of 16, since oneDNN compiles a convolution for each number. On a GPU,
    where shapes must not depend on values, the networks compute all rows.
    """
    rows = {}
    if present.device.type == "cpu":
        for network, here in zip(networks, present.reshape(-1, present.shape[-1]).unbind(-1)):
            unit = -(-len(here) // 16)
            count = unit * max(1, -(-int(here.sum()) // unit))
            if count < len(here):
                rows[network] = here.int().argsort(descending=True, stable=True)[:count], len(here)
    token = PRESENT.set(rows)
    try:
        yield
    finally:
        PRESENT.reset(token)


class PresentRows(nn.Sequential):
    """A network that gives zeros for the rows that `present_rows` leaves out. Nothing reads them."""

    def forward(self, x):
        rows, of = PRESENT.get().get(self, (None, 0))
        if rows is None or of != (len(x) if x.ndim == 4 else x.shape[:-1].numel()):  # or other rows than the batch's
            return super().forward(x)
        flat = x.movedim(1, -1) if x.ndim == 4 else x.flatten(0, -2)  # (N, 64, 64, C), as in memory, or (N, D)
        y = super().forward(flat.index_select(0, rows).movedim(-1, 1)).movedim(1, -1)
        y = y.new_zeros(len(flat), *y.shape[1:]).index_copy(0, rows, y).movedim(-1, 1)
        return y if x.ndim == 4 else y.unflatten(0, x.shape[:-1])


class FastConvTranspose(nn.ConvTranspose2d):
    """The transposed convolutions of stride 2 in the forms that oneDNN computes faster, on a CPU."""

    def forward(self, x):
        (_, c, k, _), width = self.weight.shape, x.shape[-1]
        if x.device.type != "cpu" or width > 1 and c > (16 if x.dtype == torch.bfloat16 else 8):
            return super().forward(x)
        if width == 1:  # a product
            y = F.linear(x.flatten(1), self.weight.permute(2, 3, 1, 0).flatten(0, 2), self.bias.repeat(k * k))
            return y.unflatten(1, (k, k, c)).permute(0, 3, 1, 2)
        # Pixel 2 i + p is the sum of x[i - j] weight[2 j + p] over j = 0, 1, 2: one convolution gives every p.
        weight = F.pad(self.weight, (0, k % 2, 0, k % 2)).unflatten(2, (3, 2)).unflatten(4, (3, 2)).flip(2, 4)
        weight = weight.permute(3, 5, 1, 0, 2, 4).flatten(0, 2).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(F.pad(x, (2, 2, 2, 2)), weight, self.bias.repeat(4)).permute(0, 2, 3, 1)  # channels (p, p, c)
        y = torch.stack(y.split(2 * c, -1), 2).flatten(1, 2).unflatten(3, (2, c)).flatten(2, 3)
        return y[:, : 2 * width + k - 2, : 2 * width + k - 2].permute(0, 3, 1, 2)


class FastMSSM(MSSM):
    """An MSSM whose loop over time takes fewer products, under autocast if `bfloat16` is set."""

    bfloat16 = False

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        use_step_linear(self.transition_in, self.gru_x, self.gru_h, self.prior_net, self.posterior_net)
        for network in (*self.encoders, *getattr(self, "experts", ()), *getattr(self, "decoders", ())):
            network.__class__ = PresentRows
        for layer in (layer for layer in self.modules() if isinstance(layer, nn.ConvTranspose2d)):
            layer.__class__ = FastConvTranspose

    def encode(self, observation, present):
        with present_rows(self.encoders, present):
            return super().encode(observation, present)

    def fuse(self, features, present):
        with present_rows(getattr(self, "experts", ()), present):
            return super().fuse(features, present)

    def observe(self, observation, present, action, state=None, first=None):
        posterior_in, _, posterior_out = self.posterior_net
        posterior_from_h = {posterior_in: (posterior_in.weight[:, self.d_s_f :], posterior_in.bias)}
        groups = [plain(self.gru_h) | plain(self.prior_net[0]) | posterior_from_h, plain(self.transition_in),
                  plain(self.gru_x), plain(self.prior_net[2]), plain(posterior_out)]  # fmt: skip
        with torch.autocast(action.device.type, torch.bfloat16, enabled=self.bfloat16), loop(groups):
            return super().observe(observation, present, action, state, first)

    def posterior_from_h(self, h):
        steps = LOOP.get().get(self.posterior_net[0])
        return super().posterior_from_h(h) if steps is None else steps(h)[self.posterior_net[0]]


# ---- 4. Fewer kernels on a GPU -------------------------------------------------------------------

COMPILED = {
    mssm: "gaussian sample scale product_of_experts gru add_elu posterior_or_prior".split(),
    behaviour: "tanh_normal squash lambda_return".split(),
}


@cache
def compile_functions():
    """From now on the elementwise functions of mssm.py and agent.py run as one kernel each on a GPU."""
    torch._dynamo.config.recompile_limit = 256  # a variant for each shape, type and gradient mode
    for module, names in COMPILED.items():
        for name in names:
            setattr(module, name, one_kernel(getattr(module, name)))
    # Inductor takes the gradient of a kernel over 1x1 pixels for channels-last, and fails.
    FastMSSM.decode = torch.compiler.disable(MSSM.decode)


def one_kernel(function):
    """The function, compiled where a tensor is on a GPU."""
    compiled = cache(lambda: torch.compile(function, dynamic=False))

    @wraps(function)
    def call(*inputs, **options):
        on_gpu = any(torch.is_tensor(x) and x.is_cuda for x in (*inputs, *options.values()))
        return (compiled() if on_gpu and not torch.compiler.is_compiling() else function)(*inputs, **options)

    return call


class CudaGraph:
    """A method of tensors on a GPU, captured once for each shape of its arguments and then replayed.

    Replayed kernels do not wait for Python. The first three calls run as they are, while libraries choose their
    kernels and Adam makes its state; the fourth is captured. What the method computes may depend on the values of
    tensors only; random numbers differ from call to call. Results are copies.
    """

    WARM_UP = 3  # calls

    def __init__(self):
        self.inputs, self.graphs, self.calls, self.stream = {}, {}, Counter(), torch.cuda.Stream()

    def __call__(self, method, *arguments, **options):
        leaves, structure = tree_flatten(arguments)
        signature = structure, tuple((x.shape, x.dtype) for x in leaves), tuple(options.items())
        inputs = self.inputs[signature] = self.inputs.get(signature) or [x.clone() for x in leaves]
        for x, new in zip(inputs, leaves):
            x.copy_(new)
        call = partial(method, *tree_unflatten(inputs, structure), **options)
        self.calls[signature] += 1
        if self.calls[signature] <= self.WARM_UP:  # on the stream of the capture
            torch.cuda.synchronize()
            with torch.cuda.stream(self.stream):
                result = call()
            torch.cuda.synchronize()
            return tree_map(torch.clone, result)
        if signature not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile: batches are sent there.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = call()
            self.graphs[signature] = graph, result
        graph, result = self.graphs[signature]
        graph.replay()
        return tree_map(torch.clone, result)


# ---- 5. The agent --------------------------------------------------------------------------------


class FastAgent(Agent):
    """An Agent of a FastMSSM: networks in bfloat16 if asked; on a GPU compiled functions and CUDA graphs.

    Where compiling or capturing fails on somebody's GPU, it says so once and goes on plainly.
    """

    def __init__(self, model, objective, action_size, bfloat16=False, cuda_graphs=True, **options):
        super().__init__(model, objective, action_size, **options)
        self.bfloat16 = self.model.bfloat16 = bfloat16
        use_step_linear(self.actor)
        # Autocast begins inside: the backward pass of a compiled function takes its types from the code around it,
        # and the products of the losses must stay float32 there, too.
        self.objective = self.autocast()(objective)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            self.objective = torch.compile(self.objective, dynamic=False)
        self.graphs = {"update": CudaGraph(), "act": CudaGraph()} if self.cuda and cuda_graphs else {}

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def adam(self, module, learning_rate):
        if self.device.type == "cpu":
            return torch.optim.Adam(module.parameters(), learning_rate, eps=1e-7, fused=True)
        rate = torch.tensor(learning_rate, device=self.device)  # one fused kernel, which reads its rate from the GPU
        return torch.optim.Adam(module.parameters(), rate, eps=1e-7, fused=True, capturable=True)

    def update(self, batch, behaviour=True):
        with present_rows(getattr(self.model, "decoders", ()), batch["present"]):
            return self.run("update", super().update, batch, behaviour=behaviour)

    def act(self, memory, observation, present, first, explore):
        return self.run("act", super().act, memory, observation, present, first, explore=explore)

    def imagine(self, policy, state):
        layers = [plain(layer) for layer in self.actor.net if isinstance(layer, nn.Linear)]
        with self.autocast(), loop(layers):
            return super().imagine(policy, state)

    def returns(self, latent):
        with self.autocast():
            return super().returns(latent)

    def plan(self, state, policy):
        with self.autocast():
            return super().plan(state, policy)

    def run(self, name, method, *inputs, **options):
        """Run the method, as a CUDA graph if there is one; without graphs after the first failure."""
        if not self.cuda:
            return method(*inputs, **options)
        try:
            return self.graphs[name](method, *inputs, **options) if self.graphs else method(*inputs, **options)
        except ValueError:  # what was given is wrong
            raise
        except Exception as error:
            self.cuda, self.graphs = False, {}
            torch.compiler.set_stance("force_eager")
            for generator in torch.cuda.default_generators:  # a capture that broke off may hold them
                generator.graphsafe_set_state(generator.clone_state())
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            warnings.warn(f"{name} could not be compiled or captured on this GPU: it starts over and goes on "
                          f"without, more slowly ({cause})", stacklevel=2)  # fmt: skip
            return method(*inputs, **options)

    def load_state_dict(self, state):
        super().load_state_dict(state)
        for graph in self.graphs.values():
            graph.graphs, graph.calls = {}, Counter()  # they know where Adam's state was
