"""What Transformers, PEFT, Accelerate and TRL know of bitsandbytes when bnbops takes its place, and when it leaves."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import accelerate.utils.imports
import peft.import_utils
import pytest
import torch
import transformers.integrations.bitsandbytes
import transformers.utils.import_utils
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import bnbops
from bnbops.alias import repair
from cases import hf

ANSWERS = {
    "accelerate": accelerate.utils.imports.is_bnb_available,
    "accelerate 4 bits": accelerate.utils.imports.is_4bit_bnb_available,
    "accelerate 8 bits": accelerate.utils.imports.is_8bit_bnb_available,
    "accelerate on CPUs": accelerate.utils.imports.is_bitsandbytes_multi_backend_available,
    "peft": peft.import_utils.is_bnb_available,
    "peft 4 bits": peft.import_utils.is_bnb_4bit_available,
    "transformers": transformers.utils.import_utils.is_bitsandbytes_available,
}


@pytest.mark.parametrize("library", ANSWERS)
def test_libraries_answer_anew(library):
    """All of them were asked before."""
    for _ in range(2):
        assert not ANSWERS[library]()
        bnbops.install_as_bitsandbytes()
        try:
            assert ANSWERS[library]()
        finally:
            bnbops.uninstall_as_bitsandbytes()
    assert not ANSWERS[library]()


def test_transformers_reads_the_metadata_anew(monkeypatch):
    read = []
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: read.append("anew") or {})
    mapping = transformers.utils.import_utils._package_distribution_mapping
    mapping()
    read.clear()
    bnbops.install_as_bitsandbytes()
    mapping()
    bnbops.uninstall_as_bitsandbytes()
    assert mapping() == {} and read == ["anew", "anew"]
    mapping.cache_clear()


# ---- modules that hold bitsandbytes ----------------------------------------------------------------------------


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that a module runs when it is imported."""
    for statement in body:
        yield statement
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            for part in ("body", "orelse", "handlers"):
                yield from at_import(getattr(statement, part, []))


@pytest.fixture(scope="module")
def statements() -> dict[str, list[ast.stmt]]:
    """Those of all modules of the libraries that ask for bitsandbytes or import it."""
    found = {}
    for library in ("accelerate", "peft", "transformers", "trl"):
        (folder,) = importlib.util.find_spec(library).submodule_search_locations
        for path in Path(folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if any(mark in text for mark in ("import bitsandbytes", "is_bnb", "is_bitsandbytes")):
                name = ".".join((library, *path.relative_to(folder).with_suffix("").parts))
                found[name] = list(at_import(ast.parse(text).body))
    return found


def imports_it(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Import) and "bitsandbytes" in ast.unparse(statement)


def defines_with_it(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.If)
        and any(mark in ast.unparse(statement.test) for mark in ("is_bnb", "is_bitsandbytes"))
        and any(isinstance(part, ast.ClassDef | ast.FunctionDef) for part in statement.body)
    )


def test_tables_have_all_modules_that_depend_on_bitsandbytes(statements):
    holders = {name for name, body in statements.items() if any(map(imports_it, body))}
    definers = {name for name, body in statements.items() if any(map(defines_with_it, body))}
    assert repair._HOLDERS.keys() == holders
    assert repair._CLASSES.keys() == definers - holders  # the others cannot be imported without one


