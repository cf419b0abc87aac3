"""python main.py CONFIG.yaml [key=value ...]; `python main.py --help` lists the commands."""

import sys

from forgebook.cli.main import main
from forgebook.collector import collect_rarely

if __name__ == "__main__":
    collect_rarely()
    sys.exit(main())
