"""Parts of a bundle that need the finished decoder."""
