"""The decoder of Qwen2 and Llama: its shape, weights, forward pass and cache."""
