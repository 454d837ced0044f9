"""Independent oracle of the engine: plain PyTorch and numpy, written from the published formulas.

Nothing here imports the package under test. Obviousness is preferred to speed everywhere.
"""
