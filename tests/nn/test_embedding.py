"""bnbops.nn.Embedding and StableEmbedding: bitsandbytes' behaviour, and 32-bit states however the module came to be."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import bnbops
from bnbops.nn import Embedding, StableEmbedding
from bnbops.optim import AdamW8bit
from bnbops.optim.core.manager import GlobalOptimManager

CLASSES = [Embedding, StableEmbedding]
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
SIZE = (64, 80)  # enough for 8-bit states
INDICES = torch.tensor([[1, 5, 0], [63, 5, 2]])


def state_dtype(weight: Tensor, *others: Tensor) -> torch.dtype:
    """Of the state that an 8-bit optimizer builds for a weight."""
    optimizer = AdamW8bit([weight, *others])
    optimizer.init_state()
    return optimizer.state[weight]["exp_avg"].dtype


# ---- constructor and forward -----------------------------------------------------------------------------------


@classes
def test_arguments_reach_torch(cls):
    module = cls(10, 4, 3, 1.5, 1.0, True, True, None, "meta", torch.float64, _freeze=True)
    found = (module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq, module.sparse)
    assert found == (3, 1.5, 1.0, True, True)
    assert module.weight.is_meta and module.weight.dtype == torch.float64 and not module.weight.requires_grad
    assert cls(10, 4, device="meta").weight.requires_grad
    assert all(p.is_meta for p in module.parameters())


@classes
def test_initial_values(cls):
    """Xavier uniform, the padding row zero; the same draws as bitsandbytes'."""
    torch.manual_seed(3)
    module = cls(*SIZE, padding_idx=-2)
    torch.manual_seed(3)
    expected = nn.init.xavier_uniform_(torch.empty(SIZE))
    expected[62] = 0
    assert torch.equal(module.weight, expected)
    module.weight.data.fill_(7)
    torch.manual_seed(3)
    module.reset_parameters()
    assert torch.equal(module.weight, expected)


