"""Every optimizer class where it is used: changing options, copies, overrides, one graph."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnbops
from bnbops import optim
from bnbops.optim import Adagrad8bit, AdamW8bit, GlobalOptimManager, RMSprop, RMSprop8bit, SGD8bit
from cases.optimizer_classes import CLASSES, build
from cases.optimizers import MIXED, assert_same, assert_same_state, flat_state, params, set_grads, train
from reference.rules import RULES

LR = 1e-2
names = pytest.mark.parametrize("name", CLASSES)


# ---- options that change between steps -------------------------------------------------------------------------

MOMENTA = [0.0, 0.0, 0.5, 0.9, 0.0, 0.7, 0.0]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_momentum_may_come_and_go(name, bits):
    """A buffer is added when momentum is raised from 0, and kept where it falls to 0 again."""
    plain, moving = {"SGD": ("sgd", "momentum"), "RMSprop": ("rmsprop", "rmsprop_momentum")}[name]
    defaults = {**RULES[moving].options, "lr": LR, "weight_decay": 0, "dampening": 0}
    p = params(*MIXED)
    optimizer = getattr(optim, name)(p, lr=LR, optim_bits=bits)
    expected = [x.detach().double() for x in p]
    states = [{key: torch.zeros_like(x) for key in RULES[moving].states} for x in expected]
    for t, momentum in enumerate(MOMENTA):
        rule = RULES[moving if momentum else plain]
        optimizer.param_groups[0]["momentum"] = momentum
        train(p, optimizer, range(t, t + 1))
        assert all(("momentum_buffer" in optimizer.state[x]) == (t >= 2) for x in p)
        for i, x in enumerate(p):
            options = {key: momentum if key == "momentum" else defaults[key] for key in rule.options}
            old = [states[i][key] for key in rule.states]
            expected[i], new = rule.update(expected[i], x.grad.double(), old, t + 1, **options)
            states[i] |= zip(rule.states, new, strict=True)
    for x, y in zip(p, expected, strict=True):
        quantized = bits == 8 and x.numel() >= 4096
        assert optimizer.state[x]["momentum_buffer"].dtype == (torch.uint8 if quantized else torch.float32)
        if not quantized:  # the longest steps, RMSprop's first ones, are of 10 * LR
            torch.testing.assert_close(x.detach().double(), y, rtol=1e-5, atol=1e-4 * LR)
    saved = copy.deepcopy(optimizer.state_dict())  # with momentum 0, and yet with buffers
    other = getattr(optim, name)(params(*MIXED), lr=LR)
    other.load_state_dict(saved)
    assert_same_state(optimizer, other)


def test_a_buffer_added_to_flat_blocks_has_flat_blocks():
    """As after loading a checkpoint of bitsandbytes."""
    p = params((100, 77))
    optimizer = RMSprop8bit(p)
    train(p, optimizer, range(1))
    state = optimizer.state[p[0]]
    state["square_avg_absmax"] = torch.ones(math.ceil(7700 / 256))
    optimizer.param_groups[0]["momentum"] = 0.9
    train(p, optimizer, range(1, 2))
    assert state["momentum_buffer_absmax"].shape == (31,)


def test_initial_accumulator_value():
    """In 8 bits it is the largest code times a scale of that value, which is exact."""
    for value, codes in ((0.25, 255), (0.0, 0)):
        p = params(*MIXED)
        optimizer = Adagrad8bit(p, initial_accumulator_value=value)
        optimizer.init_state()
        for x in p:
            state = optimizer.state[x]
            if x.numel() >= 4096:
                assert (state["sum"] == codes).all() and (state["sum_absmax"] == value).all()
            else:
                assert (state["sum"] == value).all()
    q = params((64, 80))
    reference = torch.optim.Adagrad(q, initial_accumulator_value=0.25)
    p = params((64, 80))
    optimizer = Adagrad8bit(p, initial_accumulator_value=0.25)
    train(p, optimizer, range(1))
    train(q, reference, range(1))
    torch.testing.assert_close(p[0], q[0], rtol=1e-5, atol=1e-7)  # the first step sees the exact sum


def test_rmsprop_keeps_its_average_when_momentum_comes():
    p = params((64, 80))
    optimizer = RMSprop(p)
    train(p, optimizer, range(2))
    before = optimizer.state[p[0]]["square_avg"]
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.init_state()
    assert optimizer.state[p[0]]["square_avg"] is before and not optimizer.state[p[0]]["momentum_buffer"].any()


# ---- as any optimizer ------------------------------------------------------------------------------------------


def loaded(optimizer: torch.optim.Optimizer, p: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = copy.deepcopy(p)
    other = build(type(optimizer).__name__, q, lr=123.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other, q


COPIES: dict[str, Callable[..., Any]] = {
    "state_dict": loaded,
    "deepcopy": lambda *pair: copy.deepcopy(pair),
    "pickle": lambda *pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.every_torch
@pytest.mark.parametrize("how", COPIES)
@names
def test_copies_continue_bit_exactly(name, how):
    p = params(*MIXED)
    optimizer = build(name, p, lr=LR, percentile_clipping=50)
    train(p, optimizer, range(3))
    other, q = COPIES[how](optimizer, p)
    assert_same_state(optimizer, other)
    kept = copy.deepcopy(flat_state(other))
    train(p, optimizer, range(3, 6))
    assert_same(list(flat_state(other).values()), list(kept.values()))  # nothing is shared
    train(q, other, range(3, 6))
    assert_same(p, q)
    assert_same_state(optimizer, other)


@pytest.fixture
def manager() -> Iterator[GlobalOptimManager]:
    manager = GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parameters in each operator call from now on."""
    from bnbops.optim.core.call import Call

    found: list[int] = []
    run = Call.run
    monkeypatch.setattr(Call, "run", lambda self, norms: (found.append(len(self.params)), run(self, norms))[1])
    return found


