"""How far each stage of a build is from the one before it: cases, reference, comparison, ledger."""
