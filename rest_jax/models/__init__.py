"""The decoder, its layouts, published sizes, and conversion from and to Hugging Face folders."""
