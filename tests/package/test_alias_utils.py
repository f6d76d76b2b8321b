"""`bitsandbytes.utils`, as bnbops has it."""

import torch
from torch import nn

from bnbops.alias import utils
from bnbops.nn import Linear4bit


def test_replace_linear():
    torch.manual_seed(0)
    released = []

    class Old(nn.Linear):
        def release(self, module: nn.Module) -> None:
            released.append(module)

    model = nn.Sequential(Old(4, 5), nn.ModuleDict({"inner": Old(5, 6, bias=False), "lm_head": Old(6, 2)}))
    old, inner, head = model[0], model[1]["inner"], model[1]["lm_head"]
    kept = old.weight
    assert utils.replace_linear(model, Linear4bit, copy_weights=True, post_processing_function="release") is model
    assert released == [old, inner] and model[1]["lm_head"] is head
    assert type(model[0]) is type(model[1]["inner"]) is Linear4bit
    assert torch.equal(model[0].weight, kept) and model[0].bias is not None and model[1]["inner"].bias is None
    utils.replace_linear(model, nn.Linear, skip_modules=(), post_processing_function="release")
    assert [type(m) for m in (model[0], model[1]["inner"], model[1]["lm_head"])] == [nn.Linear] * 3
    assert not torch.equal(model[0].weight, kept)


def test_formats_and_devices():
    inverse = utils.INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING
    assert {inverse[number]: number for number in inverse} == utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING
    assert inverse[0] == "row"
    assert utils.sync_gpu(torch.zeros(1)) is None  # which nothing runs on
    assert utils.unpack_tensor_to_dict(tensor_data=utils.pack_dict_to_tensor(source_dict={"a": [1]})) == {"a": [1]}
