"""From a checkpoint directory to single experts' weights."""
