"""Numbers with units, for messages, tables and cards."""


def format_duration(seconds: float) -> str:
    """``seconds`` in a suitable unit: "42.0 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_bytes(nbytes: float) -> str:
    """``nbytes`` in decimal megabytes or gigabytes: 219_000 -> "0.22 MB", 21.46e9 -> "21.46 GB"."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
