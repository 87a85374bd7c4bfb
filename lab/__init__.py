"""Small real models for droidspeak: one base and its fine-tunes, trained on a CPU in minutes.

The committed weights in ``lab/models`` and the prompts in ``lab/prompts`` are all
that the demo and the tests read; ``python -m lab.train`` makes them again.
"""