def test_equal_overrides_share_a_call(manager, monkeypatch):
    """And the parameters train as in groups of their own."""
    p, q = params(*[(64, 80)] * 5), params(*[(64, 80)] * 5)
    for x in (p[1], p[4]):
        manager.override_config(x, key_value_dict={"lr": LR, "betas": (0.5, 0.6)})
    manager.override_config(p[3], "optim_bits", 32)
    one = AdamW8bit(p)
    groups = [[q[0], q[2]], [q[1], q[4]], [q[3]]]
    options = [{}, {"lr": LR, "betas": (0.5, 0.6)}, {"optim_bits": 32}]
    many = AdamW8bit([{"params": x, **o} for x, o in zip(groups, options, strict=True)])
    calls = counted(monkeypatch)
    train(p, one, range(1))
    assert calls == [2, 2, 1]
    train(p, one, range(1, 3))
    train(q, many, range(3))
    assert_same(p, q)
    manager.initialize()  # overrides are looked up at every step
    del calls[:]
    train(p, one, range(3, 4))
    assert calls == [4, 1]


def test_overrides_of_options_that_are_not_there(manager):
    p = params((64, 80))
    manager.override_config(p, "betas", (0.5, 0.6))
    optimizer = SGD8bit(p, lr=LR)
    before = copy.deepcopy(p)
    set_grads(p, 0)
    for call in (optimizer.init_state, optimizer.step):
        with pytest.raises(ValueError, match=r"overrides betas of a parameter of shape \[64, 80\], but SGD8bit has no"):
            call()
    assert_same(p, before)
    assert not optimizer.state[p[0]]


# ---- compiled --------------------------------------------------------------------------------------------------

# Every optimizer is compiled in compile/test_compile_family.py: here with what it has not there.
COMPILED = [
    ("AdamW", {"percentile_clipping": 50}),
    ("LARS", {"percentile_clipping": 50}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("Lion", {}),
]


@pytest.mark.parametrize(("name", "options"), COMPILED, ids=str)
def test_compiles_into_one_graph_with_overrides(name, options, manager):
    """The bits of the eager step, with 8-bit and 32-bit states, overrides, clipping and trust ratios."""

    def run(compiled: bool) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 3))
        manager.override_config([net[0].bias, net[2].weight], "lr", LR / 2)
        optimizer = build(name, net.parameters(), lr=LR, optim_bits=8, **options)
        x = torch.randn(8, 64)

        def step() -> None:
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        call = bnbops.compiled_train_step(step, optimizer, backend="aot_eager") if compiled else step
        for _ in range(4):
            call()
        assert not compiled or call.graph_count == 1
        return list(net.parameters()), [state for _, state in sorted(flat_state(optimizer).items())]

    for actual, expected in zip(run(True), run(False), strict=True):
        assert_same(actual, expected)
