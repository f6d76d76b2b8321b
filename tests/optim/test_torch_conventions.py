"""Our optimizers under torch's own battery, and where torch's optimizers are used: same results and conventions."""

import copy
import io
import itertools
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerErrorEnum, optim_db

from bnbops import optim
from cases.optimizers import MIXED, assert_same, assert_same_state, flat_state, params, set_grads, train
from cases.torch_pairs import LR, NAMES, add_group, assert_alike, make, pair, parameters, train_both

pytestmark = pytest.mark.every_torch

INFO = {info.name: info for info in optim_db if info.name in NAMES}
CONFIGURATIONS = [
    pytest.param(name, config.kwargs, id=f"{name}-{config.desc}")
    for name in NAMES
    for config in INFO[name].optim_inputs_func("cpu")
]
UNSUPPORTED = {"amsgrad", "centered"}  # in bitsandbytes, too
SUPPORTED = [config for config in CONFIGURATIONS if not UNSUPPORTED & config.values[1].keys()]
REFUSED = [config for config in CONFIGURATIONS if UNSUPPORTED & config.values[1].keys()]

names = pytest.mark.parametrize("name", NAMES)
classes = pytest.mark.parametrize("cls", [f"{name}{bits}" for name in NAMES for bits in ("", "8bit")])


def build(cls: str, parameters: Any, **options: Any) -> Optimizer:
    return getattr(optim, cls)(parameters, **{"lr": LR, **options})


# ---- torch's configurations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), SUPPORTED)
def test_trains_as_torch(name, options):
    train_both(*pair(name, **options), range(20))


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_what_is_not_implemented_is_refused(name, options):
    """Never ignored: the message names the option."""
    with pytest.raises((ValueError, NotImplementedError), match="|".join(UNSUPPORTED & options.keys())):
        build(name, params((4, 4)), **options)


@pytest.mark.parametrize("bits", ["", "8bit"])
@pytest.mark.parametrize(("name", "options"), SUPPORTED)
def test_zero_gradients_and_no_gradients(name, options, bits):
    """torch's no-op tests: a zero gradient moves nothing but by weight decay; none moves nothing at all."""
    p = params(*MIXED)
    optimizer = build(name + bits, p, **copy.deepcopy(options))
    before = copy.deepcopy(p)
    optimizer.step()
    assert_same(p, before)
    for x in p:
        x.grad = torch.zeros_like(x)
    decays = bool(optimizer.param_groups[0]["weight_decay"])
    for _ in range(2):
        optimizer.step()
    assert [torch.equal(x, y) for x, y in zip(p, before, strict=True)] == [not decays] * len(p)


@pytest.mark.parametrize("bits", ["", "8bit"])
@pytest.mark.parametrize(("name", "options"), SUPPORTED)
def test_a_saved_state_continues(name, options, bits):
    """torch.save, load with weights_only, and train on: the same bits; nothing but tensors in a state."""
    p = params(*MIXED)
    optimizer = build(name + bits, p, **copy.deepcopy(options))
    train(p, optimizer, range(3))
    assert all(isinstance(x, Tensor) for x in flat_state(optimizer).values())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = copy.deepcopy(p)
    other = build(name + bits, q, **({"momentum": 0.5} if "momentum" in options else {}))
    other.load_state_dict(torch.load(file, weights_only=True))
    train(p, optimizer, range(3, 6))
    train(q, other, range(3, 6))
    assert_same(p, q)
    assert_same_state(optimizer, other)


@pytest.mark.parametrize(("name", "options"), SUPPORTED)
def test_a_deep_copy_has_every_public_attribute(name, options):
    optimizer = build(name, params((4, 4)), **copy.deepcopy(options))
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert public == {key for key in vars(copy.deepcopy(optimizer)) if not key.startswith("_")} >= {"param_groups"}


# ---- torch's error inputs --------------------------------------------------------------------------------------

