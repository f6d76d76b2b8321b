"""What compiled_train_step hands to the compiler and what inductor makes of it: no copy of a parameter or a state."""

import itertools
import re
from collections.abc import Callable

import expecttest
import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

import bnbops
from bnbops.optim import AdamW8bit


def readable(graph: torch.fx.Graph) -> str:
    """The graph, one line a node, with Dynamo's long input names cut down to what they are."""
    short: dict[str, str] = {}

    def show(value: object) -> str:
        return re.sub(r"\w+", lambda word: short.get(word[0], word[0]), str(value))

    inputs, lines = [], []
    for node in graph.nodes:
        if node.op == "placeholder":
            pattern = r"^.*?(leaves_\d+|args_\d+|held_\d+|state_\d+)(?:_arguments)?(_[a-z_]+?)?_$"
            short[node.name] = re.sub(pattern, r"\1\2", node.name)
            inputs.append(f"input {short[node.name]}: {str(node.meta['example_value'].dtype)[6:]}")
        elif node.op == "output":
            lines.append(f"return {show(node.args[0])}")
        else:
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            arguments = [show(arg) for arg in node.args] + [
                f"{key}={show(value)}" for key, value in node.kwargs.items()
            ]
            joined = ", ".join(arguments) if len(arguments) < 6 else "\n    " + ",\n    ".join(arguments) + "\n"
            lines.append(f"{node.name} = {target}({joined})")
    return "\n".join(sorted(inputs) + lines) + "\n"


