"""The data: worlds that are drawn by procedures, real digits, and files from disk."""
