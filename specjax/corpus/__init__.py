"""Text to train on and to measure with: chats, prompts, self-distillation, shards."""
