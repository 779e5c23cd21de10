"""Without a GPU, Triton's kernels run in its interpreter; it decides when a kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
