"""Cases, error budgets and model sources for tests and benchmarks; users check their own kernels with them too."""
