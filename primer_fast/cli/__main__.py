import os
import sys

from primer_fast.cli import main

status = main()
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    # DDP and FSDP keep gloo's threads running after the process group is destroyed. Such a thread aborts the process
    # if it frees a tensor while Python shuts down (pytorch/pytorch issue 190489). So end without that shutdown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
