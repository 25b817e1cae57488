"""The Trainer's subclass, sampler, feature cache, and the loop that builds parts."""
