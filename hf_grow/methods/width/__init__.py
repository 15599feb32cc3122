"""Width growth: activation maps, search for widths, and the published methods."""
