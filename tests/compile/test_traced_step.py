"""Train steps that make_fx records: options are inputs of the graph. Reference: the same steps, taken by `step()`."""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import bnbops
from bnbops import optim
from cases.compiled import assert_same, batches, make, make_model, snapshot
from cases.optimizer_classes import WITH_8BIT, build
from cases.optimizers import params, set_grads
from cases.transforms import OrthogonalSGD

Options = list[dict[str, Tensor]]


def optimizer_of(name: str, model: nn.Module) -> optim.Optimizer:
    """Two groups, states of 8 and of 32 bits."""
    groups = [{"params": model[0].parameters(), "lr": 2e-3}, {"params": model[2].parameters()}]
    options = {"lr": 1e-3, "optim_bits": 8, "percentile_clipping": 50}
    through_python = name == "OrthogonalSGD"
    optimizer = OrthogonalSGD(groups, momentum=0.9, **options) if through_python else build(name, groups, **options)
    optimizer.init_state()
    return optimizer


def schedule(optimizer: optim.Optimizer, step: int) -> None:
    """Moves what schedules move."""
    for group in optimizer.param_groups:
        lr = 1e-2 / (step + 2)
        group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else group.update(lr=lr)
        group["weight_decay"] = 0.1 * step
        if "betas" in group:
            group["betas"] = (0.9 - 0.1 * step, *group["betas"][1:])


class Traced:
    """Forward, backward and the optimizer's step as one graph of tensors, in the way of tracers of whole steps."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, x: Tensor, mode: str = "fake") -> None:
        self.model, self.optimizer = model, optimizer
        self.states = [optimizer.state[p] for p in model.parameters()]
        self.graph = make_fx(lambda *inputs: self.step(*inputs), tracing_mode=mode)(*self.inputs(x))
        self.put(list(model.parameters()), self.states)

    def inputs(self, x: Tensor) -> tuple:
        return [p.detach() for p in self.model.parameters()], self.states, self.optimizer.tensor_options(), x

    def put(self, weights: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        """Takes other tensors for the optimizer's."""
        left = list(weights)
        for group in self.optimizer.param_groups:
            group["params"] = [left.pop(0) for _ in group["params"]]
        self.optimizer.state = defaultdict(dict, zip(weights, states, strict=True))

    def step(self, weights: list[Tensor], states: list[dict[str, Tensor]], options: Options, x: Tensor) -> Tensor:
        weights = [weight.detach().requires_grad_() for weight in weights]
        self.put(weights, states)
        names = [name for name, _ in self.model.named_parameters()]
        loss = torch.func.functional_call(self.model, dict(zip(names, weights, strict=True)), (x,)).square().mean()
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = grad
        self.optimizer.traced_step(options)
        return loss.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return self.graph(*self.inputs(x))


def operators(graph: GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("bnbops.")]


def eager(model: nn.Module, optimizer: optim.Optimizer, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.every_torch
@pytest.mark.parametrize("name", [*WITH_8BIT, "OrthogonalSGD"])
def test_follows_eager_whatever_options_become(name: str) -> None:
    runs = []
    for traced in (False, True):
        model = make_model()
        optimizer = optimizer_of(name, model)
        data = [x for x, _ in batches(4)]
        step = Traced(model, optimizer, data[0]) if traced else lambda x, m=model, o=optimizer: eager(m, o, x)
        seen = []
        for i, x in enumerate(data):
            schedule(optimizer, i)
            seen.append(step(x))
        runs.append({**snapshot(model, optimizer), "losses": torch.stack(seen)})
    assert_same(runs[1], runs[0])
    assert not torch.equal(runs[0]["param 0.weight"], make_model()[0].weight)
    # A call each for states of 8 and of 32 bits, no second one that only checks; and no constant.
    taken = [op for op in operators(step.graph) if op.endswith(("_step_.default", "_apply_.default"))]
    assert len(taken) == sum(len({len(state) for state in states}) for states in (step.states[:2], step.states[2:]))
    assert not [node for node in step.graph.graph.nodes if node.op == "get_attr"]


def test_modes_of_tracing() -> None:
    graphs = []
    for mode in ("real", "fake", "symbolic"):
        model = make_model()
        optimizer = optimizer_of("AdamW8bit", model)
        before = snapshot(model, optimizer)
        graphs.append(operators(Traced(model, optimizer, batches(1)[0][0], mode).graph))
        if mode != "real":  # in which it computes
            assert_same(snapshot(model, optimizer), before)
    assert graphs[0] == graphs[1] == graphs[2] and len(graphs[0]) > 2


def test_without_a_tracer_it_is_a_step_with_other_options() -> None:
    results = []
    for traced in (False, True):
        p = params((64, 80), (130,))
        bnbops.optim.GlobalOptimManager.get_instance().override_config(p[1], "lr", 0.5)
        optimizer = optim.AdamW8bit(p, lr=torch.tensor(1e-2, dtype=torch.float64), weight_decay=0.1)
        options = optimizer.tensor_options()
        assert [entry["lr"].tolist() for entry in options] == [[1e-2], [0.5]]
        for step in range(3):
            set_grads(p, step)
            optimizer.traced_step(options) if traced else optimizer.step()
            if traced:
                optimizer.param_groups[0].update(lr=9.0, weight_decay=9.0, betas=(0.0, 0.0))  # not asked for
        results.append({f"{i}": x.detach() for i, x in enumerate(p)})
    assert_same(*results)


# ---- what is refused -------------------------------------------------------------------------------------------


class Stepping(nn.Module):
    def __init__(self, model: nn.Module, optimizer: optim.Optimizer) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer

    def forward(self, x: Tensor) -> Tensor:
        self.optimizer.step(lambda: pytest.fail("the closure was called"))
        return x + 1


TRACERS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "make_fx": lambda module, x: make_fx(module)(x),
    "make_fx with fakes": lambda module, x: make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "torch.export": lambda module, x: torch.export.export(module, (x,)),
    "strict torch.export": lambda module, x: torch.export.export(module, (x,), strict=True),
}