def test_embedding_looks_up():
    module = Embedding(*SIZE, padding_idx=1)
    assert torch.equal(module(INDICES), module.weight[INDICES])
    module(INDICES).sum().backward()
    assert torch.equal(module.weight.grad[:6, 0], torch.tensor([1.0, 0, 1, 0, 0, 2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["constructed", "cast"])
def test_stable_embedding_is_a_normalized_embedding(how, dtype):
    """(x - mean) / sqrt(var + eps) * weight + bias in fp32 or more, rounded once to the weight's dtype."""
    module = StableEmbedding(*SIZE, dtype=dtype) if how == "constructed" else StableEmbedding(*SIZE).to(dtype)
    with torch.no_grad():
        module.norm.weight.uniform_(0.5, 2.0)
        module.norm.bias.normal_()
    norm_dtype = torch.promote_types(dtype, torch.float32)
    assert module.norm.weight.dtype == (norm_dtype if how == "constructed" else dtype)
    out = module(INDICES)
    assert out.dtype == module.weight.dtype == dtype and out.shape == (2, 3, 80)

    rows = module.weight.detach().double()[INDICES]
    variance, mean = torch.var_mean(rows, -1, correction=0, keepdim=True)
    normalized = (rows - mean) / (variance + module.norm.eps).sqrt()
    expected = normalized * module.norm.weight.double() + module.norm.bias.double()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=4 * unit, atol=4 * unit)

    out.float().square().sum().backward()
    assert module.weight.grad.dtype == dtype and module.weight.grad.isfinite().all()
    assert set(module.weight.grad.abs().sum(-1).nonzero().flatten().tolist()) == {0, 1, 2, 5, 63}


def test_low_precision_does_not_reach_the_norm():
    """A bf16 module normalizes in fp32: the output is the fp32 module's, rounded."""
    low = StableEmbedding(*SIZE, dtype=torch.bfloat16)
    high = StableEmbedding(*SIZE, _weight=low.weight.detach().float())
    assert torch.equal(low(INDICES), high(INDICES).bfloat16())


@classes
def test_max_norm_scales_the_rows_that_are_looked_up(cls):
    module = cls(*SIZE, max_norm=0.5)
    module(INDICES)
    norms = module.weight.norm(dim=1)
    assert (norms[INDICES] <= 0.5 + 1e-6).all() and (norms[10:60] > 0.5).all()


@classes
def test_from_pretrained(cls):
    """torch's classmethod, which passes _freeze: frozen unless asked otherwise."""
    weight = torch.randn(SIZE)
    frozen, module = cls.from_pretrained(weight), cls.from_pretrained(weight, freeze=False, padding_idx=3)
    assert type(frozen) is cls and not frozen.weight.requires_grad and module.weight.requires_grad
    assert torch.equal(module.weight, weight) and module.padding_idx == 3
    assert state_dtype(module.weight) == torch.float32


@classes
def test_trains_in_one_graph(cls):
    """The bits of eager."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(cls(*SIZE, padding_idx=5), nn.Linear(80, 64))
        optimizer = AdamW8bit(model.parameters(), lr=0.1)

        def step(indices: Tensor, model: nn.Module = model, optimizer: AdamW8bit = optimizer) -> Tensor:
            loss = (model(indices) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="aot_eager")
        results.append(([step(INDICES).item() for _ in range(3)], list(model.state_dict().values())))
    assert step.graph_count == 1 and results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


@classes
def test_sparse_gradients_are_refused_by_the_optimizer(cls):
    module = cls(*SIZE, sparse=True)
    module(INDICES).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdamW8bit(module.parameters()).step()


# ---- state dicts -----------------------------------------------------------------------------------------------


@classes
def test_state_dict(cls):
    """The keys of bitsandbytes, hence also its files; strict in both directions."""
    module, fresh = cls(*SIZE), cls(*SIZE)
    keys = ["weight", "norm.weight", "norm.bias"] if cls is StableEmbedding else ["weight"]
    assert list(module.state_dict()) == keys
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(INDICES), module(INDICES))
    if cls is Embedding:
        nn.Embedding(*SIZE).load_state_dict(module.state_dict())


# ---- 32-bit states ---------------------------------------------------------------------------------------------


def torch_saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_swapped_parameters(module: nn.Module) -> nn.Module:
    """Cast where torch puts new parameters into the module."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return module.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def with_exchanged_contents(module: nn.Module) -> nn.Module:
    """Cast where torch exchanges the parameters' contents, which it refuses for weakly referenced ones."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def materialized(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("meta").to_empty(device="cpu")


WAYS = {
    "as it is": lambda module: module,
    "deepcopy": copy.deepcopy,
    "deepcopy twice": lambda module: copy.deepcopy(copy.deepcopy(module)),
    "deepcopy in a model": lambda module: copy.deepcopy(nn.Sequential(module, nn.Linear(80, 8)))[0],
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": torch_saved,
    "half": lambda module: module.half(),
    "deepcopy to bfloat16": lambda module: copy.deepcopy(module).to(torch.bfloat16),
    "new parameters": with_swapped_parameters,
    "exchanged contents": with_exchanged_contents,
    "meta, to_empty": materialized,
    "share_memory": lambda module: module.share_memory(),
}


@pytest.mark.parametrize("way", WAYS)
@classes
def test_32bit_states_however_the_module_came_to_be(cls, way):
    module = WAYS[way](cls(*SIZE))
    plain = nn.Parameter(torch.zeros(SIZE))
    assert type(module) is cls and state_dtype(module.weight, plain) == torch.float32
    assert state_dtype(plain) == torch.uint8


def test_32bit_states_of_another_process(tmp_path):
    """Unpickled where no embedding was ever built."""
    torch.save([cls(*SIZE) for cls in CLASSES], tmp_path / "modules.pt")
    code = (
        "import sys, torch, bnbops\n"
        "for module in torch.load(sys.argv[1], weights_only=False):\n"
        "    optimizer = bnbops.optim.AdamW8bit(module.parameters())\n"
        "    optimizer.init_state()\n"
        "    print(optimizer.state[module.weight]['exp_avg'].dtype)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "modules.pt")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.split() == ["torch.float32"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@classes
def test_32bit_states_under_fsdp(cls, dtype):
    """fully_shard puts DTensors into the module; its norm, in fp32, needs a group of its own beside a bf16 weight."""
    model = nn.Sequential(cls(*SIZE, dtype=dtype), nn.Linear(80, 64, dtype=dtype))
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in ([model[0].norm] if cls is StableEmbedding else []) + [model[0], model]:
            fully_shard(module, mesh=mesh)
        optimizer = AdamW8bit(model.parameters())
        model(INDICES[0]).float().square().mean().backward()
        optimizer.step()
        embedding, other = (optimizer.state[module.weight] for module in model)
        assert isinstance(model[0].weight, DTensor) and isinstance(embedding["exp_avg"], DTensor)
        assert (embedding["exp_avg"].dtype, other["exp_avg"].dtype) == (torch.float32, torch.uint8)
    finally:
        destroy_process_group()


@classes
def test_32bit_states_of_a_weight_put_there_later(cls):
    module = cls(*SIZE)
    module.weight = nn.Parameter(torch.randn(SIZE))
    assert state_dtype(module.weight) == torch.float32
    module.load_state_dict({key: tensor.clone() for key, tensor in module.state_dict().items()}, assign=True)
    assert state_dtype(module.weight) == torch.float32


@classes
def test_tied_weights(cls):
    """Whichever module owns the parameter, also in a copy: one parameter, one 32-bit state, one step."""
    model = nn.ModuleDict({"embedding": cls(*SIZE), "head": nn.Linear(80, 64, bias=False)})
    model.head.weight = model.embedding.weight
    model = copy.deepcopy(model)
    assert model.head.weight is model.embedding.weight
    optimizer = AdamW8bit(model.parameters(), lr=0.1)
    before = model.head.weight.detach().clone()
    model.head(model.embedding(INDICES)).square().mean().backward()
    optimizer.step()
    state = optimizer.state[model.head.weight]
    assert state["exp_avg"].dtype == torch.float32 and state["step"] == 1
    assert not torch.equal(model.embedding.weight, before)
    model.embedding.weight = nn.Parameter(torch.zeros(SIZE))  # untied: the head's is a weight like others
    assert state_dtype(model.head.weight) == torch.uint8


@classes
def test_an_override_of_the_weight_wins(cls):
    """What a person says of this parameter counts more than the module's rule."""
    module = cls(*SIZE)
    GlobalOptimManager.get_instance().override_config(module.weight, "optim_bits", 8)
    assert state_dtype(module.weight) == torch.uint8


@classes
def test_copies_of_a_module_in_training_do_not_warn(cls):
    module = cls(*SIZE)
    optimizer = AdamW8bit(module.parameters())
    optimizer.init_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.copy(module)
        copy.deepcopy((module, optimizer))
        optimizer, module = copy.deepcopy((optimizer, module))
    assert optimizer.state[module.weight]["exp_avg"].dtype == torch.float32


@classes
def test_modules_are_not_kept_alive(cls):
    manager = GlobalOptimManager.get_instance()
    before = len(manager._modules)
    modules = [cls(*SIZE) for _ in range(3)]
    modules += copy.deepcopy(modules)
    assert len(manager._modules) == before + 6
    del modules
    assert len(manager._modules) == before


@classes
def test_trains(cls):
    """Ten 8-bit-optimizer steps of a bf16 model are those of an optimizer with 32-bit states, as all are small."""
    results = []
    for optimizer_class in (bnbops.optim.AdamW8bit, bnbops.optim.AdamW32bit):
        torch.manual_seed(0)
        module = cls(*SIZE, dtype=torch.bfloat16)
        optimizer = optimizer_class(module.parameters(), lr=0.1)
        losses = []
        for _ in range(10):
            loss = (module(INDICES).float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        results.append(module.weight.detach())
    assert torch.equal(*results)
