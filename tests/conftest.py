"""Makes the project's files importable. One thread: on tiny tensors several only wait for each other."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
