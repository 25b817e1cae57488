"""Scripts that ask other programs: each runs in a process of its own and imports nothing of tinylmm."""
