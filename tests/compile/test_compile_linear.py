"""Quantized layers under the compiler: one graph for forward and backward, for every batch size, with eager's bits."""

import functools
import re
from collections.abc import Callable

import expecttest
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import bnbops
from bnbops.nn import Linear4bit, Linear8bitLt
from bnbops.optim import AdamW8bit
from cases.compiled import Step, assert_same, snapshot
from cases.quantized import EMBEDDINGS, IN, LINEARS, OUT, TOKENS, features, gradients, quantized

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
IN_FLOAT32 = [pytest.param(kind, torch.float32, id=kind) for kind in LINEARS]
IN_BFLOAT16 = [
    pytest.param(kind, torch.bfloat16, id=f"{kind} in bfloat16")
    for kind in ("nf4", "nf4 nested", "fp4", "fp4 nested", "int8 with outliers", "experts nested")
]


# ---- one layer each --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), IN_FLOAT32 + IN_BFLOAT16)
def test_one_graph_for_every_batch(kind: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    counters.clear()
    module, counter = quantized(LINEARS[kind]), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for rows in (5, 2, 40):
        x = features(rows, dtype)
        expected = gradients(module, module, x)

        def call(leaf: Tensor) -> Tensor:
            torch._dynamo.mark_dynamic(leaf, 0)
            return compiled(leaf)

        actual = gradients(module, call, x)
        assert all(map(torch.equal, actual, expected)) and actual[0].dtype == dtype and actual[1].abs().max() > 0
    assert counter.frame_count == counters["stats"]["unique_graphs"] == 1


@pytest.mark.every_torch
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_one_graph_for_every_number_of_tokens(kind: str) -> None:
    torch.compiler.reset()
    module, counter = quantized(EMBEDDINGS[kind], torch.bfloat16), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for shape in ((2, 3), (5, 7), (3, 2)):
        tokens = torch.randint(TOKENS, shape)
        assert torch.equal(compiled(tokens), module(tokens)) and compiled(tokens).dtype == torch.bfloat16
    assert counter.frame_count == 1


def test_the_graphs() -> None:
    """Forward reads the packed weight; what it keeps for backward are packed weights and scales, and nothing dense."""
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    model = nn.Sequential(quantized(LINEARS["nf4 nested"]), Linear8bitLt(OUT, 8, False, False, 6.0).to("cpu"))
    model[0].bias = None
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    gradients(model, compiled, features(5))
    expecttest.assert_expected_inline(
        "\nbackward:\n".join(map(readable, graphs)),
        """\
linear_4bit = bnbops.linear_4bit.default
linear_int8_weight_only = bnbops.linear_int8_weight_only.default
return torch.float32[5, 8]
return torch.uint8[48, 32]
return torch.uint8[48, 1]
return torch.int32[1]
return torch.int32[1]
return torch.int32[256]
return torch.int8[8, 48]
return torch.int32[8]

backward:
linear_int8_input_grad = bnbops.linear_int8_input_grad.default
linear_4bit_input_grad = bnbops.linear_4bit_input_grad.default
return torch.float32[5, 64]
""",
    )


def readable(graph: torch.fx.Graph) -> str:
    """Calls and what they return, without the views that read bits as floats."""
    lines = []
    for node in graph.nodes:
        if "bnbops" in str(node.target):
            lines.append(f"{node.name} = {node.target}")
        elif node.op == "output":
            kept = [value for value in node.args[0] if isinstance(value, torch.fx.Node)]
            lines += [f"return {v.meta['val'].dtype}{list(v.meta['val'].shape)}" for v in kept]
    return "\n".join(lines) + "\n"


# ---- a model with adapters -------------------------------------------------------------------------------------


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Classifier(nn.Module):
    """Tokens `[batch, length]` to logits of 8 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, IN)
        self.up = nn.Linear(IN, 128)
        self.down = nn.Linear(128, IN, bias=False)
        self.head = nn.Linear(IN, 8)

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)).mean(1))


def adapted(quant: str = "nf4", dtype: torch.dtype = torch.float32, cls: type[Classifier] = Classifier) -> Classifier:
    """Frozen in 4 bits with double quantization, or in int8, with adapters on both layers of the block."""
    torch.manual_seed(0)
    model = bnbops.nn.quantize_(cls().to(dtype), quant, skip=["head"], embeddings=True, progress=False)
    model.requires_grad_(False)
    model.up, model.down = LoRA(model.up).to(dtype), LoRA(model.down).to(dtype)
    return model


def batches(n: int, rows: tuple[int, ...] = (6,)) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    sizes = [rows[i % len(rows)] for i in range(n)]
    return [(torch.randint(TOKENS, (size, 5)), torch.randint(8, (size,))) for size in sizes]


def training(model: Classifier) -> tuple[Step, AdamW8bit]:
    """8-bit states for the adapters' matrices of 512 elements, 32-bit ones for those of 256."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(adapters, lr=1e-2, min_8bit_size=512)

    def step(tokens: Tensor, classes: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(tokens).float(), classes)
        loss.backward()
        nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, optimizer


def assert_trains_as_eager(
    make: Callable[[], Classifier], data: list[tuple[Tensor, Tensor]], **options: object
) -> None:
    """Bit for bit, in one graph, and only the adapters change."""
    runs = []
    for compiled in (False, True):
        model = make()
        before = snapshot(model)
        step, optimizer = training(model)
        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="aot_eager")
        losses = [step(*batch).item() for batch in data]
        after = snapshot(model, optimizer)
        runs.append((losses, after))
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        assert changed == {f"param {name}" for name, p in model.named_parameters() if p.requires_grad}
    (losses, expected), (compiled_losses, actual) = runs
    assert compiled_losses == losses and len(set(losses)) == len(losses)
    assert_same(actual, expected)
    assert (step.graph_count, step.recompiles) == (1, 0)