@pytest.mark.every_torch
def test_the_graph() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 300))
    bias = nn.Parameter(torch.zeros(2))
    optimizer = AdamW8bit([weight, bias], min_8bit_size=256)
    graphs = []

    def backend(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    @bnbops.compiled_train_step(optimizer=optimizer, backend=backend)
    def step(x: Tensor) -> Tensor:
        loss = nn.functional.linear(x, weight, bias).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_([weight, bias], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step(torch.randn(3, 300))
    (graph,) = graphs
    expecttest.assert_expected_inline(
        readable(graph),
        """\
input args_0: float32
input held_0_lr: float64
input held_0_options: float64
input leaves_0: float32
input leaves_1: float32
input state_0_exp_avg: uint8
input state_0_exp_avg_absmax: float32
input state_0_exp_avg_sq: uint8
input state_0_exp_avg_sq_absmax: float32
input state_0_step: float32
input state_1_exp_avg: float32
input state_1_exp_avg_sq: float32
input state_1_step: float32
linear = linear(args_0, leaves_0, leaves_1)
square = square(linear)
loss = mean(square)
grad = grad(loss, [leaves_0, leaves_1], allow_unused=True)
getitem = getitem(grad, 0)
getitem_1 = getitem(grad, 1)
_set_grad_enabled = _set_grad_enabled(False)
new_grad_strided = empty_like(leaves_0)
copy_ = copy_(new_grad_strided, getitem)
new_grad_strided_1 = empty_like(leaves_1)
copy__1 = copy_(new_grad_strided_1, getitem_1)
_foreach_norm = _foreach_norm([new_grad_strided, new_grad_strided_1], 2.0)
norm = getitem(_foreach_norm, 0)
norm_1 = getitem(_foreach_norm, 1)
to = to(norm, cpu)
to_1 = to(norm_1, cpu)
stack = stack([to, to_1])
total_norm = linalg_vector_norm(stack, 2.0)
add = add(total_norm, 1e-06)
clip_coef = truediv(1.0, add)
clip_coef_clamped = clamp(clip_coef, max=1.0)
to_2 = to(clip_coef_clamped, cpu)
_foreach_mul_ = _foreach_mul_([new_grad_strided, new_grad_strided_1], to_2)
adam_step_ = adam_step_(
    [leaves_0],
    [new_grad_strided],
    [state_0_exp_avg],
    [state_0_exp_avg_sq],
    [state_0_exp_avg_absmax],
    [state_0_exp_avg_sq_absmax],
    [state_0_step],
    lr=held_0_lr,
    maximize=False,
    beta1=0.0,
    beta2=0.0,
    eps=0.0,
    weight_decay=0.0,
    options=held_0_options,
    grad_scale=None,
    found_inf=None,
    codec=dynamic8
)
adam_step__1 = adam_step_(
    [leaves_1],
    [new_grad_strided_1],
    [state_1_exp_avg],
    [state_1_exp_avg_sq],
    [],
    [],
    [state_1_step],
    lr=held_0_lr,
    maximize=False,
    beta1=0.0,
    beta2=0.0,
    eps=0.0,
    weight_decay=0.0,
    options=held_0_options,
    grad_scale=None,
    found_inf=None
)
_set_grad_enabled_5 = _set_grad_enabled(True)
detach = detach(loss)
return (detach,)
""",
    )


class Train:
    """A model whose parameters outweigh its activations, with 8-bit states for weights and 32-bit states for biases."""

    def __init__(self, clip: float | None) -> None:
        torch.manual_seed(0)
        self.clip = clip
        self.model = nn.Sequential(nn.Linear(256, 1000), nn.GELU(), nn.Linear(1000, 512), nn.GELU(), nn.Linear(512, 10))
        self.optimizer = AdamW8bit(self.model.parameters(), lr=1e-3)
        self.optimizer.init_state()
        self.scheduler = lr_scheduler.ExponentialLR(self.optimizer, 0.99)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(self.model(x), y)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 256), torch.randint(10, (16,))


@pytest.mark.every_torch
def test_inductor_updates_in_place_and_follows_eager() -> None:
    eager, compiled = Train(clip=1.0), Train(clip=1.0)
    step = bnbops.compiled_train_step(compiled.step, compiled.optimizer)
    first = batch()
    loss, (code,) = run_and_get_code(step, *first)
    torch.testing.assert_close(loss, eager.step(*first).detach())
    assert_updates_in_place(code)

    for _ in range(19):
        eager.scheduler.step()
        compiled.scheduler.step()
        data = batch()
        torch.testing.assert_close(step(*data), eager.step(*data).detach())
    assert (step.graph_count, step.recompiles) == (1, 0)
    for name, p in compiled.model.named_parameters():
        # Gradients differ by rounding. Where one is about zero, Adam's normalised step makes a part of lr of that.
        difference = (p - eager.model.get_parameter(name)).detach().abs()
        assert difference.mean() <= 1e-5 and difference.max() <= 20 * 1e-3, name


def assert_updates_in_place(code: str) -> None:
    """The generated code calls the operator on the step's own inputs, and neither copies them nor returns them."""
    calls = re.findall(r"torch\.ops\.bnbops\.adam_step_\.default\((.*)\)", code)
    updated: list[str] = []
    for call in calls:
        lists = re.match(r"\[(.*?)\], \[(.*)\], " + r"\[(.*?)\], " * 5 + r"lr=arg\d+_1,", call).groups()
        params, grads, *states = lists
        assert "arg" not in grads
        updated += [name for names in (params, *states) if names for name in names.split(", ")]
    assert all(re.fullmatch(r"arg\d+_1", name) for name in updated), updated
    assert len(updated) == len(set(updated))
    assert len(calls) == 2 and len(updated) == 3 * (1 + 2 + 2 + 1) + 3 * (1 + 2 + 1)  # 8-bit weights, 32-bit biases
    body = code[code.index("def call(") : code.index("return (", code.index("def call("))]
    assert "uint8" not in "".join(re.findall(r"empty_strided.*", body))  # no buffer for a state
    assert not re.search(r"\.copy_|aten\.clone|aten\.copy", body)
    assert re.match(r"return \(buf\d+, \)", code[code.index("def call(") + len(body) :])  # the loss alone


def peak_memory(call: Callable[..., object], *args: object) -> int:
    """The most bytes that a call had allocated at one time, from torch's own account of the CPU allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call(*args)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_peak_memory_is_not_above_eager() -> None:
    eager, compiled = Train(clip=None), Train(clip=None)
    step = bnbops.compiled_train_step(compiled.step, compiled.optimizer)
    data = batch()
    step(*data), eager.step(*data)
    gradients = sum(p.numel() * p.element_size() for p in eager.model.parameters())
    expected = peak_memory(eager.step, *data)
    assert gradients < expected < 1.1 * gradients  # the account works: gradients and a little more
    assert peak_memory(step, *data) <= expected
