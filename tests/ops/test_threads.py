"""Several threads at once: each result has the bits that one thread alone gives, and no thread sees another's mode."""

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnbops
import bnbops.functional as F
from bnbops.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt, LinearNF4, StableEmbedding
from bnbops.nn.parametrize import replace_parameter_4bit
from bnbops.optim import GlobalOptimManager
from bnbops.optim.core import manager

THREADS, ROUNDS = 4, 30


@pytest.fixture(autouse=True)
def _many_switches() -> Iterator[None]:
    """Threads alternate after every few bytecodes, and each computes on one core."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Starts them together. Their results, or the first exception."""
    start = threading.Barrier(len(functions))
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def run(index: int, function: Callable[[], Any]) -> None:
        try:
            start.wait(30)
            results[index] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


def repeated(function: Callable[[], Any], rounds: int = ROUNDS) -> Callable[[], list[Any]]:
    return lambda: [function() for _ in range(rounds)]


# ---- layers ------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Reads its parameter once for each expert, and stops in between where a test asks for it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Parameter(torch.randn(3, 32, 64))
        replace_parameter_4bit(self, "up", compress_statistics=True)
        self.pause: Callable[[], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.up[0].t()
        if (pause := self.pause) is not None:
            self.pause = None
            pause()
        return out + x @ self.up[1].t() + x @ self.up[2].t()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: LinearNF4(64, 32),
    "fp4": lambda: Linear4bit(64, 32, compress_statistics=False),
    "int8": lambda: Linear8bitLt(64, 32, has_fp16_weights=False, threshold=2.0),
    "int8 of floats": lambda: Linear8bitLt(64, 32, threshold=2.0),
    "embedding nf4": lambda: Embedding4bit(32, 64, quant_type="nf4"),
    "embedding int8": lambda: Embedding8bit(32, 64),
    "experts": Experts,
}


def layer(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = LAYERS[kind]().to("cpu")
    return module, torch.tensor([1, 3, 1]) if isinstance(module, nn.Embedding) else torch.randn(3, 64)


def trained(module: nn.Module, x: Tensor) -> list[Tensor]:
    """A forward and a backward. The module's own gradients stay alone: threads would add to the same ones."""
    x = x.clone().requires_grad_(x.is_floating_point())
    out = module(x)
    leaves = [leaf for leaf in (x, *module.parameters()) if leaf.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out.square().sum(), leaves) if leaves else ())]


def inferred(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_threads_share_a_layer(kind: str) -> None:
    """Some train, some infer, one saves, one moves it to where it is."""
    module, x = layer(kind)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    expected = trained(module, x)
    training = repeated(lambda: all(map(torch.equal, trained(module, x), expected)))
    inference = repeated(lambda: torch.equal(inferred(module, x), expected[0]))
    saving = repeated(lambda: all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items()))
    moving = repeated(lambda: module.to("cpu") is module)
    assert all(map(all, in_threads(training, inference, training, inference, saving, moving)))


@pytest.mark.parametrize("kind", LAYERS)
def test_loading_what_is_there_disturbs_no_inference(kind: str) -> None:
    """(It fails a backward that is under way, as in torch: the weight has been written.)"""
    module, x = layer(kind)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    expected = inferred(module, x)
    inference = repeated(lambda: torch.equal(inferred(module, x), expected))
    loading = repeated(lambda: not any(module.load_state_dict(state)))
    assert all(map(all, in_threads(inference, loading, inference)))


def paused(
    module: Experts, x: Tensor, run: Callable[[Experts, Tensor], Any], meanwhile: Callable[[], Any]
) -> list[Any]:
    """What `run` gives in a thread that is in the middle of a forward while this one does something else."""
    inside, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        inside.set()
        assert go_on.wait(60)

    def other() -> Any:
        try:
            assert inside.wait(60)
            return meanwhile()
        finally:
            go_on.set()

    module.pause = pause
    return in_threads(lambda: run(module, x), other)


def test_a_value_of_inference_mode_stays_in_its_thread() -> None:
    module, x = layer("experts")
    expected = trained(module, x)
    out, found = paused(module, x, inferred, lambda: trained(module, x))
    assert torch.equal(out, expected[0]) and all(map(torch.equal, found, expected))


def test_a_value_of_inference_mode_stays_in_it() -> None:
    """In one thread: a forward within a forward."""
    module, x = layer("experts")
    expected = trained(module, x)
    module.pause = lambda: inferred(module, x)
    assert all(map(torch.equal, trained(module, x), expected))
    found = []

    def train() -> None:
        with torch.inference_mode(False):
            found.extend(trained(module, x))

    module.pause = train
    assert torch.equal(inferred(module, x), expected[0])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_during_a_forward_count(assign: bool) -> None:
    """Those of another thread's forward, and the rest of this one's."""
    module, x = layer("experts")
    other = Experts(seed=1)
    expected = inferred(other, x)
    state = other.state_dict()

    def load() -> Tensor:
        module.load_state_dict(state, assign=assign)
        return inferred(module, x)

    before = x @ module.up[0].t()
    mixed, found = paused(module, x, inferred, load)
    assert torch.equal(found, expected)
    assert torch.equal(mixed, before + x @ other.up[1].t() + x @ other.up[2].t())
    assert torch.equal(inferred(module, x), expected)


