"""Carrying out a plan: to a folder or in memory, with router rows that are measured on the source."""
