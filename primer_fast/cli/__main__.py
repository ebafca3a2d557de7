import os
import sys

from primer_fast.cli import main

status = main()
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    # DDP and FSDP keep gloo's threads after the process group is destroyed. If one of them still lets go of a tensor
    # while Python is being taken down, it aborts the process, whose work is done: pytorch/pytorch issue 190489.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
