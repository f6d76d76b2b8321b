"""GlobalOptimManager: which options a parameter gets, for how long, and what is refused."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import bnbops
from bnbops import optim
from bnbops.optim import AdamW8bit, AdamW32bit
from bnbops.optim.core.manager import KNOWN_OPTIONS, STATE_OPTIONS, GlobalOptimManager
from cases.compiled import assert_same as assert_same_tensors
from cases.compiled import batches, make, snapshot, usual_step
from cases.optimizers import assert_same, params, set_grads, train

BIG = (64, 80)  # gets 8-bit states


@pytest.fixture
def manager():
    """The manager, empty before and after."""
    manager = GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


def bits(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> int:
    return 8 if optimizer.state[param]["exp_avg"].dtype == torch.uint8 else 32


def built(cls: type, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = cls(parameters)
    optimizer.init_state()
    return optimizer


# ---- what applies ----------------------------------------------------------------------------------------------


def test_one_manager(manager):
    assert GlobalOptimManager.get_instance() is manager and optim.GlobalOptimManager is GlobalOptimManager
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()


def test_nothing_is_overridden_by_default(manager):
    (p,) = params(BIG)
    assert manager.overrides_for(p) == {} and bits(built(AdamW8bit, [p]), p) == 8


@pytest.mark.parametrize(
    "arguments",
    [("optim_bits", 32), (None, None, {"optim_bits": 32})],
    ids=["key and value", "dict"],
)
def test_override_config(manager, arguments):
    """One parameter, a list or a generator; others keep the group's options."""
    for wrap in (lambda p: p, lambda p: [p], lambda p: (x for x in [p])):
        p, other = params(BIG, BIG)
        manager.override_config(wrap(p), *arguments)
        optimizer = built(AdamW8bit, [p, other])
        assert (bits(optimizer, p), bits(optimizer, other)) == (32, 8)
        assert manager.overrides_for(p) == {"optim_bits": 32} and manager.overrides_for(other) == {}


def test_override_after_construction(manager):
    """bitsandbytes' documentation registers, builds the optimizer, then overrides."""
    p, other = params(BIG, BIG)
    manager.register_parameters([p, other])
    optimizer = AdamW8bit([p, other])
    manager.override_config(p, "optim_bits", 32)
    train([p, other], optimizer, range(1))
    assert (bits(optimizer, p), bits(optimizer, other)) == (32, 8)


def test_overrides_are_merged(manager):
    p, q = params(BIG, BIG)
    config = {"lr": 1.0, "optim_bits": 8}
    manager.override_config([p, q], key_value_dict=config)
    config["lr"] = 3.0  # the caller's dict is not kept
    manager.override_config(p, "optim_bits", 32)
    manager.override_config(p, "betas", (0.5, 0.6))
    assert manager.overrides_for(p) == {"lr": 1.0, "optim_bits": 32, "betas": (0.5, 0.6)}
    assert manager.overrides_for(q) == {"lr": 1.0, "optim_bits": 8}
    manager.overrides_for(p)["lr"] = 5.0
    assert manager.overrides_for(p)["lr"] == 1.0


def test_module_override_is_looked_up_late(manager):
    """It holds for the parameter that the module has when the state is built, as after sharding or tying weights."""
    module, (old, new) = nn.Linear(80, 64), params(BIG, BIG)
    module.weight = old
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    assert manager.overrides_for(old) == {"optim_bits": 32}
    module.weight = new
    assert manager.overrides_for(new) == {"optim_bits": 32} and manager.overrides_for(old) == {}
    other = nn.Linear(80, 64)
    other.weight = new
    optimizer = built(AdamW8bit, [*module.parameters(), other.bias])
    assert bits(optimizer, other.weight) == 32
    module.to(torch.bfloat16)
    assert manager.overrides_for(module.weight) == {"optim_bits": 32}
    module.weight = None
    assert manager.overrides_for(new) == {}


