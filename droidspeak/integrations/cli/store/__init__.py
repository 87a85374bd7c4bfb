"""`droidspeak store`: what tiers hold, and changes of it."""
