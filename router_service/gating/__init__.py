"""Gates: hidden states -> which experts, with which weights. One published system per file."""
