"""The daemon against LMCache's own server, Redis and a bare socket."""
