"""Model families, the architecture of a config, config.json compatibility, parameter counts and FLOPs."""
