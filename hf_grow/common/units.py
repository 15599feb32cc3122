"""Numbers with units, for messages, tables and cards."""


def format_bytes(nbytes: float) -> str:
    """``nbytes`` in decimal megabytes or gigabytes: 219_000 -> "0.22 MB", 21.46e9 -> "21.46 GB"."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
