"""`python -m train.launch TARGET RECIPE [options] [-- overrides]`."""

import sys

from train.errors import UserError
from train.launch import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
