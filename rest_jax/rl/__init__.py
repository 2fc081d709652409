"""The method: regions, token weights, curriculum, log-probabilities, advantages, loss, and the train step."""
