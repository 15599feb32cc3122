"""Width growth: activation maps, the search for shapes, and the published methods."""