@pytest.mark.every_torch
def test_a_step_over_int8_in_bfloat16() -> None:
    assert_trains_as_eager(lambda: adapted("int8", torch.bfloat16), batches(4))


def test_a_step_over_nf4_with_batches_of_any_size() -> None:
    data = batches(4, rows=(6, 3, 17))
    for tensor in (tensor for batch in data for tensor in batch):
        torch._dynamo.mark_dynamic(tensor, 0)
    assert_trains_as_eager(adapted, data)


class Careful(Classifier):
    """Computes in bfloat16 and keeps no activations."""

    def block(self, x: Tensor) -> Tensor:
        return checkpoint(super().block, x, use_reentrant=False)

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(tokens)


@pytest.mark.every_torch
def test_a_step_over_nf4_with_autocast_and_checkpointing() -> None:
    assert_trains_as_eager(lambda: adapted(cls=Careful), batches(3))


def test_inductor_follows_eager() -> None:
    """It fuses what is around the operators, calls each of them once, and makes no tensor of codes."""
    eager, compiled = adapted(), adapted()
    (eager_step, _), (step, optimizer) = training(eager), training(compiled)
    step = bnbops.compiled_train_step(step, optimizer)
    data = batches(4)
    loss, (code,) = run_and_get_code(step, *data[0])
    torch.testing.assert_close(loss, eager_step(*data[0]).detach())
    for batch in data[1:]:
        torch.testing.assert_close(step(*batch), eager_step(*batch).detach())
    assert (step.graph_count, step.recompiles) == (1, 0)
    called = re.findall(r"torch\.ops\.bnbops\.(\w+)\.default\(", code)
    layers = [
        "embedding_4bit",
        "linear_4bit",
        "linear_4bit",
        "linear_4bit_input_grad",
    ]  # of down: nothing trains below up
    assert called == [*layers, "adam_step_", "adam_step_"]
    assert not [line for line in code.splitlines() if "empty_strided" in line and "uint8" in line]


