"""Rule-based rewards: `score.py` the reward of a completion, `tool_call.py` how its calls are compared with the gold ones."""
