"""What a step refuses: with a clear message, and before any tensor has changed, whichever group or call is at fault."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bnbops.optim import SGD, AdamW, AdamW8bit, LAMB8bit, Optimizer
from cases.optimizer_classes import CLASSES, FAMILIES, build
from cases.optimizers import assert_same, flat_state, params, set_grads, train

SHAPES = [(64, 80), (5, 7), (64, 100), (3,)]  # two with 8-bit states, two with 32-bit states


def two_groups(name: str = "AdamW8bit", **options: object) -> tuple[list[nn.Parameter], Optimizer]:
    p = params(*SHAPES)
    optimizer = build(name, [{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.1}], **options)
    train(p, optimizer, range(2))
    set_grads(p, 7)
    return p, optimizer


def assert_refused(p: list[nn.Parameter], optimizer: Optimizer, match: str, error: type = RuntimeError) -> None:
    before = copy.deepcopy([x.detach() for x in p])
    state = {key: (x, x.clone()) for key, x in flat_state(optimizer).items()}
    versions = [x._version for x in p]
    with pytest.raises(error, match=match):
        optimizer.step()
    assert_same([x.detach() for x in p], before)
    assert flat_state(optimizer).keys() == state.keys()
    assert all(x is flat_state(optimizer)[key] and torch.equal(x, copy) for key, (x, copy) in state.items())
    assert [x._version for x in p] == versions


# ---- gradients and parameters ----------------------------------------------------------------------------------


def sparse(p: Tensor) -> None:
    p.grad = torch.zeros_like(p).to_sparse()


def complex_(p: Tensor) -> None:
    p.data = p.detach().to(torch.complex64)
    p.grad = torch.zeros_like(p)


def double(p: Tensor) -> None:
    p.data = p.detach().double()
    p.grad = torch.zeros_like(p)


def half_gradient(p: Tensor) -> None:
    p.grad = None
    p.grad_dtype = torch.float16
    p.grad = torch.zeros_like(p, dtype=torch.float16)


def another_shape(p: Tensor) -> None:
    p.data = torch.zeros(*p.shape, 2)
    p.grad = torch.zeros_like(p)


BAD_PARAMETERS: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "sparse gradient": (sparse, "does not support sparse gradients"),
    "complex": (complex_, "must be float32, bfloat16 or float16, got complex"),
    "float64": (double, "must be float32, bfloat16 or float16, got float64"),
    "gradient of another dtype": (half_gradient, r"must be float32 .its parameter's dtype. or float32, got float16"),
    "parameter of another shape": (another_shape, "but its parameter has"),
}


@pytest.mark.parametrize("which", range(len(SHAPES)))
@pytest.mark.parametrize("case", BAD_PARAMETERS)
def test_bad_parameters_and_gradients(case, which):
    """The last call's parameters are at fault as well as the first one's."""
    change, match = BAD_PARAMETERS[case]
    p, optimizer = two_groups()
    change(p[which])
    assert_refused(p, optimizer, match)


@pytest.mark.parametrize("options", [{}, {"percentile_clipping": 50}], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_refuses(name, options):
    """Norms, trust ratios and the history of norms come after the checks."""
    p, optimizer = two_groups(name, lr=1e-2, **options)
    double(p[3])
    assert_refused(p, optimizer, "params.* must be float32, bfloat16 or float16, got .*float64")


def test_a_sparse_embedding():
    embedding = nn.Embedding(100, 64, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer = AdamW8bit(embedding.parameters())
    assert_refused(list(embedding.parameters()), optimizer, "sparse gradients; use a dense embedding")


def test_a_half_precision_model_goes_on():
    """model.half() after training: states are not the parameter's dtype, so nothing is wrong."""
    p, optimizer = two_groups()
    for x in p:
        x.grad = None
        x.data = x.detach().half()
    train(p, optimizer, range(2, 3))
    assert all(x.dtype == torch.float16 and x.isfinite().all() for x in p)


# ---- states ----------------------------------------------------------------------------------------------------

