"""The OpenAI-compatible server of a policy, and the chat in a terminal."""
