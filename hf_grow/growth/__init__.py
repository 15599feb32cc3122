"""Tensor maps: what a growth is, the checked plan, and its evaluation."""
