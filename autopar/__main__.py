"""`python -m autopar` is the autopar command.
Must not know what the commands do.
"""

import sys

from autopar.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
