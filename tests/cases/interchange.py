"""bitsandbytes' state dicts, and our optimizers that load and write them."""

import copy

import torch

import bnbops
from bnbops.functional import create_dynamic_map
from cases.optimizers import params
from reference import states as ref

MAPS = {signed: create_dynamic_map(signed) for signed in (True, False)}
NESTED = "__bnb_optimizer_quant_state__"
SHAPES = [(64, 64), (16, 256), (4, 389), (10,)]  # of the golden runs: short rows, whole rows, awkward rows, fp32

# Our states in the order of state1 (two stacked of AdEMAMix) and state2.
STATES = {
    "Adam": (["exp_avg"], ["exp_avg_sq"]),
    "AdamW": (["exp_avg"], ["exp_avg_sq"]),
    "LAMB": (["exp_avg"], ["exp_avg_sq"]),
    "AdEMAMix": (["exp_avg", "exp_avg_slow"], ["exp_avg_sq"]),
    "SGD": (["momentum_buffer"],),
    "LARS": (["momentum_buffer"],),
    "Lion": (["exp_avg"],),
    "RMSprop": (["square_avg"],),
    "Adagrad": (["sum"],),
}
FAMILIES = list(STATES)

# bitsandbytes' checkpoints in tests/golden, by class and dtype.
FAMILIES_8BIT = [f"{name}8bit_float32" for name in FAMILIES]
GOLDEN = [
    *FAMILIES_8BIT,
    *(f"{name}8bit_bfloat16" for name in ("Adam", "AdamW", "SGD", "Lion")),
    *(f"{name}32bit_float32" for name in ("Adam", "AdamW", "SGD", "Lion", "RMSprop", "Adagrad")),
]


def family(name: str) -> str:
    return name.split("_")[0].removesuffix("8bit").removesuffix("32bit")


def fresh(name: str, shapes: list[tuple[int, ...]] = SHAPES, **keywords) -> tuple[bnbops.optim.Optimizer, list]:
    """Our optimizer of the class that wrote a golden state dict, over its parameters, with arguments of its own."""
    p = params(*shapes, dtype=torch.bfloat16 if name.endswith("bfloat16") else torch.float32)
    needed = {"momentum": 0.5} if family(name) in ("SGD", "LARS") else {}
    return getattr(bnbops.optim, name.split("_")[0])(p, **({"lr": 0.7} | needed | keywords)), p


def flat_keys(state_dict: dict) -> dict:
    """As older versions of bitsandbytes wrote it: nothing nested."""
    state_dict = copy.deepcopy(state_dict)
    for state in state_dict["state"].values():
        state.update(state.pop(NESTED))
    return state_dict


def assert_same_bytes(a: dict, b: dict) -> None:
    """Two state dicts of bitsandbytes: same keys, dtypes, shapes, bytes and options."""
    assert a["param_groups"] == b["param_groups"]
    assert a.keys() == b.keys() and a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        other = b["state"][key]
        assert state["step"] == other["step"] and type(state["step"]) is int
        assert state.keys() == other.keys() and state[NESTED].keys() == other[NESTED].keys()
        for name, tensor in state[NESTED].items():
            expected = other[NESTED][name]
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
            # unorm_vec is where a step writes the update's norm; no step reads what was in it.
            assert torch.equal(tensor, expected) or name == "unorm_vec", name


def bitsandbytes_state(shape: tuple[int, ...], seed: int = 0) -> dict:
    """A state of AdamW8bit as bitsandbytes writes it, of any shape."""
    generator = torch.Generator().manual_seed(seed)
    saved = {}
    for number, signed in ((1, True), (2, False)):
        x = torch.randn(shape, generator=generator)
        codes, absmax = ref.encode(x if signed else x.square(), ref.flat_absmax(torch.Size(shape)), MAPS[signed])
        saved |= {f"state{number}": codes, f"absmax{number}": absmax, f"qmap{number}": MAPS[signed]}
    return {"step": 7, NESTED: saved}


def bitsandbytes_dict(*states: dict) -> dict:
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    group |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None, "params": list(range(len(states)))}
    return {"state": dict(enumerate(states)), "param_groups": [group]}
