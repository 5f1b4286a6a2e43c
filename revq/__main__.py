"""``python -m revq`` is the ``revq`` command."""

import sys

from revq.cli import main

if __name__ == "__main__":
    sys.exit(main())
