"""bnbops as bitsandbytes: modules, names and metadata. What libraries make of it: test_hf_alias_libraries.py."""

import copy
import importlib
import importlib.metadata
import importlib.util
import io
import os
import pickle
import pkgutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

import bnbops
from bnbops import functional, nn, optim
from bnbops.alias import finder

ROOT = Path(__file__).parents[2]
# But the integrations, whose import registers them with other libraries.
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "bnbops").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "bnbops").rglob("*.py")
    if path.parts[len(ROOT.parts) + 1] not in ("__init__.py", "integrations")
)
# The modules of bitsandbytes 0.50.2, and names that other libraries take from them.
FAMILIES = ("Adagrad", "Adam", "AdamW", "AdEMAMix", "LAMB", "LARS", "Lion", "RMSprop", "SGD")
PUBLIC = {
    "autograd": (),
    "autograd._functions": ("MatMul4Bit", "MatMul8bitFp", "MatMul8bitLt", "MatmulLtState", "matmul", "matmul_4bit"),
    "functional": (
        *("QuantState", "dequantize_4bit", "int8_vectorwise_dequant", "quantize_4bit", "quantize_blockwise"),
        *("has_avx512bf16", "optimizer_update_32bit", "optimizer_update_8bit_blockwise"),
    ),
    "nn": ("Embedding4bit", "Int8Params", "Linear4bit", "Linear8bitLt", "LinearNF4", "Params4bit", "StableEmbedding"),
    "nn.modules": ("Embedding8bit", "Int8Params", "Linear4bit", "Linear8bitLt", "Params4bit"),
    "nn.parametrize": ("Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"),
    "optim": ("AdamW8bit", "GlobalOptimManager", "PagedAdamW8bit"),
    "optim.optimizer": ("GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"),
    "utils": ("pack_dict_to_tensor", "replace_linear", "sync_gpu", "unpack_tensor_to_dict"),
    **{f"optim.{name.lower()}": (name, f"{name}8bit", f"{name}32bit") for name in FAMILIES},
}
MISSING = (
    *("_ops", "backends", "backends.cpu.ops", "cextension", "consts", "cuda_specs", "diagnostics", "diagnostics.main"),
)


def public_classes() -> list[type]:
    values = [getattr(module, name) for module in (nn, optim) for name in module.__all__]
    return [value for value in values if isinstance(value, type)] + [functional.QuantState, bnbops.MatmulLtState]


# ---- modules ---------------------------------------------------------------------------------------------------


def test_every_module_is_one_object_under_two_names(as_bitsandbytes):
    assert {"nn.int8.module", "optim.families.adamw", "alias.bitsandbytes"} <= {*MODULES}
    assert "meta_kernels" not in MODULES
    for name in (*MODULES, "meta_kernels"):
        module = importlib.import_module(f"bnbops.{name}")
        spec, loader, package = module.__spec__, module.__loader__, module.__package__
        assert importlib.import_module(f"bitsandbytes.{name}") is module
        assert (module.__spec__, module.__loader__, module.__package__) == (spec, loader, package)
        assert module.__name__ == spec.name == f"bnbops.{name}"


def test_no_module_is_loaded_twice(as_bitsandbytes):
    for name in (*MODULES, *PUBLIC):
        importlib.import_module(f"bitsandbytes.{name}")
    loaded = defaultdict(set)
    for module in list(sys.modules.values()):
        if str(getattr(module, "__file__", None)).startswith(str(ROOT / "bnbops")):
            loaded[module.__file__].add(id(module))
    assert len(loaded) >= len(MODULES)
    assert {file for file, modules in loaded.items() if len(modules) > 1} == set()


@pytest.mark.parametrize("name", PUBLIC)
def test_modules_of_bitsandbytes_have_its_names(name, as_bitsandbytes):
    module = importlib.import_module(f"bitsandbytes.{name}")
    assert [public for public in PUBLIC[name] if not hasattr(module, public)] == []
    assert importlib.util.find_spec(f"bitsandbytes.{name}") is not None


@pytest.mark.parametrize("name", MISSING)
def test_modules_that_bnbops_lacks_say_so(name, as_bitsandbytes):
    said = rf"bnbops, installed as bitsandbytes, has no bitsandbytes\.{name.split('.')[0]}: "
    with pytest.raises(ModuleNotFoundError, match=said):
        importlib.import_module(f"bitsandbytes.{name}")


