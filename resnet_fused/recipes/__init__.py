"""Fused classifiers on Ray: batches of images with Ray Data, requests with Ray Serve.

Each is short, to be run as it is or copied and changed. They need ``pip install 'resnet-fused[serve]'``.
"""
