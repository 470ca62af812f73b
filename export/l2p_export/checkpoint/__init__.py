"""Makes a complete, merged and checked checkpoint from a user's files."""
