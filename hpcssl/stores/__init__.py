"""Where the bytes of tile t are."""