# ---- what else users do ----------------------------------------------------------------------------------------


def mixed(seed: int = 0) -> nn.Module:
    """Both kinds of layers, with biases that train."""
    torch.manual_seed(seed)
    layers = [Linear4bit(IN, 128, quant_type="nf4"), nn.GELU(), Linear8bitLt(128, IN, True, False, 6.0)]
    return nn.Sequential(*layers, nn.Tanh(), Linear4bit(IN, OUT)).to("cpu")


def calls(run: Callable[[], object]) -> dict[str, int]:
    """How often a second run calls each operator; a first one compiles."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    return {event.key.removeprefix("bnbops::"): event.count for event in profiler.key_averages()}


@COMPILED
@REENTRANT
def test_checkpointing_gives_the_same_gradients(reentrant: bool, compiled: bool) -> None:
    torch.compiler.reset()
    model, x = mixed(), features(5)

    def call(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    assert all(map(torch.equal, gradients(model, call, x), gradients(model, model, x)))
    called = calls(lambda: gradients(model, call, x))
    # Forward runs again; a compiler sees that nobody needs what the last layer returns.
    assert (called["linear_4bit"], called["linear_4bit_input_grad"]) == (3 if compiled else 4, 2)


@COMPILED
def test_checkpointing_can_keep_what_the_operators_return(compiled: bool) -> None:
    model, x = mixed(), features(5)
    expected, counts = gradients(model, model, x), []
    for keep in ([], [torch.ops.bnbops.linear_4bit.default, torch.ops.bnbops.linear_int8_weight_only.default]):
        torch.compiler.reset()

        def policy(ctx: object, op: object, *args: object, keep: list = keep, **kwargs: object) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

        def call(x: Tensor, policy: Callable = policy) -> Tensor:
            context = functools.partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(model, x, use_reentrant=False, context_fn=context)

        run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
        assert all(map(torch.equal, gradients(model, run, x), expected))
        called = calls(lambda run=run: gradients(model, run, x))
        counts.append((called["linear_4bit"], called["linear_int8_weight_only"]))
    recomputed, kept = counts
    assert kept[0] < recomputed[0] and kept[1] < recomputed[1] and (not compiled or kept == (2, 1))


@COMPILED
@pytest.mark.parametrize(
    "kind", ["nf4 nested", "int8 with outliers", "int8 of a float weight", "experts", "parametrized"]
)
def test_autocast(kind: str, compiled: bool) -> None:
    """As torch's linear layer: the result and the computation are autocast's, gradients their leaves'."""
    torch.compiler.reset()
    module, x = quantized(LINEARS[kind]), features(5)
    expected, *expected_grads = gradients(module, module, x.bfloat16())

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    actual, *grads = gradients(module, call, x)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)
    assert grads[0].dtype == torch.float32 and torch.equal(grads[0], expected_grads[0].float())
    assert all(map(torch.equal, grads[1:], expected_grads[1:]))


@COMPILED
def test_functional_call(compiled: bool) -> None:
    """The registered tensors are the whole state: those of another model make it that model."""
    torch.compiler.reset()
    model, other, x = mixed(), mixed(seed=1), features(5)
    tensors = {name: t.detach().clone() for name, t in [*other.named_parameters(), *other.named_buffers()]}
    biases = [tensor.requires_grad_() for name, tensor in tensors.items() if name.endswith("bias")]

    def call(x: Tensor) -> Tensor:
        return functional_call(model, tensors, (x,))

    call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    out, x_grad, *_ = gradients(model, call, x)
    actual = [out, x_grad, *(bias.grad for bias in biases)]
    assert all(map(torch.equal, actual, gradients(other, other, x))) and not torch.equal(out, model(x))


def test_grad_modes() -> None:
    torch.compiler.reset()
    model, x = mixed()[:3], features(5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(x), expected)


