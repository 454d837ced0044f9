"""What benchmarks/pareto.py is made of: the grid of settings, the run, its numbers, the figure, the page, the table."""
