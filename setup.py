"""Builds the package, and the compiled library where the machine has what it takes (build_ext.py)."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))

from build_ext import BuildLibrary, extensions

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary})
