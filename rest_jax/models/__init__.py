"""The decoder with its KV cache, and the reading and writing of Hugging Face folders."""
