"""Products with 4-bit weights on a CPU's instruction sets and threads.

`python test_linear_4bit_cpu.py` checks the values alone; a test runs it once per instruction set.
"""

import itertools

import pytest
import torch
from test_isa import ISAS, run
from test_linear_4bit_ops import check_values

import bnbops
from cases.weights_4bit import DTYPES, Weight, normal
from reference import quantize_4bit as ref


@pytest.mark.parametrize("isa", ISAS[: ISAS.index(bnbops.isa())])
def test_values_on_older_instruction_sets(isa):
    process = run(isa, __file__)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == isa


@pytest.mark.parametrize("threads", [2, 3])
def test_values_on_several_threads(threads):
    torch.set_num_threads(threads)
    weight = Weight(515, 384)
    for rows, dtype in itertools.product((1, 3, 20, 100), DTYPES):
        x, grad = normal(rows, 384, seed=1, dtype=dtype), normal(rows, 515, seed=2, dtype=dtype)
        ref.assert_product(weight.linear(x), x, weight.values)
        ref.assert_product(weight.input_grad(grad), grad, weight.values.t())


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_values((1, 9, 40))
    print(bnbops.isa())
