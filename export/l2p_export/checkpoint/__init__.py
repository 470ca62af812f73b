"""From a user's files to a checkpoint that is complete, merged and checked."""
