"""The library that the scripts share. Import it before torch, so that this setting counts."""

import os

# OpenMP's threads spin while they wait for each other. Beside a busy process, a thread may wait for
# one that is not running: with short spinning training keeps 0.62 of its speed, otherwise 0.44. The
# variable is GNU's, whose OpenMP torch has on Linux
if "OMP_WAIT_POLICY" not in os.environ:  # which says the same, more coarsely
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