@pytest.mark.every_torch
@pytest.mark.parametrize("tracer", TRACERS)
def test_step_becomes_no_graph_with_constants(tracer: str) -> None:
    model, optimizer = make()
    eager(model, optimizer, batches(1)[0][0])
    model(batches(1)[0][0]).sum().backward()
    before = snapshot(model, optimizer)
    with pytest.raises(
        (RuntimeError, TorchDynamoException), match=r"would make constants of lr.*traced_step\(options\)"
    ):
        TRACERS[tracer](Stepping(model, optimizer), torch.ones(1))
    assert_same(snapshot(model, optimizer), before)


def test_bad_options() -> None:
    model, optimizer = make()
    model(batches(1)[0][0]).sum().backward()
    options = optimizer.tensor_options()
    optimizer.init_state()
    before = snapshot(model, optimizer)
    infinite = [{**options[0], "lr": torch.tensor([torch.inf], dtype=torch.float64)}]
    short = [{**options[0], "options": options[0]["options"][:1]}]
    negative = [{**options[0], "options": -options[0]["options"]}]
    for bad, error, message in (
        (
            [],
            ValueError,
            r"got options of 0 groups of parameters, but there are 1: pass what tensor_options\(\) returns",
        ),
        (options * 2, ValueError, "of 2 groups of parameters, but there are 1"),
        (infinite, RuntimeError, "lr must be finite, got inf"),
        (short, RuntimeError, r"options must have shape \[4\]"),
        (negative, RuntimeError, r"beta1 must be in \[0, 1\)"),
    ):
        with pytest.raises(error, match=message):
            optimizer.traced_step(bad)
        assert_same(snapshot(model, optimizer), before)


def test_state_is_made_before() -> None:
    p = params((64, 80))
    optimizer = optim.AdamW8bit(p)
    options = optimizer.tensor_options()

    def step(grad: Tensor, options: Options) -> Tensor:
        p[0].grad = grad
        optimizer.traced_step(options)
        return grad + 1

    with pytest.raises(RuntimeError, match=r"no optimizer state yet; call optimizer.init_state\(\)"):
        make_fx(step)(torch.ones(64, 80), options)
    assert not any(optimizer.state.values())


def test_steps_in_python_have_no_tensor_options() -> None:
    optimizer = optim.PytorchLARS(params((4, 4)), momentum=0.9)
    for call in (optimizer.tensor_options, lambda: optimizer.traced_step([{}])):
        with pytest.raises(NotImplementedError, match="the step of PytorchLARS is no operator"):
            call()


@pytest.mark.every_torch
def test_dynamo_traces_it_too():
    (p,), (q,) = params((64, 80)), params((64, 80))
    traced, plain = optim.AdamW8bit([p]), optim.AdamW8bit([q])
    traced.init_state()
    step = torch.compile(lambda options: traced.traced_step(options), fullgraph=True, backend="aot_eager")
    for i in range(2):
        set_grads([p], i)
        set_grads([q], i)
        step(traced.tensor_options())
        plain.step()
    assert torch.equal(p, q)
