"""The library that the scripts share. Import it before torch, so that this setting counts."""

import os

# OpenMP's threads spin while they wait for each other. Beside a busy process the one that is waited
# for may not be running: with short spinning, training keeps 0.62 of its speed, else 0.44. This is
# the variable of GNU's OpenMP, which torch has on Linux
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
