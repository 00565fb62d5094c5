"""What a checkpoint is: its family, files, tensors, tokenizer and exact prompts."""