def test_unknown_modules_are_not_found(as_bitsandbytes):
    assert importlib.util.find_spec("bitsandbytes.nowhere") is None
    assert importlib.util.find_spec("bitsandbytes.nn.nowhere") is None
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'bitsandbytes\.nowhere'"):
        importlib.import_module("bitsandbytes.nowhere")


def test_all_ways_to_import(as_bitsandbytes):
    names = {}
    exec(
        "import bitsandbytes, bitsandbytes.optim, bitsandbytes as bnb, bitsandbytes.nn as layers\n"
        "from bitsandbytes import nn, functional as F, matmul_4bit\n"
        "from bitsandbytes.nn.modules import *\n"
        "from bitsandbytes.optim.adamw import AdamW8bit\n",
        names,
    )
    assert names["bitsandbytes"] is names["bnb"] is as_bitsandbytes
    assert names["layers"] is names["nn"] is names["bnb"].nn is nn
    assert names["F"] is functional and names["matmul_4bit"] is bnbops.matmul_4bit
    assert names["Linear4bit"] is nn.Linear4bit and names["AdamW8bit"] is optim.AdamW8bit
    listed = {module.name for module in pkgutil.iter_modules(as_bitsandbytes.__path__, "bitsandbytes.")}
    assert {"bitsandbytes.nn", "bitsandbytes.optim", "bitsandbytes.functional"} <= listed
    assert "bitsandbytes.bnbops" not in listed  # beside the package, in an editable install
    assert names["bnb"].compiled_train_step is bnbops.compiled_train_step  # all that bnbops has, lazily as there
    with pytest.raises(AttributeError, match="nowhere"):
        _ = names["bnb"].nowhere


def test_find_spec_does_not_depend_on_what_was_imported(as_bitsandbytes):
    before = importlib.util.find_spec("bitsandbytes.optim")
    importlib.import_module("bitsandbytes.optim")
    assert before.submodule_search_locations is not None
    assert importlib.util.find_spec("bitsandbytes.optim") is optim.__spec__


# ---- what it says of itself ------------------------------------------------------------------------------------


def test_versions(as_bitsandbytes):
    assert as_bitsandbytes.__version__ == importlib.metadata.version("bitsandbytes") == "0.50.2"
    assert bnbops.__version__ == importlib.metadata.version("bnbops") != "0.50.2"
    assert importlib.metadata.version("BitsAndBytes") == "0.50.2"
    assert importlib.metadata.distribution("bitsandbytes").read_text("top_level.txt") == "bitsandbytes\n"
    assert importlib.metadata.metadata("bitsandbytes")["Name"] == "bitsandbytes"
    assert importlib.metadata.requires("bitsandbytes") is importlib.metadata.files("bitsandbytes") is None


def test_devices_are_those_that_have_kernels(as_bitsandbytes):
    assert as_bitsandbytes.features is bnbops.features == {"multi_backend"}
    devices = {"cpu", "cuda"} if bnbops.has_cuda else {"cpu"}
    assert as_bitsandbytes.supported_torch_devices is bnbops.supported_torch_devices == devices


def test_classes_are_of_bitsandbytes(as_bitsandbytes):
    assert str(optim.AdamW8bit) == "<class 'bitsandbytes.optim.adamw.AdamW8bit'>"
    assert str(nn.Linear4bit) == "<class 'bitsandbytes.nn.modules.Linear4bit'>"
    for value in public_classes():
        assert value.__module__.startswith("bitsandbytes."), value
        assert pickle.loads(pickle.dumps(value)) is value


def test_kinds_of_optimizers(as_bitsandbytes):
    from bitsandbytes.optim.optimizer import Optimizer1State, Optimizer2State, Optimizer8bit

    parameters = [torch.nn.Parameter(torch.zeros(2))]
    adamw, lion = optim.AdamW8bit(parameters), optim.PagedLion8bit(parameters)
    assert isinstance(adamw, Optimizer8bit) and isinstance(lion, Optimizer8bit)
    assert isinstance(adamw, Optimizer2State) and not isinstance(adamw, Optimizer1State)
    assert isinstance(lion, Optimizer1State) and not isinstance(lion, Optimizer2State)
    assert issubclass(Optimizer2State, Optimizer8bit)
    with pytest.raises(NotImplementedError, match=r"Optimizer2State: .* derive from one of them"):
        Optimizer2State("adam", parameters)


