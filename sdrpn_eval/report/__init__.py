"""Results that can be believed: runs compared question by question, and a gate for CI."""
