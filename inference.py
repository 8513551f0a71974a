"""Draw pictures from prompts with COMCAT adapters. Same as `comcat generate`; see --help."""

import sys

from comcat_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
