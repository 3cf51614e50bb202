"""``python -m fastrnn``. ``python -m fastrnn.info`` is the same."""

import sys

from .info import main

if __name__ == "__main__":
    sys.exit(main())
