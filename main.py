"""The one command: `python main.py CONFIG.yaml [key=value ...]`. `python main.py --help` tells the rest."""

import sys

from helpers.cli import main

if __name__ == "__main__":
    sys.exit(main())