def test_new_weights_need_no_new_graph() -> None:
    torch.compiler.reset()
    model, counter, x = mixed(), CompileCounterWithBackend("aot_eager"), features(5)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    outs = [compiled(x)]
    for seed, assign in ((1, False), (2, True)):
        other = mixed(seed)
        model.load_state_dict(other.state_dict(), assign=assign)
        outs.append(compiled(x))
        assert torch.equal(outs[-1], other(x)) and not torch.equal(outs[-1], outs[-2])
    assert counter.frame_count == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Linear4bit(IN, 128), Linear8bitLt(128, IN, True, False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_equal_blocks_share_a_graph() -> None:
    """Compiled block by block, as long models are."""
    torch.compiler.reset()
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(3))).to("cpu").requires_grad_(False)
    expected, counter = blocks(features(5)), CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    assert torch.equal(blocks(features(5)), expected) and counter.frame_count == 1


# ---- what is refused -------------------------------------------------------------------------------------------

FROZEN = ["nf4 nested", "int8 with outliers", "experts"]


@pytest.mark.parametrize("kind", FROZEN)
def test_vmap_is_refused(kind: str) -> None:
    """torch would call the operator for each row: slow, and for int8 with other outlier columns than the batch has."""
    torch.compiler.reset()
    module, x = quantized(LINEARS[kind]), features(6).view(2, 3, IN)
    with pytest.raises(
        RuntimeError, match=r"bnbops::\w*linear\w*: vmap is not supported; it takes a batch of any size"
    ):
        torch.vmap(module)(x)
    compiled = torch.compile(lambda x: torch.vmap(module)(x), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="vmap is not supported"):
        compiled(x)


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_vmap_of_embeddings_is_refused(kind: str) -> None:
    module = quantized(EMBEDDINGS[kind], torch.float32)
    with pytest.raises(RuntimeError, match=r"bnbops::\w+: vmap is not supported"):
        torch.vmap(module)(torch.randint(TOKENS, (2, 3)))


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "jacfwd"])
@pytest.mark.parametrize("kind", FROZEN)
def test_derivatives_by_torch_func_are_refused(kind: str, transform: str) -> None:
    """Never zero in silence."""
    module, x = quantized(LINEARS[kind]).requires_grad_(False), features(3)
    calls = {
        "grad": lambda: torch.func.grad(lambda x: module(x).sum())(x),
        "vjp": lambda: torch.func.vjp(module, x),
        "jvp": lambda: torch.func.jvp(module, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(module)(x),
        "jacfwd": lambda: torch.func.jacfwd(module)(x),
    }
    message = r"grad, vjp and jvp are not supported; use torch\.autograd\.grad|vmap is not supported"
    with pytest.raises(RuntimeError, match=message):
        calls[transform]()


def test_torch_func_differentiates_a_float_weight() -> None:
    module, x = quantized(LINEARS["int8 of a float weight"]), features(3)
    weights = dict(module.named_parameters())
    actual = torch.func.grad(lambda w: functional_call(module, w, (x,)).square().sum())(weights)
    _, _, weight, bias = gradients(module, module, x)
    assert torch.equal(actual["weight"], weight) and torch.equal(actual["bias"], bias)


@pytest.mark.parametrize("make", [lambda: Linear4bit(IN, OUT), lambda: Linear8bitLt(IN, OUT, True, False)])
def test_errors_are_those_of_eager(make: Callable[[], nn.Module]) -> None:
    torch.compiler.reset()
    module = make()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"the weight of this Linear\w+ is not quantized"):
        compiled(features(3))
    module.to("cpu")
    with pytest.raises(RuntimeError, match=r"bnbops::linear_\w+: .*x has (shape )?\[3, 63\]"):
        compiled(features(3)[:, :-1].contiguous())
    assert torch.equal(compiled(features(3)), module(features(3)))
