"""`python -m dllm_ext` is the command `dllm`."""

from .cli import main

main()
