"""Images from files, addresses of data and arrays."""
