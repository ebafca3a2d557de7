"""Import before torch: how long the threads of a CPU run spin while they wait for each other.

By default GNU OpenMP lets a thread spin for milliseconds at every barrier. Beside one other busy process that costs a
training run up to twenty times its time; with a short spin it costs what the other process takes, and an idle machine
loses a few percent. A GOMP_SPINCOUNT or OMP_WAIT_POLICY of the user's is left as it is.
"""

import os
import sys

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
