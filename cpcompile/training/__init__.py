"""From text to a checkpoint: corpus, importance, allocation, and the training of every branch."""
