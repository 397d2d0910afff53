"""The library that the scripts share. Import it before torch, so that this setting counts."""

import os

# OpenMP's threads spin while they wait for each other. Beside other busy processes the one that is
# waited for does not run then; with short spinning, training keeps 1.3 times more of its speed.
# GNU's OpenMP is the one of torch on Linux; on macOS LLVM's spins for 0.2 s, unless told otherwise
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("KMP_BLOCKTIME", "1")  # ms
