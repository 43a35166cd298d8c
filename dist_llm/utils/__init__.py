"""Small things without an opinion: errors and exit codes, files, formatting. Never torch."""
