"""Publishing a grown checkpoint on the Hugging Face Hub."""