def test_autograd_classes_compute(as_bitsandbytes):
    from bitsandbytes.autograd._functions import MatMul4Bit, MatMul8bitLt, MatmulLtState

    x, weight = torch.randn(3, 64, requires_grad=True), torch.randn(5, 64)
    packed, state = functional.quantize_4bit(weight)
    for got, expected in (
        (MatMul4Bit.apply(x, packed, None, None, state), bnbops.matmul_4bit(x, packed, state)),
        (MatMul8bitLt.apply(x, weight, None, None, MatmulLtState()), bnbops.matmul(x, weight)),
    ):
        assert torch.equal(got, expected)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)))


def test_utils(as_bitsandbytes):
    from bitsandbytes.utils import replace_linear, sync_gpu

    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 4)}))
    weight, head = model[0].weight, model[1]["lm_head"]
    assert replace_linear(model, nn.LinearNF4, copy_weights=True) is model
    assert type(model[0]) is nn.LinearNF4 and model[1]["lm_head"] is head
    assert torch.equal(model[0].weight.data, weight.data)
    assert model.to("cpu")[0].weight.bnb_quantized
    sync_gpu(weight)


# ---- objects that outlive the name -----------------------------------------------------------------------------


def quantized() -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.Linear4bit(64, 64, quant_type="nf4"), nn.Linear8bitLt(64, 8, has_fp16_weights=False))
    return model.to("cpu")


def saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_state_dicts_know_nothing_of_it(as_bitsandbytes):
    """They load with weights_only=True, with the name and without it."""
    model, x = quantized(), torch.randn(4, 64)
    weights = [torch.nn.Parameter(torch.randn(64, 64))]
    optimizer = optim.AdamW8bit(weights)
    weights[0].grad = torch.randn(64, 64)
    optimizer.step()
    files = saved(model.state_dict()), saved(optimizer.state_dict())
    expected, states = model(x), optimizer.state[weights[0]]
    for _ in range(2):
        state_dict, optimizer_dict = (torch.load(io.BytesIO(file.getvalue()), weights_only=True) for file in files)
        again = quantized()
        again.load_state_dict(state_dict)
        assert torch.equal(again(x), expected)
        other = optim.AdamW8bit(weights)
        other.load_state_dict(optimizer_dict)
        assert all(torch.equal(other.state[weights[0]][name], value) for name, value in states.items())
        bnbops.uninstall_as_bitsandbytes()


def test_copies_and_pickles(as_bitsandbytes):
    model, x = quantized(), torch.randn(4, 64)
    expected = model(x)
    for again in (copy.deepcopy(model), torch.load(saved(model), weights_only=False)):
        assert torch.equal(again(x), expected)
        assert type(again[0].weight) is nn.Params4bit and type(again[1].weight) is nn.Int8Params
    with_old_names = pickle.dumps(model)
    bnbops.uninstall_as_bitsandbytes()
    assert torch.equal(copy.deepcopy(model)(x), expected)
    with pytest.raises(ModuleNotFoundError, match="bitsandbytes"):
        pickle.loads(with_old_names)


def test_compiled_code_stays(as_bitsandbytes):
    model, x = quantized(), torch.randn(4, 64)

    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        y = as_bitsandbytes.matmul_4bit(x, model[0].weight.data, model[0].weight.quant_state)
        return model(x), y, isinstance(model[0], as_bitsandbytes.nn.Linear4bit)

    expected = model(x)
    with torch.no_grad():
        got = run(x)
        assert torch.equal(got[0], expected) and got[2]
        bnbops.uninstall_as_bitsandbytes()
        assert torch.equal(run(x)[1], got[1])


# ---- install and uninstall -------------------------------------------------------------------------------------


