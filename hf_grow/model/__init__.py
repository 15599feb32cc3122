"""Model families, the architecture of one config, config.json for every reader, parameter counts, FLOPs."""
