"""Which backend is the fastest for each call, as measured: tables that ``backend="auto"`` reads.

A table maps a call (op, shapes, layouts, dtype) to a backend and its launch config. Those in this folder are shipped,
for devices by name; the user's own, from ``resnet-fused tune`` or ``fuse(model, tune=x)``, lie in the cache directory,
one file for each set of device, driver and library versions, and go first. On a CPU the number of threads
(``torch.get_num_threads()``) is one of these facts: what was tuned for two threads says nothing about one, where the
static rule holds until that is tuned too. ``RESNET_FUSED_TUNING=0`` reads no table.
"""
