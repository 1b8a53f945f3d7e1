"""Builds the package."""

from setuptools import setup

setup()
