"""`tinylmm demo`: a page to talk to one model, or to two side by side, and to ask again what they were evaluated on."""
