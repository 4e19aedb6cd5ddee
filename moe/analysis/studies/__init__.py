"""What only one published study needs."""
