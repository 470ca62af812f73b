"""`python -m l2p_runtime.client.page`."""

import sys

from l2p_runtime.client.page import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
