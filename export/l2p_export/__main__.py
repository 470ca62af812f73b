"""`python -m l2p_export` is `l2p-export`."""

from l2p_export.cli.main import run

if __name__ == "__main__":
    run()
