"""Where the bytes of an arena live."""
