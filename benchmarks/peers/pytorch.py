"""The strongest PyTorch programs of the same algorithm that we know how to write: benchmarks/torch_baseline.py."""

import torch
from torch_baseline import TorchLLaDA

from .loop import LoopPeer


class Peer(LoopPeer, TorchLLaDA):
    def __init__(self, folder: str, precision: str, threads: int, prepack: bool = False):
        torch.set_num_threads(threads)
        TorchLLaDA.__init__(self, folder, getattr(torch, precision), prepack)
