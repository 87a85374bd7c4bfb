"""The LMCache door: our store inside LMCache's engine and its multiprocess server."""
