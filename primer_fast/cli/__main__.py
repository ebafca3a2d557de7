import sys

from primer_fast.cli import main

sys.exit(main())
