"""From a recipe to a trained policy: configuration, warm-up, training, evaluation and the run folder."""
