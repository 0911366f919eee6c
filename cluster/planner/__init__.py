"""Plans a deployment from a model's config.json before a GPU is booked. See README.md in this folder."""
