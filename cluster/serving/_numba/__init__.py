"""Parts of a decode step, compiled for this machine's CPU."""
