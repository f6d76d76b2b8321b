"""bnbops.nn.parametrize: any parameter of any module in 4 bits."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bnbops.functional as F
from bnbops.nn import forwards
from bnbops.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from cases.layers_4bit import copies, differing, plain_tensors

pytestmark = pytest.mark.every_torch

EXPERTS, IN, OUT = 3, 128, 64
SHAPES = {"up": (EXPERTS, OUT, IN), "odd": (5, 7), "vector": (9,)}


class Experts(nn.Module):
    """A mixture whose experts are one parameter, which it reads once for each expert."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype)))
        self.head = nn.Linear(OUT, OUT, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = sum(x @ self.up[expert].t() for expert in range(EXPERTS))
        return self.head(out) + self.odd.sum() + self.vector.sum()


def replaced(seed: int = 0, names: tuple[str, ...] = tuple(SHAPES), dtype=torch.float32, **options) -> Experts:
    module = Experts(seed, dtype)
    for name in names:
        replace_parameter_4bit(module, name, **options)
    return module


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(1))


OPTIONS = [{}, {"compress_statistics": True}, {"quant_type": "fp4", "blocksize": 32}]
options_of = pytest.mark.parametrize("options", OPTIONS, ids=["default", "nested", "fp4 by 32"])


# ---- reading ---------------------------------------------------------------------------------------------------


