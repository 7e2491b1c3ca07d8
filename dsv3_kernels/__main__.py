"""`python -m dsv3_kernels`: the same as `dsv3`."""

import sys

from .cli import main

sys.exit(main())
