"""Teach Stable Diffusion a subject from a few pictures. Same as `comcat train`; see --help."""

import sys

from comcat_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
