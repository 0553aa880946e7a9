"""What a user does with llmkern, each in a script: `python -m examples.NAME`, `--help` tells the arguments."""
