"""GGUF files: what llama.cpp reads, as Hugging Face would have it."""
