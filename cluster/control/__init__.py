"""Who holds which experts: joins, losses and the placement table that follows from them."""
