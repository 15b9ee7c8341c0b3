"""Shapes in signatures: wrong ones fail while the tests run, and cost a user nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

import shapes
from moespresso.core.format import Format
from moespresso.formats import QuantizedWeights, product
from moespresso.kernels import conditioning, neurons


@pytest.mark.parametrize(
    "hessians",
    [torch.ones(2, 3, 4), torch.ones(3, 3), torch.ones(2, 3, 3, dtype=torch.int64)],
    ids=["not square", "no stack", "integers"],
)
def test_a_wrong_tensor_is_refused(hessians: torch.Tensor):
    with pytest.raises(TypeCheckError, match="hessians"):
        conditioning.damped_factors(hessians, 0.01)


def test_axes_of_one_name_are_of_one_size():
    with pytest.raises(TypeCheckError, match="right"):
        product(torch.ones(2, 5, 3), torch.ones(2, 4, 7))
    with pytest.raises(TypeCheckError, match="squares"):
        neurons.energy(torch.ones(2, 5, 3), torch.ones(2, 5))


def test_fields_are_checked_as_well():
    values = torch.zeros(1, 2, 8, dtype=torch.uint8)
    with pytest.raises(TypeCheckError, match="zero"):
        QuantizedWeights(Format("integer", 4, 8), values, torch.ones(1, 2, 1), torch.zeros(1, 2, 1))


def test_a_function_is_looked_at_for_its_first_calls_in_each_test():
    wrong = torch.ones(2, 5, 3), torch.ones(2, 5)
    for _ in range(shapes.ENOUGH):
        neurons.energy(torch.ones(2, 5, 3), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="size"):  # torch's own word
        neurons.energy(*wrong)
    shapes.begin_anew()
    with pytest.raises(TypeCheckError, match="squares"):
        neurons.energy(*wrong)


def test_nothing_is_checked_outside_of_tests():
    code = (
        "import sys, torch\nfrom moespresso.kernels import neurons\n"
        "print('beartype' in sys.modules, hasattr(neurons.energy, '__wrapped__'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
