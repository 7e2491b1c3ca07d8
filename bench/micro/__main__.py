"""`python -m bench.micro`: compiles the programs; on a GPU, runs them and prints their figures."""

import sys

import torch

from . import HERE, compiled, probes

for source in sorted(HERE.glob("*.cu")):
    print(compiled(source.stem))
if torch.cuda.is_available():
    for name, probe in probes(torch.device("cuda", torch.cuda.current_device())).items():
        print(f"{name}: {', '.join(f'{figure} {value:.4g}' for figure, value in probe().items())}")
sys.exit(0)
