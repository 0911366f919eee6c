"""How weights are held in fewer bits: one scheme a file, with its torch reference."""
