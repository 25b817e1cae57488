"""The Trainer's thin subclass, sampler, feature cache, and the loop that builds parts."""
