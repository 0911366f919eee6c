"""Hidden states -> experts -> combined states. May import `experts`, never `cluster`."""
