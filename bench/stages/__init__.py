"""What `make gpu` does in turn, and what is made of its files."""