@options_of
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reading_dequantizes(dtype, options):
    plain, module = Experts(dtype=dtype), replaced(dtype=dtype, **options)
    for name, shape in SHAPES.items():
        packed, state = F.quantize_4bit(getattr(plain, name).data, **{"quant_type": "nf4"} | options)
        value = getattr(module, name)
        assert value.shape == shape and value.dtype == dtype and not value.requires_grad
        assert torch.equal(value, F.dequantize_4bit(packed, state))
        assert module.parametrizations[name][0].quant_state == state
    assert module.parametrizations.up.original.shape == (EXPERTS, OUT, IN // 2)  # by rows
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


class Dequantizations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.bnbops.dequantize_4bit.default
        return func(*args, **(kwargs or {}))


def test_a_forward_dequantizes_once():
    """For all reads; nothing stays afterwards, also not after an error."""
    module = replaced()
    for _ in range(2):
        with Dequantizations() as calls:
            module(inputs())
        assert calls.count == len(SHAPES)
    with pytest.raises(RuntimeError, match="shape"):
        module(inputs()[:, 1:])
    assert not forwards._forwards.readers
    assert module.up is not module.up


def test_nested_forwards_share():
    """A module that calls itself: the inner call's end is not the outer one's."""

    class Twice(Experts):
        depth = 1

        def forward(self, x: Tensor) -> Tensor:
            if self.depth:
                self.depth = 0
                self(x)
            return super().forward(x)

    module = Twice()
    replace_parameter_4bit(module, "up")
    with Dequantizations() as calls:
        module(inputs())
    assert calls.count == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Without reentry the second forward is left early, by an exception."""
    grads = []
    for checkpointed in (False, True):
        module, x = replaced(), inputs().requires_grad_()
        out = checkpoint(module, x, use_reentrant=reentrant) if checkpointed else module(x)
        out.square().sum().backward()
        grads.append(x.grad)
        assert not forwards._forwards.readers
    assert torch.equal(*grads)


@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
def test_compiles(nested):
    module = replaced(names=("up",), compress_statistics=nested)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for rows in (4, 9):
        results = []
        for run in (module, compiled):
            x = inputs(rows).requires_grad_()
            out = run(x)
            out.square().sum().backward()
            results.append([out, x.grad])
        assert all(map(torch.equal, *results))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    module = replaced(compress_statistics=True)
    program = torch.export.export(module, (inputs(),), strict=strict)
    assert program.state_dict.keys() == plain_tensors(module).keys()
    assert torch.equal(program.module()(inputs()), module(inputs()))


# ---- state dicts -----------------------------------------------------------------------------------------------


@options_of
def test_state_dict(options):
    """bitsandbytes' keys: the packed parameter by its own name, [n, 1], and what describes it."""
    module, expected = replaced(**options), Experts().state_dict()
    for name in SHAPES:
        packed, state = F.quantize_4bit(expected.pop(name), **{"quant_type": "nf4"} | options)
        expected[name] = packed
        expected |= {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    assert differing(module.state_dict(), expected) == []
    model = nn.ModuleDict({"layer": module})
    assert differing(model.state_dict(), {f"layer.{key}": tensor for key, tensor in expected.items()}) == []


@options_of
@pytest.mark.parametrize("target", OPTIONS, ids=["default", "nested", "fp4 by 32"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_loading(target, options, assign):
    """Strictly, into a module whose parameters are in whatever 4-bit format."""
    source, module = nn.Sequential(replaced(**options)), nn.Sequential(replaced(seed=1, **target))
    state = source.state_dict()
    given = copies(state)
    module.load_state_dict(given, assign=assign)
    assert differing(given, state) == [] and differing(module.state_dict(), state) == []
    assert torch.equal(module(inputs()), source(inputs()))
    original = module[0].parametrizations.up.original
    assert (original.data_ptr() == given["0.up"].data_ptr()) == assign


def test_loading_keeps_tensors_that_fit():
    module = replaced(seed=1)
    before = {name: (t, t.data_ptr()) for name, t in plain_tensors(module).items()}
    module.load_state_dict(replaced().state_dict())
    assert all(t is before[name][0] and t.data_ptr() == before[name][1] for name, t in plain_tensors(module).items())


def test_floats_are_quantized():
    module = replaced(seed=1, compress_statistics=True)
    module.load_state_dict(Experts().state_dict())
    assert differing(module.state_dict(), replaced(compress_statistics=True).state_dict()) == []


def test_loading_to_the_meta_device():
    module, source = replaced(seed=1).to("meta"), replaced()
    module.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(module(inputs()), source(inputs()))


def test_safetensors(tmp_path):
    source, module = nn.Sequential(replaced(), replaced(seed=2)), nn.Sequential(replaced(seed=1), replaced(seed=3))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    module.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert differing(module.state_dict(), source.state_dict()) == []


BAD_STATES = {
    "missing": (lambda s: s.pop("up"), 'Missing key.*"up"'),
    "another shape": (lambda s: s.update(up=torch.zeros(2, OUT, IN)), "up: .*shape"),
    "no description": (lambda s: s.pop("up.quant_state.bitsandbytes__nf4"), "up: .*quant_state"),
    "codes cut off": (lambda s: s.update(up=s["up"][:-2]), "up: .*bytes"),
    "unexpected": (lambda s: s.update({"up.other": torch.zeros(1)}), 'Unexpected key.*"up.other"'),
}


@pytest.mark.parametrize("damage", BAD_STATES)
def test_bad_states_are_refused(damage):
    change, message = BAD_STATES[damage]
    state, module = replaced().state_dict(), replaced(seed=1)
    before = copies({key: tensor for key, tensor in module.state_dict().items() if key.startswith("up")})
    change(state)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    if damage != "unexpected":
        after = module.state_dict()
        assert differing({key: after[key] for key in before}, before) == []


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@options_of
def test_prequantized(options, storage):
    """A parameter that holds codes, and the entries of a state dict."""
    module, source = Experts(seed=1), replaced(names=("up",), **options)
    state = source.state_dict()
    codes = state["up"].view(-1).view(storage).view(-1, 1)
    module.up = nn.Parameter(codes, requires_grad=False)
    statistics = {key: tensor for key, tensor in state.items() if key.startswith("up.")}
    keys = list(statistics)
    replace_parameter_4bit_prequantized(module, "up", statistics, torch.device("cpu"))
    assert list(statistics) == keys and torch.equal(module.up, source.up)
    saved = module.half().state_dict()  # the codes are no floats to cast
    assert differing({"up": saved["up"]}, {"up": codes}) == []
    assert torch.equal(module.up, source.up)


# ---- the module ------------------------------------------------------------------------------------------------


def test_copies_and_casts():
    module = replaced(compress_statistics=True)
    twin = copy.deepcopy(module)
    twin.load_state_dict(replaced(seed=1, compress_statistics=True).state_dict())
    assert not torch.equal(twin.up, module.up) and twin.parametrizations.up[0] is not module.parametrizations.up[0]
    before = module.up
    for cast in (module.half, module.bfloat16, module.double, lambda: module.to("cpu", torch.float16)):
        assert torch.equal(cast().up, before)


def test_fsdp():
    """All tensors are sharded together."""
    module = replaced(names=("up",), compress_statistics=True)
    expected = module(inputs())
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        assert torch.equal(module(inputs()), expected)
        assert "parametrizations.up.original" in module.state_dict()
    finally:
        destroy_process_group()


def test_a_second_parametrization():
    """Adapters put theirs behind (PEFT does)."""

    class Plus(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 1

    module = replaced()
    expected, keys = module.up + 1, module.state_dict().keys()
    parametrize.register_parametrization(module, "up", Plus(), unsafe=True)
    assert torch.equal(module.up, expected) and module.state_dict().keys() == keys
    module.load_state_dict(replaced(seed=1).state_dict())
    assert torch.equal(module.up, replaced(seed=1).up + 1)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", AttributeError, "Module does not have parameter 'nothing'"),
        ("head", TypeError, "Parameter 'head' is not an instance of nn.Parameter; it is a Linear"),
        ("up", TypeError, "parametrized already"),
    ],
)
def test_what_cannot_be_replaced(name, error, message):
    module = replaced(names=("up",))
    for replace in (
        lambda: replace_parameter_4bit(module, name),
        lambda: replace_parameter_4bit_prequantized(module, name, {}, "cpu"),
    ):
        with pytest.raises(error, match=message):
            replace()


@pytest.mark.parametrize("options", [{"blocksize": 48}, {"quant_type": "int5"}], ids=str)
def test_a_refused_replacement_changes_nothing(options):
    module = Experts()
    with pytest.raises(ValueError, match=next(iter(options))):
        replace_parameter_4bit(module, "up", **options)
    with pytest.raises(ValueError, match="quant_state"):
        replace_parameter_4bit_prequantized(module, "up", {"absmax": torch.zeros(1)}, "cpu")
    assert not parametrize.is_parametrized(module) and differing(module.state_dict(), Experts().state_dict()) == []
