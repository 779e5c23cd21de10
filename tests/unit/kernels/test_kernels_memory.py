"""Huge-page tensors are ordinary tensors that never overlap."""

import pytest
import torch

from kernels.memory import HugePageArena, empty_in_huge_pages


@pytest.mark.parametrize("shape", [(3, 5), (1 << 20, 3), (0, 4)])
def test_a_tensor_of_its_own(shape):
    tensor = empty_in_huge_pages(shape, torch.bfloat16)
    tensor.fill_(2.0)
    assert tensor.shape == shape
    assert tensor.dtype is torch.bfloat16
    assert tensor.is_contiguous()
    assert bool((tensor == 2.0).all())


def test_large_tensors_start_on_a_huge_page():
    assert empty_in_huge_pages((4 << 20,), torch.uint8).data_ptr() % (2 << 20) == 0


def test_an_arena_hands_out_disjoint_aligned_pieces():
    arena = HugePageArena()
    shapes = [(7,), (1 << 20, 7), (3, 1 << 20), (1 << 25,), (1 << 23,), (5, 5), (1 << 23,), (9,)]
    tensors = [arena.empty(shape, torch.float32) for shape in shapes]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    for value, tensor in enumerate(tensors):
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == value).all())
