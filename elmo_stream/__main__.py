"""``python -m elmo_stream`` is the command ``elmo-stream``."""

import sys

from elmo_stream.cli import main

if __name__ == "__main__":
    sys.exit(main())