def test_an_interrupted_forward_leaves_nothing_in_the_way() -> None:
    module, x = layer("experts")
    expected, other = inferred(Experts(seed=1), x), Experts(seed=1).state_dict()

    def interrupt() -> None:
        raise KeyboardInterrupt

    module.pause = interrupt
    with pytest.raises(KeyboardInterrupt):
        module(x)
    module.load_state_dict(other)
    assert torch.equal(inferred(module, x), expected)


# ---- functions ---------------------------------------------------------------------------------------------------


def _there_and_back(seed: int) -> list[Tensor]:
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))
    codes, state = F.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
    bytes_, blockwise = F.quantize_blockwise(x)
    rows, scales, _ = F.int8_vectorwise_quant(x)
    return [
        *(codes, F.dequantize_4bit(codes, state), bytes_, F.dequantize_blockwise(bytes_, blockwise)),
        *(rows, F.int8_vectorwise_dequant(rows, scales), bnbops.matmul_4bit(x, codes, state), bnbops.matmul(x, x)),
    ]


def test_functions() -> None:
    expected = [_there_and_back(seed) for seed in range(THREADS)]
    runs = in_threads(*(repeated(lambda seed=seed: _there_and_back(seed)) for seed in range(THREADS)))
    for run, values in zip(runs, expected, strict=True):
        assert all(all(map(torch.equal, each, values)) for each in run)


# ---- optimizers --------------------------------------------------------------------------------------------------

OPTIMIZERS = sorted(name for name in bnbops.optim.__all__ if name.endswith("8bit") and not name.startswith("Paged"))
OPTIONS: dict[str, dict[str, Any]] = {"clipping": {"percentile_clipping": 90}, "paged": {"is_paged": True}}


def _training(name: str, seed: int, **options: Any) -> list[Tensor]:
    """A few steps of a model of one's own; its parameters and states."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((64, 80), (7,))]
    optimizer = getattr(bnbops.optim, name)(params, lr=1e-2, min_8bit_size=1, **options)
    for _ in range(5):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
    states = [tensor for param in params for tensor in optimizer.state[param].values()]
    return [tensor.detach().clone() for tensor in (*params, *states)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_several_threads(name: str) -> None:
    options = {"momentum": 0.9} if name.startswith(("SGD", "LARS", "RMSprop")) else {}
    expected = [_training(name, seed, **options) for seed in range(THREADS)]
    runs = in_threads(
        *(repeated(lambda seed=seed: _training(name, seed, **options), rounds=4) for seed in range(THREADS))
    )
    for run, values in zip(runs, expected, strict=True):
        assert all(all(map(torch.equal, each, values)) for each in run)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_optimizers_in_several_threads(options: str) -> None:
    def run(seed: int) -> list[Tensor]:
        return _training("AdamW8bit", seed, **OPTIONS[options])

    expected = [run(seed) for seed in range(THREADS)]
    for found, values in zip(in_threads(*(lambda s=s: run(s) for s in range(THREADS))), expected, strict=True):
        assert all(map(torch.equal, found, values))


def test_overrides_come_and_go_while_optimizers_step() -> None:
    """Embeddings override options as they are made, and collecting them takes the overrides back."""
    expected = _training("AdamW8bit", 0)
    keys = [nn.Parameter(torch.randn(4, 4)) for _ in range(20)]
    manager = GlobalOptimManager.get_instance()

    def override() -> None:
        for key in keys:
            manager.override_config(key, "lr", 0.5)
            manager.override_config(nn.Parameter(torch.randn(2)), "optim_bits", 32)

    def embed() -> None:
        for _ in range(40):
            module = StableEmbedding(5, 4)
            manager.register_module_override(module, "weight", {"lr": 0.25})
            optimizer = bnbops.optim.AdamW8bit([module.weight])
            assert manager.overrides_for(module.weight) == {"optim_bits": 32, "lr": 0.25}
            del optimizer

    step = repeated(lambda: all(map(torch.equal, _training("AdamW8bit", 0), expected)), rounds=20)
    results = in_threads(step, repeated(override, rounds=40), step, embed, embed)
    assert all(results[0]) and all(results[2])
    assert all(manager.overrides_for(key) == {"lr": 0.5} for key in keys)


def test_options_of_one_module_from_several_threads() -> None:
    """None is lost."""
    manager, modules = GlobalOptimManager.get_instance(), [nn.Linear(2, 2) for _ in range(50)]
    names = ["lr", "eps", "weight_decay", "min_8bit_size"]

    def override(name: str) -> None:
        for module in modules:
            manager.register_module_override(module, "weight", {name: 0.5})
            manager.override_config(module.bias, name, 0.5)

    in_threads(*(lambda name=name: override(name) for name in names))
    for module in modules:
        assert manager.overrides_for(module.weight) == manager.overrides_for(module.bias) == dict.fromkeys(names, 0.5)


def test_there_is_one_manager_for_threads_that_ask_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them makes it, and takes its time."""
    making = threading.Barrier(2)

    class Slow(manager.WeakSet):
        def __init__(self) -> None:
            making.wait(60)
            threading.Event().wait(0.05)
            super().__init__()

    def first() -> GlobalOptimManager:
        return GlobalOptimManager.get_instance()

    def second() -> GlobalOptimManager:
        making.wait(60)
        found = GlobalOptimManager.get_instance()
        assert found.overrides() == {} and found._optimizers is not None
        return found

    monkeypatch.setattr(GlobalOptimManager, "_instance", None)
    monkeypatch.setattr(manager, "WeakSet", Slow)
    one, other = in_threads(first, second)
    assert one is other is GlobalOptimManager.get_instance()