BAD_STATES: dict[str, tuple[int, str, Callable[[Tensor], Tensor], str]] = {
    "shape, in the first call": (0, "exp_avg", lambda x: x[:-1], "exp_avg.*has shape"),
    "shape": (2, "exp_avg", lambda x: x[:-1], "exp_avg.*has shape"),
    "dtype": (3, "exp_avg_sq", lambda x: x.bfloat16(), "exp_avg_sq.*must be float32"),
    "codes as floats": (2, "exp_avg", lambda x: x.float(), "must be uint8"),
    "short scales": (2, "exp_avg_absmax", lambda x: x[:, :0], "exp_avg_absmax.*has shape"),
    "strides": (2, "exp_avg", lambda x: x.t().contiguous().t(), "must be contiguous"),
    "step": (1, "step", lambda x: x.repeat(2), "steps.*must have one element"),
    "history": (3, "gnorm_vec", lambda x: x[:50], r"gnorm_vec.* must .*\[100\]"),
    "dtype of the history": (0, "gnorm_vec", lambda x: x.double(), "gnorm_vec.*must be float32"),
}


@pytest.mark.parametrize("case", BAD_STATES)
@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit"])
def test_bad_states(name, case):
    which, key, change, match = BAD_STATES[case]
    p, optimizer = two_groups(name, percentile_clipping=50)
    optimizer.state[p[which]][key] = change(optimizer.state[p[which]][key])
    assert_refused(p, optimizer, match)


def test_states_that_overlap():
    p, optimizer = two_groups()
    optimizer.state[p[3]]["exp_avg"] = optimizer.state[p[3]]["exp_avg_sq"]
    assert_refused(p, optimizer, "overlap|share|same memory")


# ---- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", math.nan), ("betas", (0.9, 1.0)), ("eps", math.nan), ("weight_decay", -1.0), ("percentile_clipping", 101)],
    ids=str,
)
def test_bad_values_in_a_group(option, value, bits):
    """Whether given to a group or set between steps, a bad value is refused before anything is written."""
    with pytest.raises(ValueError, match=option.rstrip("s")):
        AdamW([{"params": params((64, 80)), option: value}])
    p, optimizer = two_groups("AdamW", optim_bits=bits)
    optimizer.param_groups[1][option] = value
    assert_refused(p, optimizer, option, RuntimeError if option == "lr" else ValueError)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("SGD", "momentum", -0.5), ("SGD", "dampening", math.nan), ("RMSprop", "alpha", 1.0),
        ("RMSprop", "momentum", math.nan), ("Adagrad", "lr_decay", -1.0), ("LAMB", "max_unorm", -1.0),
        ("LARS", "max_unorm", math.nan), ("AdEMAMix", "alpha", -1.0), ("AdEMAMix", "t_alpha", -1),
        ("Lion", "betas", (2, 0)),
    ],
)  # fmt: skip
def test_bad_values_of_each_family(name, option, value):
    p, optimizer = two_groups(name, lr=1e-2)
    optimizer.param_groups[1][option] = value
    assert_refused(p, optimizer, option, ValueError)


def test_a_group_that_is_refused_is_not_added():
    optimizer = SGD(params((4, 4)), lr=0.1)
    extra = params((2, 2))
    for option, value in (("momentum", -1), ("lr", -1.0), ("optim_bits", 7), ("nesterov", True)):
        with pytest.raises(ValueError, match=option):
            optimizer.add_param_group({"params": extra, option: value})
    assert len(optimizer.param_groups) == 1


def test_paged_states_of_parameters_elsewhere():
    p = [nn.Parameter(torch.empty(64, 80, device="meta"))]
    optimizer = build("PagedAdamW8bit", p)
    with pytest.raises(ValueError, match="is_paged=True needs parameters on the CPU or a CUDA device, got one on meta"):
        optimizer.init_state()
    assert not optimizer.state[p[0]]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_state_dict_of_another_family(name):
    p = params((64, 80))
    optimizer = build(name, p)
    train(p, optimizer, range(1))
    for other in (build(other, params((64, 80))) for other in FAMILIES):
        if other._state_names() != optimizer._state_names():
            with pytest.raises(ValueError, match=r"is it of another optimizer|its keys do not fit"):
                other.load_state_dict(optimizer.state_dict())


def test_lamb_measures_nothing_that_it_refuses():
    """lamb_squared_norms runs first: its refusal, too, leaves the history of norms alone."""
    p, optimizer = two_groups("LAMB8bit", percentile_clipping=50)
    assert isinstance(optimizer, LAMB8bit)
    double(p[0])
    assert_refused(p, optimizer, "got float64")
