"""The commands, thin: words in, a message and an exit code out."""
