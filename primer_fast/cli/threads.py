"""Import before torch: how long the threads of a CPU run spin while they wait for each other.

By default GNU OpenMP lets a thread spin for milliseconds at every barrier: beside one other busy process two threads
trained a small MLP twenty times slower for it. With the spin set here, that process costs a factor of 2.6, and on idle
cores a small transformer trains 15 % slower than with the default. A GOMP_SPINCOUNT or OMP_WAIT_POLICY of the user's is
left as it is.
"""

import os
import sys

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
