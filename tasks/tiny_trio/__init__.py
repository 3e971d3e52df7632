"""The embedded benchmark."""
