"""Mixture-of-experts growth: upcycling dense models, and more experts for MoE models."""
