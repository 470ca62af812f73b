"""Checkpoint import, graph export and the command line of l2p-export."""
