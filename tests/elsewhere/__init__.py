"""Other programs that read what we write, each in an environment of its own, and what they are asked there."""
