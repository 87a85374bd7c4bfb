"""The daemon: LMCache's `lm://` protocol, and HTTP, on our tiers."""
