"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported."""

import torch

from bench import interpreter

if not torch.cuda.is_available():
    interpreter.prepare()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # pytest-xdist runs one process a core