def test_module_and_parameter_overrides_together(manager):
    """All that applies is merged: of modules in the order of registration, then the parameter's own."""
    first, second = nn.Linear(80, 64), nn.Linear(80, 64)
    second.weight = first.weight
    manager.override_config(first.weight, "lr", 0.1)
    manager.register_module_override(first, "weight", {"lr": 0.2, "eps": 0.2, "weight_decay": 0.2})
    manager.register_module_override(first, "bias", {"lr": 0.7})
    manager.register_module_override(second, "weight", {"eps": 0.3})
    manager.register_module_override(first, "weight", {"weight_decay": 0.4})
    assert manager.overrides_for(first.weight) == {"lr": 0.1, "eps": 0.3, "weight_decay": 0.4}
    assert manager.overrides_for(first.bias) == {"lr": 0.7} and manager.overrides_for(second.bias) == {}


def test_a_parametrization_is_not_computed(manager):
    """Looking for a parameter must not run what a parametrized module computes on access."""
    calls = []

    class Counted(nn.Module):
        def forward(self, x):
            calls.append(1)
            return x

    module = nn.Linear(80, 64)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    nn.utils.parametrize.register_parametrization(module, "weight", Counted())
    calls.clear()
    manager.overrides_for(module.bias)
    assert not calls


def test_initialize_forgets(manager):
    module, (p,) = nn.Linear(80, 64), params(BIG)
    manager.override_config(p, "optim_bits", 32)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    manager.initialize()
    assert manager.overrides_for(p) == manager.overrides_for(module.weight) == {}


def test_hyperparameters_of_one_parameter(manager):
    """It trains as in a group of its own."""
    options = {"lr": 1e-2, "betas": (0.5, 0.6), "weight_decay": 0.3, "eps": 1e-5}
    p, q = params(BIG, BIG, (130,)), params(BIG, BIG, (130,))
    manager.override_config(p[1:], key_value_dict=options)
    one, two = AdamW8bit(p), AdamW8bit([{"params": q[:1]}, {"params": q[1:], **options}])
    train(p, one, range(3))
    train(q, two, range(3))
    assert_same(p, q)


