"""Fused residual blocks for PyTorch ResNets: the same numbers, the same state_dict, less time."""

__version__ = "0.1.0"
