"""What parts amount to and whether they fit each other: tokens, tiles, FLOPs. No torch."""