def test_a_scheduler_does_not_change_what_is_overridden(manager):
    p, q = params(BIG, BIG), params(BIG, BIG)
    manager.override_config(p[0], "lr", 1e-2)
    one, two = AdamW32bit(p, lr=1e-3), AdamW32bit([{"params": q[:1], "lr": 1e-2}, {"params": q[1:], "lr": 1e-3}])
    rates = [lambda _: 1.0, lambda step: 0.5**step]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(one, rates[1]),
        torch.optim.lr_scheduler.LambdaLR(two, rates),
    ]
    for step in range(3):
        train(p, one, range(step, step + 1))
        train(q, two, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    assert_same(p, q)


def test_hyperparameters_may_be_overridden_between_steps(manager):
    """Unlike what a state is built from."""
    p, q = params(BIG, BIG), params(BIG, BIG)
    one, two = AdamW8bit(p), AdamW8bit([{"params": q[:1]}, {"params": q[1:]}])
    train(p, one, range(2))
    train(q, two, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.override_config(p[1], key_value_dict={"lr": 0.1, "percentile_clipping": 50})
    two.param_groups[1].update(lr=0.1, percentile_clipping=50)
    train(p, one, range(2, 4))
    train(q, two, range(2, 4))
    assert_same(p, q)


def test_overrides_of_all_parameters_at_once(manager):
    module, (p, q) = nn.Linear(80, 64), params(BIG, BIG)
    assert manager.overrides() == {}
    manager.override_config(p, "lr", 0.1)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    manager.override_config(module.weight, "lr", 0.2)
    found = manager.overrides()
    assert found == {p: {"lr": 0.1}, module.weight: {"optim_bits": 32, "lr": 0.2}} and q not in found


def test_a_compiled_step_uses_overrides(manager):
    """The bits of eager, also after an override that came between steps, which costs another compilation."""
    results = []
    for compiled in (False, True):
        model, optimizer = make()
        manager.override_config(model[0].weight, key_value_dict={"lr": 0.1, "optim_bits": 32})
        step = usual_step(model, optimizer)
        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="aot_eager")
        for i, batch in enumerate(batches(4)):
            if i == 2:
                manager.override_config(model[2].weight, "betas", (0.5, 0.6))
            step(*batch)
        results.append(snapshot(model, optimizer))
    assert_same_tensors(*results)
    assert step.recompiles == 1 and bits(optimizer, model[0].weight) == 32


# ---- lifetime --------------------------------------------------------------------------------------------------


def test_nothing_is_kept_alive(manager):
    (p,), module = params(BIG), nn.Linear(80, 64)
    manager.override_config(p, "optim_bits", 32)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer = built(AdamW8bit, [p, *module.parameters()])
    alive = [weakref.ref(x) for x in (p, module, module.weight, optimizer)]
    del p, module, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
    assert not len(manager._parameters) and not len(manager._modules)
    assert alive[3] not in list(manager._optimizers.data)  # of other tests, some may still live


def test_recycled_addresses_inherit_nothing(manager):
    """id() comes back at once: an override must not pass to the next object at the address."""
    ids, recycled = set(), 0
    for _ in range(200):
        p = nn.Parameter(torch.zeros(2))
        recycled += id(p) in ids
        assert manager.overrides_for(p) == {}
        ids.add(id(p))
        manager.override_config(p, "optim_bits", 32)
        del p
    assert recycled  # else this shows nothing


def test_a_parameter_outlives_its_python_object(manager):
    """Where only C++ holds a parameter, as a saved tensor does, its override stays."""
    p = nn.Parameter(torch.zeros(2))
    manager.override_config(p, "optim_bits", 32)
    loss = p.square().sum()
    del p
    gc.collect()
    (saved,) = (x for x in [loss.grad_fn.next_functions[0][0]._saved_self])
    assert manager.overrides_for(saved) == {"optim_bits": 32}


def test_a_parameter_whose_contents_cannot_be_exchanged(manager):
    """torch refuses to exchange the contents of a weakly referenced tensor: then cast, and override, say, by module."""
    module = nn.Linear(80, 64)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        manager.register_module_override(module, "weight", {"optim_bits": 32})
        module.to(torch.bfloat16)
        assert manager.overrides_for(module.weight) == {"optim_bits": 32}
        manager.override_config(module.weight, "lr", 0.1)
        with pytest.raises(RuntimeError, match="Couldn't swap"):
            module.to(torch.float32)
        assert manager.overrides_for(module.weight) == {"optim_bits": 32, "lr": 0.1}
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# ---- too late --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["parameter", "module"])
@pytest.mark.parametrize("origin", ["step", "init_state", "load_state_dict", "deepcopy"])
def test_too_late_warns(manager, origin, how):
    module = nn.Linear(80, 64)
    p, optimizer = [module.weight], AdamW8bit([module.weight])
    if origin == "init_state":
        optimizer.init_state()
    elif origin == "load_state_dict":
        optimizer.load_state_dict(built(AdamW8bit, params(BIG)).state_dict())
    else:
        train(p, optimizer, range(1))
    if origin == "deepcopy":
        module, optimizer = copy.deepcopy((module, optimizer))
    with pytest.warns(UserWarning, match=r"AdamW8bit has already built .*\[64, 80\].*optim_bits.*too late") as caught:
        if how == "parameter":
            manager.override_config(module.weight, "optim_bits", 32)
        else:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    assert caught[0].filename == __file__
    set_grads([module.weight], 5)
    optimizer.step()
    assert bits(optimizer, module.weight) == 8 and bits(built(AdamW8bit, [module.weight]), module.weight) == 32


def test_in_time_does_not_warn(manager):
    p, q = params(BIG, BIG)
    optimizer = AdamW8bit([p, q])
    set_grads([p], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.override_config([p, q], "optim_bits", 32)
        optimizer.step()  # builds the state of p
        manager.override_config(q, "optim_bits", 8)  # which is not yet built
        del optimizer
        manager.override_config(p, "optim_bits", 8)  # no optimizer has it any more


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["key", "dict", "module"])
def test_unknown_options_are_refused(manager, how):
    """The message lists the known ones; what is good in the same call is not kept either."""
    module = nn.Linear(80, 64)
    with pytest.raises(ValueError, match=r"optim_bit'.*known are .*optim_bits") as error:
        if how == "key":
            manager.override_config(module.weight, "optim_bit", 32)
        elif how == "dict":
            manager.override_config(module.weight, key_value_dict={"lr": 0.1, "optim_bit": 32})
        else:
            manager.register_module_override(module, "weight", {"lr": 0.1, "optim_bit": 32})
    assert all(option in str(error.value) for option in KNOWN_OPTIONS)
    assert manager.overrides_for(module.weight) == {}


def test_known_options_are_those_of_the_param_groups():
    """Every class's group keys, and no other."""
    found = set()
    for cls in vars(optim).values():
        if isinstance(cls, type) and issubclass(cls, optim.Optimizer) and cls is not optim.Optimizer:
            momentum = {"momentum": 0.9} if "LARS" in cls.__name__ else {}  # which it requires
            found |= cls(params((2, 2)), lr=0.1, **momentum).defaults.keys()
    assert found - {"format_version"} == set(KNOWN_OPTIONS)
    assert set(KNOWN_OPTIONS) >= STATE_OPTIONS


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((), ValueError, "either key and value"),
        (("lr", 0.1, {"lr": 0.1}), ValueError, "either key and value"),
        (("optim_bits",), ValueError, "no value for 'optim_bits'"),
    ],
)
def test_incomplete_overrides_are_refused(manager, arguments, error, match):
    (p,) = params(BIG)
    with pytest.raises(error, match=match):
        manager.override_config(p, *arguments)
    assert manager.overrides_for(p) == {}


