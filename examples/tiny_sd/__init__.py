"""The parts of train_tiny_sd.py, one topic a file, in the order in which a run goes through them."""
