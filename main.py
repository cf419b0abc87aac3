"""python main.py CONFIG.yaml [key=value ...]; `python main.py --help` lists the commands."""

import sys

from forgebook.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