def test_what_is_no_parameter_is_refused(manager):
    module = nn.Linear(80, 64)
    for wrong in (module.named_parameters(), ["weight"], [module.weight, None]):
        with pytest.raises(TypeError, match="expected parameters"):
            manager.override_config(wrong, "optim_bits", 32)
    with pytest.raises(TypeError, match="expected parameters"):
        manager.register_parameters(["weight"])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        manager.register_module_override(module.weight, "weight", {"optim_bits": 32})
    with pytest.raises(ValueError, match=r"no parameter 'wieght'.*\['bias', 'weight'\]"):
        manager.register_module_override(module, "wieght", {"optim_bits": 32})
    assert manager.overrides_for(module.weight) == {}
    manager.register_parameters(module.parameters())
    manager.register_parameters([{"params": module.parameters()}])


@pytest.mark.parametrize("value", [4, "8"])
def test_a_bad_value_is_refused_when_it_is_used(manager, value):
    (p,) = params(BIG)
    manager.override_config(p, "optim_bits", value)
    optimizer = AdamW32bit([p])
    with pytest.raises(ValueError, match="optim_bits must be 8 or 32"):
        optimizer.init_state()
    assert not optimizer.state[p]


def test_an_option_of_another_optimizer_is_refused_when_it_is_used(manager):
    """The manager cannot know whose parameter it is; the optimizer does. Nothing changes."""
    (p,) = params(BIG)
    manager.override_config(p, "momentum", 0.9)
    optimizer = AdamW32bit([p])
    with pytest.raises(ValueError, match=r"momentum.*AdamW32bit has no such option"):
        train([p], optimizer, range(1))
    assert_same([p], params(BIG))
