"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported."""

import os
import tempfile
from pathlib import Path

import torch

from fusedyolo.tools import interpreter

if not torch.cuda.is_available():
    interpreter.prepare()

os.environ["FUSEDYOLO_CONFIG_DIR"] = str(Path(tempfile.gettempdir(), "fusedyolo-tests-have-none"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # pytest-xdist runs one process a core