ONLY_TORCHS = {"foreach", "fused", "capturable", "differentiable"}  # choices among torch's implementations
MESSAGES = {  # where ours says it in other words
    "Tensor lr must be 1-element": "tensor lr must have one element",
    "Invalid beta parameter at index 0: 1.0": r"betas\[0\] must be in \[0, 1\), got 1.0",
    "Invalid weight_decay value: -1": "weight_decay must be .*, got -1",
    "Invalid momentum value: -1.0": "momentum must be .*, got -1.0",
    "Invalid momentum value: -0.5": "momentum must be .*, got -0.5",
    "Invalid lr_decay value: -0.5": "lr_decay must be .*, got -0.5",
}
ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}")
    for name in NAMES
    for error in INFO[name].optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize("bits", ["", "8bit"])
@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_torchs_error_inputs(name, error: ErrorOptimizerInput, bits):
    given = error.optimizer_error_input
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    options, parameters = given.kwargs, params((2, 2)) if given.params is None else given.params
    if ONLY_TORCHS & options.keys():
        with pytest.raises(TypeError, match="foreach"):
            build(name + bits, parameters, **options)
    elif "both floats or both Tensors" in error.error_regex:  # a limit of torch's kernels: ours read numbers
        build(name + bits, parameters, **options)
    elif error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            build(name + bits, parameters, **options)
    else:
        with pytest.raises(error.error_type, match=MESSAGES.get(error.error_regex, error.error_regex)):
            build(name + bits, parameters, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
@classes
def test_other_dtypes_are_refused(cls, dtype):
    """float64 and complex parameters, which torch's take: nothing changes, the message says what is possible."""
    p = nn.Parameter(torch.ones(64, 80, dtype=dtype))
    p.grad = torch.ones_like(p)
    with pytest.raises((RuntimeError, ValueError), match="float32, bfloat16 or float16"):
        build(cls, [p]).step()
    assert torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("argument", sorted(ONLY_TORCHS))
@classes
def test_torchs_choices_of_implementation_are_refused(cls, argument):
    with pytest.raises(TypeError, match=argument):
        build(cls, params((2, 2)), **{argument: True})


def test_tensor_betas_are_numbers():
    """Tensors in place of floats, one or both, train alike."""
    results = []
    for betas in ((0.5, 0.75), (torch.tensor(0.5), torch.tensor(0.75)), (0.5, torch.tensor(0.75))):
        p = params(*MIXED)
        train(p, optim.AdamW8bit(p, betas=betas), range(3))
        results.append(p)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


# ---- param groups and names ------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 3))


GROUPS = {
    "list": lambda m: list(m.parameters()),
    "generator": lambda m: m.parameters(),
    "names": lambda m: m.named_parameters(),
    "one tensor in a dict": lambda m: [{"params": m[0].weight}],
    "dicts": lambda m: [{"params": m[0].parameters(), "lr": LR / 2}, {"params": list(m[2].parameters())}],
    "dicts with names": lambda m: [{"params": m[0].named_parameters(), "weight_decay": 0.1}],
    "set of options": lambda m: ({"params": p, "lr": LR * (i + 1)} for i, p in enumerate(m.parameters())),
}


def described(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    return [
        ([tuple(p.shape) for p in group["params"]], group.get("param_names"), group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("form", GROUPS)
@names
def test_forms_of_param_groups(name, form):
    ours, theirs = (make(name, GROUPS[form](network()), ours=which) for which in (True, False))
    assert described(ours) == described(theirs)
    train_both(ours, theirs, range(5))


@names
def test_added_groups(name):
    """With the optimizer's defaults; refused as torch refuses, and nothing is added then."""
    ours, theirs = pair(name)
    for optimizer in (ours, theirs):
        train(parameters(optimizer), optimizer, range(2))
        add_group(optimizer, {"params": params((64, 80), seed=1), "lr": LR / 2})
        for wrong, error in (
            ({"params": optimizer.param_groups[0]["params"][:1]}, ValueError),
            ({"params": set(params((2, 2)))}, TypeError),
            ({"params": ["weight"]}, TypeError),
            ({"params": [("weight", nn.Parameter(torch.zeros(2)))]}, ValueError),
        ):
            with pytest.raises(error):
                optimizer.add_param_group(wrong)
        assert len(optimizer.param_groups) == 2
    assert described(ours) == described(theirs)
    train_both(ours, theirs, range(2, 5))


@pytest.mark.parametrize("live", ["plain", "named", "renamed"])
@pytest.mark.parametrize("saved", ["plain", "named"])
@classes
def test_names_across_state_dicts(cls, saved, live):
    """Names in the state dict replace the optimizer's, as in torch; without them the optimizer keeps its own."""

    def given(module: nn.Module, how: str) -> Any:
        if how == "plain":
            return module.parameters()
        return ((f"{'other.' * (how == 'renamed')}{key}", p) for key, p in module.named_parameters())

    found = []
    for factory in (lambda p: build(cls, p), lambda p: make(cls.removesuffix("8bit"), p, ours=False)):
        source, target = factory(given(network(), saved)), factory(given(network(), live))
        train(parameters(source), source, range(1))
        target.load_state_dict(source.state_dict())
        found.append(target.param_groups[0].get("param_names"))
        train(parameters(target), target, range(1, 2))
    assert found[0] == found[1]
    assert (found[0] is None) == (saved == live == "plain")


# ---- closures and hooks ----------------------------------------------------------------------------------------


@names
def test_closure(name):
    """Evaluated once a step, with gradients on; its value is returned."""
    values = []
    optimizers = pair(name)
    for optimizer in optimizers:
        calls = itertools.count(1)
        seen = []

        def closure(optimizer: Optimizer = optimizer, seen: list = seen, calls: Any = calls) -> Tensor:
            optimizer.zero_grad()
            loss = sum(p.square().mean() for p in parameters(optimizer))
            loss.backward()
            seen.append((next(calls), torch.is_grad_enabled()))
            return loss

        with torch.no_grad():
            values.append([optimizer.step(closure).item() for _ in range(4)])
        assert seen == [(i, True) for i in range(1, 5)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert_alike(*optimizers)


def hooked(optimizer: Optimizer) -> list[Any]:
    """Everything that happens to an optimizer with every kind of hook, all but the first two removable."""
    log: list[Any] = []

    def note(what: str) -> Any:
        return lambda opt, *rest: log.append((what, opt is optimizer, len(rest)))

    def shorter_rate(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        log.append("load pre, replacing")
        groups = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def marked(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        log.append("state_dict post, replacing")
        return {**state_dict, "marked": True}

    handles = [
        optimizer.register_step_pre_hook(note("step pre")),
        optimizer.register_step_post_hook(note("step post")),
        optimizer.register_state_dict_pre_hook(note("state_dict pre")),
        optimizer.register_state_dict_pre_hook(note("state_dict pre, first"), prepend=True),
        optimizer.register_state_dict_post_hook(marked),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_pre_hook(shorter_rate, prepend=True),
        optimizer.register_load_state_dict_post_hook(note("load post")),
        optimizer.register_load_state_dict_post_hook(note("load post, first"), prepend=True),
        register_optimizer_step_pre_hook(note("any step pre")),
        register_optimizer_step_post_hook(note("any step post")),
    ]

    def use() -> None:
        train(parameters(optimizer), optimizer, range(1))
        saved = optimizer.state_dict()
        log.append(("saved", sorted(saved)))
        optimizer.load_state_dict(saved)
        log.append(("loaded", [group["lr"] for group in optimizer.param_groups]))

    use()
    for handle in handles:
        handle.remove()
    use()
    return log


@names
def test_hooks(name):
    """All of torch's hooks, in torch's order, with what they may replace."""
    ours, theirs = map(hooked, pair(name))
    assert ours == theirs
    assert ("step pre", True, 2) in ours and ("any step post", True, 2) in ours and "load pre, replacing" in ours


# ---- gradient scaling, profiler, functional use ----------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@names
def test_grad_scaler(name, fused):
    """By the scaler or by the operator: scaled gradients are unscaled, an overflow skips the step; torch's scale and
    parameters."""
    optimizers, scales = pair(name), []
    optimizers[0].fused_scaling = fused
    for optimizer in optimizers:
        scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**12, growth_interval=3)
        scales.append([])
        for step in range(10):
            optimizer.zero_grad()
            loss = sum((p * (1 + step / 10)).square().mean() for p in parameters(optimizer))
            overflow = math.inf if step in (2, 7) else 1.0
            before = copy.deepcopy(parameters(optimizer))
            scaler.scale(loss * overflow).backward()
            if step == 4:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters(optimizer), 0.1)
            scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(p, q) for p, q in zip(parameters(optimizer), before, strict=True)]
            assert moved == [overflow == 1.0] * len(before)
            scales[-1].append(scaler.get_scale())
    assert scales[0] == scales[1] and len(set(scales[0])) > 1
    assert_alike(*optimizers)


def test_the_scaler_unscales_unless_it_is_told_otherwise():
    """As with torch's optimizers, float16 parameters are for the fused path alone."""
    p = params((64, 80), dtype=torch.float16)
    optimizer = optim.AdamW8bit(p)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p[0].float().square().sum()).backward()
    before = copy.deepcopy(p[0])
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)
    assert torch.equal(p[0], before)
    optimizer.fused_scaling = True
    scaler.step(optimizer)
    assert not torch.equal(p[0], before)
    copies = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    assert [each.fused_scaling for each in copies] == [True, True]


@classes
def test_profiler_names_the_step(cls):
    p = params((4, 4))
    optimizer = build(cls, p)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(p, optimizer, range(1))
    assert f"Optimizer.step#{cls}.step" in {event.key for event in profile.key_averages()}


@names
def test_gradients_from_functional_calls(name):
    """torch.func computes the gradients, the optimizer steps the module's own parameters."""
    x, optimizers = torch.randn(4, 64), []
    for which in (True, False):
        module = network()
        optimizers.append(make(name, module.parameters(), ours=which))
        for _ in range(5):
            weights = dict(module.named_parameters())
            gradients = grad(lambda w, m=module: functional_call(m, w, x).square().mean())(weights)
            for key, weight in weights.items():
                weight.grad = gradients[key]
            optimizers[-1].step()
    assert_alike(*optimizers)


@names
def test_stacked_models_train_in_one_call(name):
    """Model ensembling: parameters stacked by stack_module_state, gradients by vmap, one optimizer for all."""
    x, stacked = torch.randn(4, 64), []
    for which in (True, False):
        torch.manual_seed(0)
        models = [nn.Linear(64, 80) for _ in range(3)]
        weights, buffers = stack_module_state(models)
        stacked.append(make(name, weights.values(), ours=which))
        for _ in range(5):
            gradients = vmap(grad(lambda w, b, m=models[0]: functional_call(m, (w, b), x).square().mean()))(
                weights, buffers
            )
            for key, weight in weights.items():
                weight.grad = gradients[key]
            stacked[-1].step()
    assert_alike(*stacked)


@classes
def test_a_step_inside_vmap_is_refused(cls):
    """The operators write in place and have no batching rule; nothing runs."""

    def stepped(gradient: Tensor) -> Tensor:
        p = nn.Parameter(torch.zeros(64, 80))
        p.grad = gradient
        build(cls, [p]).step()
        return p.detach()

    with pytest.raises(RuntimeError, match=r"[Bb]atching rule"):
        vmap(stepped)(torch.ones(3, 64, 80))


@names
def test_a_step_is_a_constant_to_torch_func(name):
    """No derivative passes through a step, as through torch's without differentiable=True."""

    def after_a_step(factor: Tensor, ours: bool) -> Tensor:
        p = nn.Parameter(torch.ones(64, 80))
        p.grad = factor * torch.ones(64, 80)
        make(name, [p], ours=ours).step()
        return (p * factor).sum()

    values = [grad(after_a_step)(torch.tensor(2.0), which) for which in (True, False)]
    torch.testing.assert_close(*values)
    assert values[0] > 0  # that of the second factor


@classes
def test_nothing_warns(cls):
    """A plain loop of training, saving and loading under warnings as errors."""
    p = params(*MIXED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = build(cls, p)
        set_grads(p, 0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        repr(optimizer)
