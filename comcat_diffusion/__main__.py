"""`python -m comcat_diffusion` is `comcat`."""

import sys

from comcat_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
