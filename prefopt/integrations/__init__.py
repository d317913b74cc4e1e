"""What works inside other trainers."""
