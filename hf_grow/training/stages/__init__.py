"""Training in stages, with a growth between one and the next."""
