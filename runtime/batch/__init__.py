"""Many rows through one model: read, answered by several processes, kept in a journal, written."""