def without(name: str) -> ModuleType | None:
    """The module as it is without a bitsandbytes; None: it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == "bitsandbytes"
        return None


@pytest.mark.parametrize("name", [name for name in repair._HOLDERS if not name.startswith("trl.")])
def test_modules_get_what_they_lack(name):
    before = without(name)
    assert getattr(before, "bnb", None) is None
    bnbops.install_as_bitsandbytes()
    try:
        module = importlib.import_module(name)
        assert before in (module, None)
        assert module.bnb is importlib.import_module("bitsandbytes")
    finally:
        bnbops.uninstall_as_bitsandbytes()
    assert {**vars(module)}.get("bnb", "nothing") == ("nothing" if name != "peft.helpers" else None)


def test_modules_of_trl_get_what_they_lack(monkeypatch):
    """Stand-ins: these import all of TRL."""
    names = [name for name in repair._HOLDERS if name.startswith("trl.")]
    modules = [ModuleType(name) for name in names]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    bnbops.install_as_bitsandbytes()
    bitsandbytes = importlib.import_module("bitsandbytes")
    assert len(modules) == 2 and all(module.bnb is bitsandbytes for module in modules)
    bnbops.uninstall_as_bitsandbytes()
    assert not any(hasattr(module, "bnb") for module in modules)


@pytest.mark.parametrize("name", repair._CLASSES)
def test_modules_without_classes_get_them(name, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    assert not any(hasattr(module, kind) for kind in repair._CLASSES[name])
    bnbops.install_as_bitsandbytes()
    classes = [getattr(module, kind) for kind in repair._CLASSES[name]]
    bnbops.uninstall_as_bitsandbytes()
    bnbops.install_as_bitsandbytes()
    try:
        assert [getattr(module, kind) for kind in repair._CLASSES[name]] == classes  # and keep them
    finally:
        bnbops.uninstall_as_bitsandbytes()


@pytest.mark.parametrize("method", ["lora", "ia3", "hira", "road", "randlora"])
def test_lazy_names_of_peft(method):
    tuner = importlib.import_module(f"peft.tuners.{method}")
    bnbops.install_as_bitsandbytes()
    try:
        assert issubclass(tuner.Linear4bit, torch.nn.Module) and issubclass(tuner.Linear8bitLt, torch.nn.Module)
    finally:
        bnbops.uninstall_as_bitsandbytes()
    assert getattr(tuner, "Linear4bit", None) is getattr(tuner, "Linear8bitLt", None) is None


def test_a_real_one_takes_over_afterwards(tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes.py").write_text("nn = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    peft.import_utils.is_bnb_available.cache_clear()
    holder = importlib.import_module("peft.helpers")
    bnbops.install_as_bitsandbytes()
    assert holder.bnb.nn is bnbops.nn
    bnbops.uninstall_as_bitsandbytes()
    assert holder.bnb.__file__ == str(tmp_path / "bitsandbytes.py")
    assert peft.import_utils.is_bnb_available()
    monkeypatch.undo()
    del sys.modules["bitsandbytes"]
    repair.withdraw()
    assert not peft.import_utils.is_bnb_available()


# ---- saving again ----------------------------------------------------------------------------------------------


CASES = {
    "llama nf4": (hf.tiny_llama, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "gpt2 fp4, nested": (hf.tiny_gpt2, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
    "mixtral int8": (hf.tiny_mixtral, {"load_in_8bit": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_reloaded_models_save_the_same_bytes(case, as_bitsandbytes, tmp_path):
    model, options = CASES[case]
    first, second = tmp_path / "first", tmp_path / "second"
    folder = hf.saved(model(), tmp_path / "float")
    config = BitsAndBytesConfig(**options)
    hf.saved(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config), first)
    hf.saved(AutoModelForCausalLM.from_pretrained(first), second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


def test_converters_get_their_reverse_whenever_they_are_imported(monkeypatch):
    package, name = transformers.integrations, "transformers.integrations.bitsandbytes"

    def has_reverse(module: ModuleType) -> list[bool]:
        classes = (module.Bnb4bitDeserialize, module.Bnb8bitDeserialize)
        return ["reverse_op" in vars(converter) for converter in classes]

    before = importlib.import_module(name)
    monkeypatch.setattr(package, "bitsandbytes", before)  # restored afterwards
    assert has_reverse(before) == [False, False]
    bnbops.install_as_bitsandbytes()
    try:
        assert has_reverse(before) == [True, True]
        monkeypatch.delitem(sys.modules, name)
        after = importlib.import_module(name)
        assert after is not before and has_reverse(after) == [True, True]
        assert after.Bnb4bitDeserialize(None).reverse_op.convert({"weight": 1}, model=None) == {"weight": 1}
    finally:
        bnbops.uninstall_as_bitsandbytes()
    assert has_reverse(after) == [False, False]
    with pytest.raises(NotImplementedError):
        _ = after.Bnb4bitDeserialize(None).reverse_op
    assert has_reverse(before) == [False, False]


def test_converters_with_a_reverse_of_their_own_keep_it(monkeypatch):
    converter = transformers.integrations.bitsandbytes.Bnb4bitDeserialize
    monkeypatch.setattr(converter, "reverse_op", "its own", raising=False)
    bnbops.install_as_bitsandbytes()
    assert converter.reverse_op == "its own"
    bnbops.uninstall_as_bitsandbytes()
    assert converter.reverse_op == "its own"