def surroundings() -> tuple[object, ...]:
    modules = [bnbops, *(importlib.import_module(f"bnbops.{name}") for name in ("alias.autograd", "nn", "optim"))]
    return (
        [*sys.meta_path],
        {name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"},
        [{**vars(module)}.keys() for module in modules],
        [value.__module__ for value in public_classes()],
        [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitsandbytes::")],
        hasattr(torch.ops.bitsandbytes, "gemm_4bit"),
    )


def test_uninstall_leaves_nothing():
    before = surroundings()
    bnbops.install_as_bitsandbytes()
    for name in PUBLIC:
        importlib.import_module(f"bitsandbytes.{name}")
    installed = surroundings()
    assert all(now != then for now, then in zip(installed, before, strict=True))
    bnbops.install_as_bitsandbytes()
    assert surroundings() == installed
    for _ in range(2):
        bnbops.uninstall_as_bitsandbytes()
        assert surroundings() == before
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("bitsandbytes")


def test_refuses_where_the_real_one_is_imported(monkeypatch):
    real = ModuleType("bitsandbytes")
    real.__file__ = "/somewhere/bitsandbytes/__init__.py"
    monkeypatch.setitem(sys.modules, "bitsandbytes", real)
    before = surroundings()
    with pytest.raises(ImportError, match=r"already imported, from /somewhere/bitsandbytes/__init__\.py: call bnbops"):
        bnbops.install_as_bitsandbytes()
    bnbops.uninstall_as_bitsandbytes()
    assert surroundings() == before and sys.modules["bitsandbytes"] is real


def test_shadows_one_that_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("__version__ = '0.1'\n")
    (tmp_path / "bitsandbytes-0.1.dist-info").mkdir()
    (tmp_path / "bitsandbytes-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    bnbops.install_as_bitsandbytes()
    try:
        assert importlib.import_module("bitsandbytes").nn is nn
        assert importlib.metadata.version("bitsandbytes") == "0.50.2"
    finally:
        bnbops.uninstall_as_bitsandbytes()
    assert importlib.import_module("bitsandbytes").__version__ == importlib.metadata.version("bitsandbytes") == "0.1"
    del sys.modules["bitsandbytes"]


# ---- child processes -------------------------------------------------------------------------------------------

CHILD = """
import importlib.metadata, importlib.util, os, site, sys
from pathlib import Path

folder, variable = Path(sys.argv[1]), "BNBOPS_INSTALL_AS_BITSANDBYTES"
(folder / "bnbops.pth").write_text(Path(sys.argv[2]).read_text())
before = [*sys.meta_path]
site.addsitedir(folder)
assert sys.meta_path == before, "without the variable"

os.environ[variable] = "1"
site.addsitedir(folder)
site.addsitedir(folder)  # as in a venv
assert len(sys.meta_path) == len(before) + 1, "once"
assert importlib.util.find_spec("bitsandbytes").name == "bitsandbytes"
assert importlib.metadata.version("bitsandbytes") == "0.50.2"
assert not {"torch", "bnbops"} & {*sys.modules}, "nothing is loaded yet"

import transformers.integrations.bitsandbytes as integration  # imports bitsandbytes, in the middle of its own import
import bnbops.alias.finder
import bitsandbytes

assert sys.modules["bitsandbytes"] is integration.bnb is bnbops.alias.bitsandbytes
assert bnbops.alias.finder.FINDER in sys.meta_path and len(sys.meta_path) >= len(before) + 1
assert "bitsandbytes" in str(bitsandbytes.optim.AdamW8bit), "installed"
assert integration.Bnb4bitDeserialize(None).reverse_op, "completed"
bnbops.install_as_bitsandbytes()
bnbops.uninstall_as_bitsandbytes()
assert importlib.util.find_spec("bitsandbytes") is None and not hasattr(integration, "bnb")
print("all is well")
"""


def test_environment_variable_installs_it_in_child_processes(tmp_path):
    section = (ROOT / "pyproject.toml").read_text().partition('path = "bnbops.pth"')[2]
    line = section.split('"""')[1].replace("\\\n", "")
    (tmp_path / "pth.txt").write_text(line)
    command = [sys.executable, "-c", CHILD, tmp_path, tmp_path / "pth.txt"]
    environment = {name: value for name, value in os.environ.items() if name != "BNBOPS_INSTALL_AS_BITSANDBYTES"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.stdout, done.stderr) == ("all is well\n", "")


def test_finder_needs_the_standard_library_alone():
    script = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'torch', 'bnbops'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script, finder.__file__], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
