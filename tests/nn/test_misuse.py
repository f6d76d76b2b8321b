"""What a quantized layer inherits from torch, and cannot do; and state dicts that are not what they should be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbops.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    StableEmbedding,
)
from bnbops.nn.parametrize import replace_parameter_4bit
from cases.layers_4bit import differing

IN, OUT = 64, 32


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, OUT, IN))
        replace_parameter_4bit(self, "weight", compress_statistics=True)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "4 bits": lambda: Linear4bit(IN, OUT, quant_type="nf4", compress_statistics=False),
    "nested": lambda: LinearNF4(IN, OUT),
    "fp4": lambda: LinearFP4(IN, OUT, quant_storage=torch.float16),
    "8 bits": lambda: Linear8bitLt(IN, OUT, has_fp16_weights=False),
    "embedding, 4 bits": lambda: Embedding4bit(OUT, IN, quant_type="nf4"),
    "embedding, nested": lambda: EmbeddingNF4(OUT, IN, compress_statistics=True),
    "embedding, fp4": lambda: EmbeddingFP4(OUT, IN),
    "embedding, 8 bits": lambda: Embedding8bit(OUT, IN),
}
TYPES = {"parameter": Experts, **MODULES}  # with a layer that is none


def made(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return TYPES[kind]().to("cpu")


module_of = pytest.mark.parametrize("kind", MODULES)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# ---- methods -----------------------------------------------------------------------------------------------------


@module_of
def test_reset_parameters(kind: str) -> None:
    module = made(kind)
    before = snapshot(module)
    with pytest.raises(
        RuntimeError, match=rf"the weight of this {type(module).__name__} is quantized.*load a state dict"
    ):
        module.reset_parameters()
    assert differing(snapshot(module), before) == []
    module.apply(lambda each: None)
    fresh = MODULES[kind]()
    fresh.weight.data.zero_()
    fresh.reset_parameters()
    assert fresh.weight.any()


@pytest.mark.parametrize("shape", [(OUT + 1, IN), (OUT, IN + 64)], ids=str)
@module_of
def test_a_weight_of_another_size(kind: str, shape: tuple[int, int]) -> None:
    """As code does that resizes embeddings by hand."""
    module = made(kind)
    before = snapshot(module)
    size = shape if isinstance(module, nn.Embedding) else shape[::-1]
    message = rf"weight.* has shape \[{shape[0]}, {shape[1]}\], but this {type(module).__name__} needs \[{OUT}, {IN}\]"
    for parameter in (nn.Parameter(torch.randn(shape)), type(module)(*size).to("cpu").weight):
        with pytest.raises(ValueError, match=message):
            module.weight = parameter
        assert differing(snapshot(module), before) == []


@pytest.mark.parametrize("kind", ["embedding, 4 bits", "embedding, nested", "embedding, fp4", "embedding, 8 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_pretrained(kind: str, dtype: torch.dtype) -> None:
    table, indices = torch.randn(OUT, IN).to(dtype), torch.tensor([[3, 5]])
    cls = type(made(kind))
    module = cls.from_pretrained(table, padding_idx=3).to("cpu")
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (OUT, IN, 3)
    expected = cls(OUT, IN, dtype=dtype)
    expected.weight.data.copy_(table)
    assert torch.equal(module(indices), expected.to("cpu")(indices)) and module(indices).dtype == dtype
    for options, message in (
        ({"freeze": False}, "freeze=False: the table of an Embedding.* is quantized"),
        ({"max_norm": 1.0}, "max_norm=1.0: the table"),
    ):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(table, **options)
    with pytest.raises(ValueError, match=r"2 dimensions, got shape \[2048\]"):
        cls.from_pretrained(table.view(-1))


@pytest.mark.parametrize("cls", [Embedding, StableEmbedding])
def test_float_embeddings_from_pretrained(cls: type[nn.Embedding]) -> None:
    table = torch.randn(OUT, IN)
    module = cls.from_pretrained(table, freeze=False, padding_idx=3)
    assert torch.equal(module.weight, table) and module.weight.requires_grad and module.padding_idx == 3


def test_options_of_from_pretrained() -> None:
    module = Embedding4bit.from_pretrained(torch.randn(OUT, IN), quant_type="nf4", blocksize=32).to("cpu")
    assert (module.quant_state.quant_type, module.quant_state.blocksize) == ("nf4", 32)


@module_of
def test_double(kind: str) -> None:
    """Only activations could be float64, and a quantized product has none."""
    module = made(kind)
    codes = module.weight.data.clone()
    module.double()
    assert torch.equal(module.weight.data.view(torch.uint8), codes.view(torch.uint8))
    if isinstance(module, nn.Embedding):
        assert module(torch.tensor([1])).isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16, got float64"):
            module(torch.randn(3, IN, dtype=torch.float64))


@module_of
def test_a_quantized_weight_cannot_be_quantized_again(kind: str) -> None:
    module = made(kind)
    before = snapshot(module)
    with pytest.raises(TypeError, match=f"'weight' of this {type(module).__name__} is quantized"):
        replace_parameter_4bit(module, "weight")
    assert differing(snapshot(module), before) == []


# ---- state dicts -------------------------------------------------------------------------------------------------


State = dict[str, Any]


def _averaged(state: State) -> State:
    return {key: value.float() if key != "bias" else value for key, value in state.items()}


def _changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[State], State]:
    def changed(state: State) -> State:
        key = next(key for key in state if key == name or key.startswith(f"weight.{name}"))
        return state | {key: change(state[key])}

    return changed


def _without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key not in (name, f"weight.{name}")}


def _floats(change: Callable[[Tensor], Any]) -> Callable[[State], State]:
    """A float weight instead of the quantized one."""

    def floats(state: State) -> State:
        sizes = (3, OUT, IN) if state["weight"].nbytes == 3 * OUT * IN // 2 else (OUT, IN)
        return {"weight": change(torch.randn(sizes))} | {key: value for key, value in state.items() if key == "bias"}

    return floats


def _with_first(value: float) -> Callable[[Tensor], Tensor]:
    def with_first(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return with_first


def _text(text: str) -> Callable[[Tensor], Tensor]:
    return lambda _: torch.tensor(list(text.encode()), dtype=torch.uint8)


NUMBERS = "quantized entries cannot be averaged or cast: do that with the float weights"
NO_MAGNITUDES = "has (values|scales) that are negative, infinite or NaN"
IN_4_BITS: dict[str, tuple[Callable[[State], State], str]] = {
    "averaged": (_averaged, f"weight: quant_state.*expected uint8.*{NUMBERS}"),
    "codes averaged": (
        _changed("weight", lambda codes: codes.half() / 2),
        rf"weight: (the codes are torch.float16 .* needs \d+; {NUMBERS}|.*)",
    ),
    "codes of 64 bits": (_changed("weight", Tensor.long), "weight: the codes are torch.int64"),
    "no description": (_without("quant_state.bitsandbytes__nf4"), "quant_state.bitsandbytes__nf4"),
    "a list": (_changed("quant_state", _text("[]")), "weight: quant_state.* of a list"),
    "junk": (_changed("quant_state", _text("{]")), "weight: quant_state.* is not the JSON text"),
    "half a description": (
        _changed("quant_state", _text("{}")),
        "there is no blocksize, dtype, .* in the quantization state",
    ),
    "few scales": (_changed("absmax", lambda t: t[1:]), r"weight: .*absmax has \d+ elements, but shape"),
    "another codebook": (_changed("quant_map", lambda t: t / 2), "weight: the quant_map is not that of"),
    "no absmax": (_without("absmax"), "weight: there is no absmax"),
    "no codebook": (_without("quant_map"), "weight: there is no quant_map"),
    "no tensor": (_changed("absmax", lambda t: 1.0), "weight: absmax must be a tensor, got float"),
    "no weight": (_without("weight"), 'Missing key.*"weight"'),
    "a number": (_changed("weight", lambda t: 3.0), "weight: expected a tensor, got float"),
    "one too many": (lambda state: state | {"weight.other": torch.zeros(1)}, 'Unexpected.*"weight.other"'),
    "NaN floats": (_floats(_with_first(torch.nan)), "weight: NaN and infinite values cannot"),
    "bools": (_floats(lambda t: t > 0), "weight: expected floats of shape .*, got torch.bool"),
    "another shape": (_floats(lambda t: t[..., 1:]), r"weight: expected floats of shape \[.*64\].*63\]"),
}
SIMPLY = {
    "NaN": (_changed("absmax", _with_first(torch.nan)), f"weight: absmax {NO_MAGNITUDES}"),
    "infinite": (_changed("absmax", _with_first(torch.inf)), f"weight: absmax {NO_MAGNITUDES}"),
    "negative": (_changed("absmax", Tensor.neg), f"weight: absmax {NO_MAGNITUDES}"),
}
NESTED = {
    "NaN": (_changed("nested_absmax", _with_first(torch.nan)), f"weight: nested_absmax {NO_MAGNITUDES}"),
    "negative": (_changed("nested_absmax", Tensor.neg), f"weight: nested_absmax {NO_MAGNITUDES}"),
    "scales as floats": (_changed("absmax", Tensor.float), f"absmax is torch.float32, expected uint8.*{NUMBERS}"),
    "no second codebook": (_without("nested_quant_map"), "there is no nested_quant_map"),
    "no second scales": (_without("nested_absmax"), "codes of scales, but there is no nested_absmax"),
}
IN_8_BITS = {
    "averaged": (_averaged, f"weight must be int8.* it is torch.float32 with SCB; {NUMBERS}"),
    "codes of 64 bits": (_changed("weight", Tensor.long), "weight must be int8.* it is torch.int64 with SCB"),
    "NaN": (_changed("SCB", _with_first(torch.nan)), f"SCB {NO_MAGNITUDES}"),
    "negative": (_changed("SCB", Tensor.neg), f"SCB {NO_MAGNITUDES}"),
    "integers": (_changed("SCB", Tensor.int), "SCB is torch.int32, expected float scales"),
    "few scales": (_changed("SCB", lambda t: t[1:]), f"SCB has {OUT - 1} scales, but the weight has {OUT} rows"),
    "no tensor": (_changed("SCB", lambda t: 1.0), "SCB must be a tensor, got float"),
    "no scales": (_without("SCB"), "weight must be int8 with its scales in SCB.*int8 without SCB"),
    "another layout": (_changed("weight_format", lambda t: t + 1), "weight_format is 1; only weights by rows"),
    "two layouts": (_changed("weight_format", lambda t: t.new_zeros(2)), r"weight_format is \[0, 0\]; only"),
    "no weight": (_without("weight"), "SCB came without weight"),
    "a number": (_changed("weight", lambda t: 3.0), "weight must be a tensor, got float"),
    "one too many": (lambda state: state | {"weight.other": torch.zeros(1)}, 'Unexpected.*"weight.other"'),
    "NaN floats": (_floats(_with_first(torch.nan)), "weight: .*float16 cannot hold"),
    "bools": (_floats(lambda t: t > 0), "weight must be int8.* torch.bool without SCB"),
    "another shape": (_floats(lambda t: t[..., 1:]), "size mismatch for weight"),
}
BAD = {
    "4 bits": IN_4_BITS | SIMPLY,
    "nested": IN_4_BITS | NESTED,
    "parameter": IN_4_BITS | NESTED,
    "embedding, 4 bits": IN_4_BITS | SIMPLY,
    "8 bits": IN_8_BITS,
    "embedding, 8 bits": IN_8_BITS,
}


@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind, table in BAD.items() for what in table])
def test_bad_state_dicts(kind: str, what: str) -> None:
    change, message = BAD[kind][what]
    state, module = made(kind, seed=1).state_dict(), made(kind)
    before = snapshot(module)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(change(dict(state)))
    if what != "one too many":  # after which torch has loaded the others
        assert set(differing(snapshot(module), before)) <= {"bias"}


@pytest.mark.parametrize("kind", BAD)
def test_a_number_is_not_assigned(kind: str) -> None:
    change, message = BAD[kind]["a number"]
    with pytest.raises(RuntimeError, match=message):
        made(kind).load_state_dict(change(dict(made(kind, seed=1).state_dict())), assign=True)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("4 bits", "8 bits", "weight is quantized to 4 bits, which a Linear4bit or an Embedding4bit loads"),
        ("nested", "8 bits", "weight is quantized to 4 bits"),
        ("8 bits", "4 bits", "got torch.int8 .*int8 codes are for a Linear8bitLt or an Embedding8bit"),
        ("embedding, 8 bits", "embedding, nested", "int8 codes are for a Linear8bitLt or an Embedding8bit"),
        ("embedding, 4 bits", "embedding, 8 bits", "weight is quantized to 4 bits"),
    ],
)
def test_state_dicts_of_another_class(source: str, target: str, message: str) -> None:
    module = made(target)
    weight = module.dequantized()
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(made(source).state_dict())
    assert torch.equal(module.dequantized(), weight)
