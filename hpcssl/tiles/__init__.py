"""The slide table, tile stores, reading tiles, and procedural tissue for trials."""