# ---- compiled steps ----------------------------------------------------------------------------------------------


def test_compiled_steps_of_several_threads() -> None:
    def train(seed: int, compiled: bool) -> list[Tensor]:
        model = nn.Linear(8, 8)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        optimizer = bnbops.optim.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=1)

        def step(x: Tensor) -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        call = bnbops.compiled_train_step(step, optimizer, backend="eager") if compiled else step
        for _ in range(3):
            call(torch.randn(4, 8, generator=generator))
        return [param.detach() for param in model.parameters()]

    torch.compiler.reset()
    expected = [train(seed, compiled=False) for seed in range(2)]
    found = in_threads(*(lambda seed=seed: train(seed, compiled=True) for seed in range(2)))
    for run, values in zip(found, expected, strict=True):
        assert all(map(torch.equal, run, values))
    assert not torch._dynamo.config.trace_autograd_ops


def test_a_step_while_another_thread_compiles() -> None:
    """torch tells the whole process that it compiles, for as long as it does."""
    compiling, stepped = threading.Event(), threading.Event()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        compiling.set()
        assert stepped.wait(60)
        return graph.forward

    def compile_something() -> None:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))

    def step() -> list[Tensor]:
        param = nn.Parameter(torch.ones(8, 8))
        param.grad = torch.full((8, 8), 0.5)
        optimizer = bnbops.optim.LAMB8bit([param], min_8bit_size=1)
        optimizer.step()
        return [param.detach(), optimizer.state[param]["step"]]

    def step_meanwhile() -> list[Tensor]:
        assert compiling.wait(60)
        try:
            return step()
        finally:
            stepped.set()

    torch.compiler.reset()
    _, found = in_threads(compile_something, step_meanwhile)
    assert all(map(torch.equal, found, step()))


# ---- switches of the process ---------------------------------------------------------------------------------------


def test_installing_as_bitsandbytes_from_several_threads() -> None:
    """One of them does it; what is undone is what there was."""
    before, finders = bnbops.optim.AdamW8bit.__module__, list(sys.meta_path)
    for _ in range(5):
        in_threads(*[bnbops.install_as_bitsandbytes] * THREADS)
        assert bnbops.optim.AdamW8bit.__module__ == "bitsandbytes.optim.adamw"
        assert len(sys.meta_path) == len(finders) + 1
        in_threads(*[bnbops.uninstall_as_bitsandbytes] * THREADS)
        assert bnbops.optim.AdamW8bit.__module__ == before and sys.meta_path == finders


# ---- the first use -----------------------------------------------------------------------------------------------


def test_threads_that_import_and_compute_first() -> None:
    """In a fresh process, where nothing is loaded, chosen or cached yet."""
    script = """
        import sys, threading
        import torch
        sys.setswitchinterval(1e-6)
        start, results, errors = threading.Barrier(4), [], []

        def first(seed):
            try:
                start.wait(60)
                import bnbops
                x = torch.arange(256 * 64, dtype=torch.float32).view(256, 64).sin()
                layer = bnbops.nn.LinearNF4(64, 32)
                with torch.no_grad():
                    layer.weight.copy_(x[:32]); layer.bias.zero_()
                out = layer.to("cpu")(x)
                param = torch.nn.Parameter(x.clone()); param.grad = x.cos()
                bnbops.optim.AdamW8bit([param], lr=1e-2).step()
                ids = id(bnbops.optim.GlobalOptimManager.get_instance())
                results.append((bnbops.isa(), ids, out.double().sum().item(), param.double().sum().item()))
            except BaseException as error:
                errors.append(repr(error))

        threads = [threading.Thread(target=first, args=(seed,)) for seed in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not errors, errors
        assert len(results) == 4 and len(set(results)) == 1, results
        print("one result")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert run.stdout == "one result\n", run.stderr[-2000:]
