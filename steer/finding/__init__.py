"""`steer find`: the direction of a trait, and with a dictionary the features (SAE latents) that steer it."""
