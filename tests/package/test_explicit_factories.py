"""No tensor that the package makes depends on torch's default dtype or device: every factory call names both."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("bnbops", "meta_kernels") for path in (ROOT / package).rglob("*.py"))

# Functions of torch that make a tensor from no tensor. (`*_like` and `Tensor.new_*` take both from one.)
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_quantized", "empty_strided", "eye", "full"),
    *("linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor"),
    *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window", "normal", "zeros"),
    *("tril_indices", "triu_indices", "sparse_coo_tensor", "sparse_csr_tensor", "complex", "polar"),
}
LAYERS = {"Linear", "LayerNorm", "Embedding", "Conv1d", "Conv2d", "Bilinear", "RMSNorm", "MultiheadAttention"}
# What asks for the defaults, or makes tensors of the default dtype, whatever else it is told.
DEFAULTS = {
    "get_default_dtype",
    "get_default_device",
    "set_default_dtype",
    "set_default_device",
    "Tensor",
    "FloatTensor",
}

# Where the default is meant: by file and call.
ALLOWED = {
    ("bnbops/functional/four_bit.py", "torch.get_default_device()"): "get_4bit_type(device=None), as it says",
    ("bnbops/nn/four_bit/parameter.py", "torch.empty(0)"): "a parameter without data, as nn.Parameter() makes it",
    ("bnbops/nn/int8/parameter.py", "torch.empty(0)"): "a parameter without data, as nn.Parameter() makes it",
}


def complaint(call: ast.Call) -> str | None:
    """What a call leaves to torch's defaults, or None."""
    match call.func:
        case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name in DEFAULTS:
            return "depends on the defaults"
        case ast.Attribute(value=ast.Name(id="torch"), attr="where"):
            both = all(isinstance(argument, ast.Constant) for argument in call.args[1:]) and len(call.args) == 3
            return "two Python numbers become a tensor of the default dtype" if both else None
        case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name in FACTORIES:
            wanted = ("dtype", "device")
        case ast.Attribute(value=ast.Name(id="nn"), attr=name) if name in LAYERS:
            wanted = ("dtype", "device")
        case ast.Attribute(value=ast.Name(id="nn"), attr="Parameter") if not call.args:
            wanted = ("data",)
        case _:
            return None
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for name in wanted:
        if name not in given:
            return f"without {name}="
        if any(isinstance(node, ast.Constant) and node.value is None for node in ast.walk(given[name])):
            return f"with a {name} that may be None"
    return None


def found(source: str) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (why := complaint(node)) is not None:
            yield node.lineno, ast.unparse(node), why


def test_factories_name_dtype_and_device():
    complaints, used = [], set()
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        for line, call, why in found(path.read_text()):
            if (name, call) in ALLOWED:
                used.add((name, call))
            else:
                complaints.append(f"{name}:{line}: {call}: {why}")
    assert complaints == []
    assert used == set(ALLOWED), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    "source",
    [
        *(
            "torch.tensor(1.0)",
            "torch.empty(3, device='meta')",
            "torch.zeros(2, dtype=dtype)",
            "torch.get_default_dtype()",
        ),
        *("torch.zeros(2, dtype=torch.uint8, device=x.device if x else None)", "torch.where(mask, 1.0, 0.0)"),
        *(
            "nn.Linear(2, 3, device=device)",
            "nn.Parameter()",
            "torch.Tensor([1])",
        ),
    ],
)
def test_a_call_that_leaves_something_to_the_defaults_is_noticed(source):
    assert len(list(found(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        *("torch.tensor(1.0, dtype=torch.float32, device='cpu')", "torch.zeros_like(x)", "x.new_empty(3)"),
        *("torch.where(mask, x, 0.0)", "nn.Parameter(x)", "torch.stack([x])"),
    ],
)
def test_others_are_not(source):
    assert list(found(source)) == []
