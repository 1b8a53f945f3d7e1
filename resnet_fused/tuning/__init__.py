"""Which backend is the fastest for each call, as measured: tables that ``backend="auto"`` reads.

A table maps a call (op, shapes, layouts, dtype) to a backend and its launch config. Those in this folder are shipped,
for devices by name; the user's own, from ``resnet-fused tune`` or ``fuse(model, tune=x)``, lie in the cache directory,
one file for each set of device, driver and library versions, and go first. ``RESNET_FUSED_TUNING=0`` reads neither.
"""
