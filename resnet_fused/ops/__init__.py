"""The registered operators, one folder each: ``api.py`` and one module per backend."""
