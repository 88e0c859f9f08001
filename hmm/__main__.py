"""`python -m hmm` is the command `hmm`."""

import sys

from hmm.cli import main

if __name__ == "__main__":
    sys.exit(main())
