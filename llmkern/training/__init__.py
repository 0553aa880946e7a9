"""Training of language models: objectives, data, the trainer and its configuration."""
