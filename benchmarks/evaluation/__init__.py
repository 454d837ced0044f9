"""What benchmarks/eval.py and benchmarks/pareto.py are made of."""
