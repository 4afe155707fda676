"""Other projects' checkpoints and conventions, in this project's modules."""
