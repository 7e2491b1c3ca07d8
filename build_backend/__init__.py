"""The project's build: PEP 517 hooks, CUDA images and the host module. Standard library only."""
