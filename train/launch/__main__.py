"""`python -m train.launch` is `python -m train launch`."""

import sys

from train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]]))
