"""What works on whole models."""
